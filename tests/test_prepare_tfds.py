from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.sources import open_source


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    names = tfds.features.ClassLabel(names=["cat", "polar_bear", "dog"])
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": names,
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "label": names}),
        "id": tfds.features.Text(),
    }
    examples = [
        {
            "image": picture(i),
            "label": i,
            "captions": [f"one {i}", "", f"two {i}"][: 3 * (i < 2)],
            "mask": picture(i)[..., :1],
            "objects": [{"bbox": tfds.features.BBox(ymin=0.25, xmin=0.0, ymax=0.5, xmax=1.0), "label": i}],
            "id": f"id{i % 2}",
        }
        for i in range(3)
    ]
    folder = tmp_path_factory.mktemp("tfds")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_prepare",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": list(enumerate(examples))},
        data_dir=folder,
        file_format="array_record",
        disable_shuffling=True,
    )
    return {"kind": "tfds", "name": "tiny_prepare", "data_dir": str(folder)}


def test_tfds(tfds_folder):
    source = open_source(
        tfds_folder
        | {"label": "label", "label_caption": "a photo of a {}", "boxes": "objects", "others": {"semseg": "mask"}}
    )
    item = pickle.loads(pickle.dumps(source)).read(1)
    assert item.key == "tiny_prepare/train/00000001" and not item.notes and not item.failures
    np.testing.assert_array_equal(item.fields["rgb"], picture(1))
    np.testing.assert_array_equal(item.fields["semseg"], picture(1)[..., 0])
    assert item.fields["caption"] == ["a photo of a polar bear"]
    assert item.fields["det"] == [{"boxes": [0.0, 0.25, 1.0, 0.5], "class_name": "polar_bear", "score": 1.0}]
    source = open_source(tfds_folder | {"caption": "captions", "key": "id"})
    assert source.keys == ["id0", "id1"] and [p[:2] for p in source.problems] == [
        ("tiny_prepare/train/00000002", "duplicate_key")
    ]
    assert source.read(1).fields["caption"] == ["one 1", "two 1"]
    last = open_source(tfds_folder | {"caption": "captions", "split": "train[2:]"})
    assert last.read(0).failures["caption"].reason == "caption_missing"
    assert open_source(tfds_folder | {"max_pixels": 24}).read(0).fields.keys() == {"rgb"}
    with pytest.raises(Unusable, match="4 x 6|6 x 4"):
        open_source(tfds_folder | {"max_pixels": 23}).read(0)
    json.dumps(source.describe())


def test_tfds_says_what_is_missing(tfds_folder):
    with pytest.raises(ValueError, match="has no feature 'text'"):
        open_source(tfds_folder | {"caption": "text"})
    with pytest.raises(ValueError, match="'captions' is no ClassLabel"):
        open_source(tfds_folder | {"label": "captions"})
    with pytest.raises(FileNotFoundError, match="tfds build mnist"):
        open_source(tfds_folder | {"name": "mnist"})
