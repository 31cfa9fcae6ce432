from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from token_sets import ALL, GRID, MASKING, PIXELS, arrays, write_set

from data_pipelines import loader, registry, sources
from data_pipelines.tfds_source import TfdsSource

N = 20


def test_token_source_joins_modalities_by_index(tmp_path):
    write_set(tmp_path, "train", N)
    source = sources.TokenSource(tmp_path)
    samples = source.open("train", [m.name for m in ALL])
    assert len(samples) == N == source.num_input_examples("train")
    for modality in ALL:
        for i, array in enumerate(arrays(modality, N)):
            np.testing.assert_array_equal(samples[i][modality.name], array)
    assert samples.where(7, "t_grid").endswith("t_grid/data-00001-of-00003.arrayrecord, record 1")


def test_token_source_refuses_misaligned_modalities(tmp_path):
    write_set(tmp_path / "a", "train", N)
    write_set(tmp_path / "b", "train", N + 1, [PIXELS])
    # Files copied from another set, with their manifest entry.
    target = tmp_path / "a" / "train"
    shutil.rmtree(target / "t_pixels")
    shutil.copytree(tmp_path / "b" / "train" / "t_pixels", target / "t_pixels")
    manifest = json.loads((target / "manifest.json").read_text())
    other = json.loads((tmp_path / "b" / "train" / "manifest.json").read_text())
    manifest["modalities"]["t_pixels"] = other["modalities"]["t_pixels"]
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'t_pixels' is not aligned with 't_grid': file 0 of 3 has 7 records"):
        sources.TokenSource(tmp_path / "a").open("train", ["t_grid", "t_pixels"])
    assert len(sources.TokenSource(tmp_path / "a").open("train", ["t_grid", "t_text"])) == N


def test_errors_name_the_prepare_command_and_the_split(tmp_path):
    source = sources.TokenSource(tmp_path / "nowhere", prepare="python -m prepare --out=x")
    with pytest.raises(FileNotFoundError, match=r"nowhere/train/manifest.json .* python -m prepare --out=x"):
        source.open("train", ["t_grid"])
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        source.open("validatio", ["t_grid"])
    with pytest.raises(NotImplementedError, match="data_pipelines.registry"):
        source.get_dataset("train")


def test_description_follows_the_contents_not_the_place(tmp_path):
    write_set(tmp_path / "a", "train", N, [GRID])
    write_set(tmp_path / "b", "train", N, [GRID])
    write_set(tmp_path / "c", "train", N, [GRID], seed=1)
    a, b, c = (sources.TokenSource(tmp_path / x).describe("train", ["t_grid"]) for x in "abc")
    assert a == b != c
    json.dumps(a)


def test_function_identity_sees_code_not_objects():
    def make(constant):
        return lambda sample: {"t_grid": sample["x"] + constant} if constant else sample

    def other(sample):
        return {"t_grid": sample["x"] + 2}

    assert sources.function_identity(make(1)) == sources.function_identity(make(1))
    assert sources.function_identity(make(1)) != sources.function_identity(other)


# ---- TFDS


def codes(sample):
    """Turns a TFDS sample into modalities: a corner of the image's first channel, and the label as a text."""
    return {
        "t_grid": sample["image"][:2, :3, 0].reshape(-1).astype(np.int64),
        "t_text": np.array([sample["label"] + 5]),
    }


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    examples = [{"image": rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), "label": i % 10} for i in range(N)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_images",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(4, 4, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
        ),
        split_datasets={"train": list(enumerate(examples))},
        data_dir=folder,
        file_format="array_record",
        disable_shuffling=True,
    )
    return folder, examples


def test_tfds_source_feeds_a_mixture(tfds_dir):
    folder, examples = tfds_dir
    splits = {"train": "train[:15]", "validation": "train[15:]"}
    source = TfdsSource("tiny_images", codes, splits, data_dir=folder)
    registry.add_task("tiny_images", source, ["t_grid", "t_text"])
    registry.add_mixture("tiny_images_mixture", [("tiny_images", 1.0)], masking=MASKING)
    for split, chosen in (("train", examples[:15]), ("validation", examples[15:])):
        stream = loader.open_stream("tiny_images_mixture", split, shuffle=False, num_epochs=1)
        batch = next(stream.batches(position=0, global_batch=len(chosen)))
        assert stream.size == len(chosen) == source.num_input_examples(split)
        for row, example in enumerate(chosen):
            np.testing.assert_array_equal(batch.tokens[row, :6], example["image"][:2, :3, 0].reshape(-1))
            assert (batch.tokens[row, 6], batch.length[row, 1]) == (example["label"] + 5, 1)
    assert stream.resolved["tasks"][0]["source"]["name"] == "tiny_images/1.0.0"
    json.dumps(stream.resolved)


def test_tfds_source_says_what_is_missing(tfds_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build mnist --file_format=array_record"):
        TfdsSource("mnist", codes, data_dir=tmp_path).open("train", ["t_grid"])
