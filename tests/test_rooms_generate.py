"""The generator on a tiny catalogue of boxes: determinism, shards, splits, messages."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("numba", reason="the rooms generator needs numba, which is not installed")

from data_pipelines.rooms import generate
from data_pipelines.rooms.classes import CLASS_ID
from data_pipelines.rooms.furniture import open_catalogues
from data_pipelines.rooms.library import ModelLibrary
from data_pipelines.rooms.pack import RoomsPack, open_packs
from data_pipelines.rooms.render import MIN_AREA, render_scene
from tests.rooms_catalogue import cube_catalogue


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> str:
    return str(cube_catalogue(tmp_path_factory.mktemp("catalogue") / "t.sh3f"))


@pytest.fixture(scope="module")
def library(catalogue) -> ModelLibrary:
    return ModelLibrary(open_catalogues([catalogue]), "train")


def test_same_seed_same_scene(library):
    first, again, other = (render_scene((s, 0, 7), library, "x", 2, 32) for s in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert not np.array_equal(first[0]["rgb"], other[0]["rgb"])
    assert not np.array_equal(first[0]["rgb"], first[1]["rgb"])


def test_rooms_are_closed_and_furnished(library):
    for scene in range(12):
        for sample in render_scene((0, 0, scene), library, "x", 1, 32):
            assert (sample["semseg"] > 0).all() and (sample["depth"] > 0.04).all()
            assert len(sample["instances"]) >= 2
            floor = sample["semseg"] == CLASS_ID["floor"]
            if floor.any():
                assert sample["normal"][floor][:, 1].min() > 190
            for instance in sample["instances"]:
                xmin, ymin, xmax, ymax = instance["boxes"]
                assert (xmax - xmin) * (ymax - ymin) >= MIN_AREA


def test_any_number_of_processes_gives_the_same_bytes(catalogue):
    arguments = ([catalogue], "cc0", "val", 5, 24, 11, 2)
    one = list(generate.render_samples(*arguments, processes=1))
    two = list(generate.render_samples(*arguments, processes=2))
    assert len(one) == 5 and one == two


def test_command_line(catalogue, tmp_path):
    flags = ["--split=train", "--count=5", "--resolution=24", "--seed=2", "--shard_size=2", "--catalogue", catalogue]
    assert generate.main([f"--out={tmp_path}", *flags]) == 0
    packs = open_packs(tmp_path / "rooms_train-*-of-00003.zip")
    assert [len(pack) for pack in packs] == [2, 2, 1]
    assert [key for pack in packs for key in pack.keys] == [f"{i:06d}" for i in range(5)]
    assert [pack.meta(0)["scene"] for pack in packs] == [f"train-2-{i:06d}" for i in range(3)]
    info = packs[0].info
    assert info["license"] == "CC0-1.0" and info["resolution"] == 24 and info["generator"]["seed"] == 2
    split = json.loads((tmp_path / "split.json").read_text())
    used = {model for pack in packs for i in range(len(pack)) for model in pack.meta(i)["models"]}
    assert used <= set(split["train"]) and not set(split["train"]) & set(split["val"])
    assert split["class_of"]["t#Sofa1"] == "couch" and split["creator_of"]["t#Sofa1"] == "nobody"


def test_single_pack_name(catalogue, tmp_path):
    flags = ["--split=val", "--count=2", "--resolution=24", "--catalogue", catalogue]
    assert generate.main([f"--out={tmp_path}", *flags]) == 0
    assert len(RoomsPack(tmp_path / "rooms_val.zip")) == 2


def test_messages(catalogue, tmp_path, capsys, monkeypatch):
    flags = [f"--out={tmp_path}", "--count=1", f"--catalogue={tmp_path}"]
    assert generate.main(flags) == 1
    assert "apt-get install sweethome3d-furniture" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([f"--out={tmp_path}", "--count=0"])
    assert "--count must be at least 1" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "data_pipelines.rooms.rasterizer")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert generate.main([f"--out={tmp_path}", "--count=1", "--catalogue", catalogue]) == 1
    assert "rendering rooms needs numba: `pip install numba`" in capsys.readouterr().err
