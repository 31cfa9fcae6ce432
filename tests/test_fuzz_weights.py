"""Damaged weights, tokenizers and job files: they load as they were, or one sentence names the file.

FM4M_FUZZ=100 tries a hundred times as many, and other ones on every run.
"""

from __future__ import annotations

import json
import pathlib
import resource
import struct

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed, changed_json, damaged, fuzz
from test_interop_ml4m import CONFIG, MODALITIES, parameters
from test_tokenizers_io import small_tokenizer
from test_tokenizers_text import VOCAB_SIZE, captions

import fm4m
from fm4m.interop import ml4m
from fm4m.interop.tensor_file import TensorFile
from fm4m.tokenizers import io, text
from launch import jobs
from launch.gcloud import LaunchError

# Address space that a loader of these files of some hundred kilobytes may ask for on top of what is there.
MOST_MEMORY = 4 << 30


def header_of(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def changed_weights(draw, data: bytes):
    """A safetensors file whose header, header length or bytes are other ones."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(data))
    header, body = header_of(data)
    part = draw(st.sampled_from(sorted(header)))
    value = header[part]
    how = draw(st.sampled_from(("all", "part", "inner")))
    if how == "all":
        new = draw(changed_json(header))
    elif how == "part":
        new = json.dumps(header | {part: draw(changed(value, most=2))}).encode()
    else:  # a text of the metadata that is JSON itself
        inner = {k: draw(changed_json(json.loads(v))).decode("utf-8", "replace") if v.startswith("{") else v + "x"
                 for k, v in header.get("__metadata__", {}).items()}  # fmt: skip
        new = json.dumps(header | {"__metadata__": inner}).encode()
    length = draw(st.sampled_from((len(new),) * 9 + (0, len(new) - 1, len(new) + 7, 2**40, 2**63)))
    return struct.pack("<Q", length) + new + body


def refused(path, load):
    """What ``load`` gives, or None after one sentence that names the file. It may not ask for absurd memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, before[1]))
    try:
        return load()
    except ValueError as error:
        assert path.name.split(".")[0] in str(error) and len(str(error)) < 20_000, repr(error)
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- one file of tensors


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "numbers.safetensors"
    from safetensors.numpy import save_file

    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float16)}, path, {"step": "1"})
    return path


@fuzz(150)
@given(data=st.data())
def test_safetensors(data, tensors):
    whole = tensors.read_bytes()
    path = tensors.with_name("damaged.safetensors")
    path.write_bytes(data.draw(changed_weights(whole)))

    def load():
        with TensorFile(path) as file:
            return {key: file.read(key) for key in file.shapes}

    refused(path, load)


# ---- tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for domain in ("semseg", "features", "depth"):
        io.save(folder / f"{domain}.safetensors", small_tokenizer(domain))
    return {path.stem: path for path in folder.iterdir()}


@fuzz(40)
@given(data=st.data())
def test_tokenizer_files(data, tokenizers):
    whole = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    path = whole.with_name("damaged.safetensors")
    path.write_bytes(data.draw(changed_weights(whole.read_bytes())))
    refused(path, lambda: io.load(path))


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    """A file's JSON with its long lists cut out, and the lists."""
    path = tmp_path_factory.mktemp("text") / "whole.json"
    text.train_wordpiece(captions(), VOCAB_SIZE).save(path)
    values = json.loads(path.read_text())
    words, added = values["model"]["vocab"], values["added_tokens"]
    values["model"]["vocab"], values["added_tokens"] = {"WORDS": 1}, [{"ADDED": 1}]
    return path, values, json.dumps(words)[1:-1], json.dumps(added)[1:-1]


@fuzz(12)
@given(data=st.data())
def test_text_tokenizers(data, text_tokenizer):
    whole, values, words, added = text_tokenizer
    if data.draw(st.booleans()):
        new = data.draw(changed_json(values)).replace(b'"WORDS": 1', words.encode())
        new = new.replace(b'{"ADDED": 1}', added.encode())
    else:
        new = data.draw(damaged(whole.read_bytes()))
    path = whole.with_name("damaged.json")
    path.write_bytes(new)
    if (loaded := refused(path, lambda: text.TextTokenizer.load(path))) is not None:
        loaded.decode(loaded.encode("a red couch"))


# ---- models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    ml4m.save(folder, CONFIG, MODALITIES, parameters())
    return folder


@fuzz(25)
@given(data=st.data())
def test_models(data, model):
    name = data.draw(st.sampled_from(("model.safetensors", "config.json", "fm4m.json")))
    whole = (model / name).read_bytes()
    new = changed_weights(whole) if name.endswith("safetensors") else changed_json(json.loads(whole))
    try:
        (model / name).write_bytes(data.draw(new))
        loaded = refused(model, lambda: fm4m.load(model))
    finally:
        (model / name).write_bytes(whole)
    assert loaded is None or jax.tree.leaves(loaded.params)


# ---- what `launch` remembers


@fuzz(60)
@given(data=st.data())
def test_job_files(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("jobs")
        patch.setenv("FM4M_JOBS", str(folder))
        jobs.save(jobs.Job("night", "v4-16", "p", "us-central2-b", arguments=("--config=a.py", "--workdir=gs://x/y")))
        path = folder / "night.json"
        path.write_bytes(data.draw(changed_json(json.loads(path.read_text()))))
        try:
            job = jobs.load("night")
        except LaunchError as error:
            assert "\n" not in str(error) and len(str(error)) < 20_000
            return
        # Everything becomes an argument of a program, none of a shell.
        assert all(isinstance(word, str) for word in (*job.delete_command(), *job.place, job.workdir, job.describe()))
