"""Exported inference runs in a process that has JAX and safetensors but not fm4m, and predicts the same."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_model import MODALITIES

from fm4m import generate
from fm4m.interop import stablehlo
from fm4m.loading import LoadedModel
from fm4m.model import ModelConfig, encode, init_params

CONFIG = ModelConfig(32, 1, 2, num_heads=2, dtype="float32")
INPUTS, TARGETS = ("pixels", "caption"), ("depth", "global")

PLAIN = """
import sys
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
folder, *batches = sys.argv[1:]
params = load_file(f"{folder}/params.safetensors")
call = lambda name: export.deserialize(open(f"{folder}/{name}.jax_export", "rb").read()).call(params, inputs)
for batch in batches:
    inputs = dict(np.load(f"{batch}_in.npz"))
    np.savez(f"{batch}_out.npz", **call("predict"), **call("encode"))
assert "fm4m" not in sys.modules
"""


@pytest.fixture(scope="module")
def loaded():
    params = init_params(CONFIG, MODALITIES, jax.random.key(0))
    return LoadedModel(CONFIG, MODALITIES, params, {})


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    stablehlo.save(path, loaded, INPUTS, TARGETS)
    return path


def given(batch):
    rng = np.random.default_rng(batch)
    out = {}
    for name, spec in stablehlo.input_specs(MODALITIES, INPUTS, batch).items():
        most = {"pixels": 256, "caption": 300, "caption/length": MODALITIES["caption"].max_tokens}[name]
        out[name] = rng.integers(0, most, spec.shape).astype(spec.dtype)
    return out


def test_a_plain_jax_process_predicts_the_same_for_any_batch_size(loaded, folder, tmp_path):
    batches = {batch: given(batch) for batch in (1, 3)}
    for batch, inputs in batches.items():
        np.savez(tmp_path / f"{batch}_in.npz", **inputs)
    command = [sys.executable, "-c", PLAIN, str(folder), *map(str, batches)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for batch, inputs in batches.items():
        got = np.load(tmp_path / f"{batch}_out.npz")
        raw = stablehlo.raw_batch(MODALITIES, inputs)
        expected = generate.predict(loaded.params, CONFIG, MODALITIES, raw, INPUTS, TARGETS)
        for name in TARGETS:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
        encoded = encode(loaded.params, CONFIG, MODALITIES, *generate.visible_tokens(raw, MODALITIES, INPUTS))
        valid = np.asarray(encoded.valid)
        np.testing.assert_array_equal(got["valid"], valid)
        np.testing.assert_allclose(got["hidden"][valid], np.asarray(encoded.hidden)[valid], atol=1e-5)


def test_the_signature_says_what_goes_in_and_out(folder):
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    m = MODALITIES["depth"]
    assert signature["predict"]["depth"] == {"shape": ["batch", str(m.max_tokens)], "dtype": "int32"}
    assert signature["inputs"]["caption/length"] == {"shape": ["batch"], "dtype": "int32"}
    assert "encode" in signature


@pytest.mark.parametrize(
    ("inputs", "targets", "platforms", "message"),
    [
        ((), (), ("cpu",), "name the inputs"),
        (("pixel",), (), ("cpu",), "modality 'pixel' is no input of this model"),
        (("pixels",), ("pixels",), ("cpu",), "modality 'pixels' is no output of this model"),
        (("pixels",), ("depth",), ("gpu",), "no platform gpu; choose from cpu, cuda, tpu"),
    ],
)
def test_what_cannot_be_exported_is_named(loaded, tmp_path, inputs, targets, platforms, message):
    with pytest.raises(ValueError, match=message):
        stablehlo.save(tmp_path / "model", loaded, inputs, targets, platforms=platforms)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_kept(loaded, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="exists already"):
        stablehlo.save(tmp_path, loaded, INPUTS, TARGETS)
