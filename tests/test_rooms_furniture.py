"""Catalogue reader, mesh simplification, and the split by model."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.rooms.furniture import Catalogue, open_catalogues, simplify
from data_pipelines.rooms.library import ModelLibrary, split_models, usable_models
from tests import rooms_catalogue as made

CHAIR = dict(id="t#chair", name="Chair", category="Office", model="/a/c.obj", width=40, depth=50, height=90)


def one_model(path, obj: str, members: dict | None = None, **fields) -> Catalogue:
    files = {"a/c.obj": obj, "a/m.mtl": "newmtl paint\nKd 1 0 0\nd 1\nnewmtl glass\nKd 0 0 1\nd 0.1\n"}
    return Catalogue(made.write_catalogue(path, made.entry(1, **CHAIR | fields), files | (members or {})))


def test_mesh_is_z_up_in_metres(tmp_path):
    catalogue = one_model(tmp_path / "c.sh3f", made.CUBE_OBJ)
    mesh = catalogue.load(catalogue.entries[0])
    np.testing.assert_allclose(mesh.vertices.min(0), [-0.2, -0.25, 0], atol=1e-6)
    np.testing.assert_allclose(mesh.vertices.max(0), [0.2, 0.25, 0.9], atol=1e-6)
    assert mesh.faces.shape == (12, 3) and mesh.faces.dtype == np.int32
    np.testing.assert_allclose(mesh.colors, [[1, 0.02**2.2, 0.02**2.2]], rtol=1e-5)
    center = mesh.vertices[mesh.faces].mean(1) - [0, 0, 0.45]
    assert ((mesh.normals[:, 0] * center).sum(-1) > 0).all()  # the cube's faces point outwards
    np.testing.assert_allclose(np.abs(mesh.normals).max(-1), 1, atol=1e-5)  # and creases stay sharp


def test_front_of_the_file_becomes_minus_y(tmp_path):
    """OBJ's +z is the front in Sweet Home 3D; modelRotation is applied before."""
    obj = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\nf 1 3 4\n"
    catalogue = one_model(tmp_path / "c.sh3f", obj)
    mesh = catalogue.load(catalogue.entries[0])
    assert mesh.vertices[3, 1] == mesh.vertices[:, 1].min()
    turned = one_model(tmp_path / "d.sh3f", obj, modelRotation="-1 0 0 0 1 0 0 0 -1")
    mesh = turned.load(turned.entries[0])
    assert mesh.vertices[3, 1] == mesh.vertices[:, 1].max()


def test_glass_is_left_out_but_counts_for_the_size(tmp_path):
    obj = made.CUBE_OBJ + "v 0 0 3\nusemtl glass\nf 1 2 -1\n"
    catalogue = one_model(tmp_path / "c.sh3f", obj)
    mesh = catalogue.load(catalogue.entries[0])
    assert len(mesh.faces) == 12
    used = mesh.vertices[mesh.faces]
    np.testing.assert_allclose(np.ptp(used[..., 1]), 0.5 / 3, atol=1e-6)
    only_glass = one_model(tmp_path / "d.sh3f", made.CUBE_OBJ.replace("paint", "glass"))
    assert len(only_glass.load(only_glass.entries[0]).faces) == 12


def test_stored_normals_and_texture_coordinates(tmp_path):
    obj = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0.25 0.5\nvn 0 0 2\nf 1/1/1 2/1/1 3/1/1\n"
    catalogue = one_model(tmp_path / "c.sh3f", obj)
    mesh = catalogue.load(catalogue.entries[0])
    np.testing.assert_allclose(mesh.normals, np.broadcast_to([0, -1, 0], (1, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(mesh.uvs, np.broadcast_to([0.25, 0.5], (1, 3, 2)))


def test_textures(tmp_path):
    catalogue = Catalogue(made.cube_catalogue(tmp_path / "t.sh3f"))
    mesh = catalogue.load(catalogue.entries[2])
    assert mesh.textures.shape == (1, 128, 128, 3) and mesh.texture.tolist() == [0]
    assert mesh.textures[0, 0, 0].tolist() == [250] * 3 and mesh.textures[0, 0, -1].tolist() == [50] * 3
    assert mesh.pyramid.shape == (1, sum(s * s for s in (128, 64, 32, 16, 8, 4)), 3)
    mean = ((np.array([250, 50]) / 255) ** 2.2).mean()
    np.testing.assert_allclose(mesh.material_albedo[0], mean, rtol=1e-4)
    with pytest.warns(UserWarning, match=r"t#chair .*texture 'gone\.png' is missing"):
        missing = one_model(tmp_path / "c.sh3f", made.CUBE_OBJ, {"a/m.mtl": "newmtl paint\nmap_Kd gone.png\n"})
        missing.load(missing.entries[0])


def test_simplify_keeps_the_shape():
    from data_pipelines.rooms.shapes import revolve

    angle = np.linspace(-np.pi / 2, np.pi / 2, 60)
    ball = revolve(np.stack([np.cos(angle), np.sin(angle)], -1), (1, 0, 0), 100)
    assert simplify(ball, 20000) is ball
    small = simplify(ball, 1500)
    assert 500 < len(small.faces) <= 1500
    radius = np.linalg.norm(small.vertices[small.faces].reshape(-1, 3), axis=-1)
    assert radius.min() > 0.9 and radius.max() < 1.001
    assert small.faces.max() < len(small.vertices) and len(small.normals) == len(small.faces)


def test_errors_name_file_and_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.sh3f.*apt-get install sweethome3d-furniture"):
        Catalogue(tmp_path / "x.sh3f")
    with pytest.raises(FileNotFoundError, match=r"no \.sh3f catalogue.*dpkg -x"):
        open_catalogues([str(tmp_path)])
    (tmp_path / "bad.sh3f").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"bad\.sh3f: no zip file"):
        Catalogue(tmp_path / "bad.sh3f")
    bad_number = made.write_catalogue(tmp_path / "n.sh3f", made.entry(1, **CHAIR | {"width": "wide"}), {})
    with pytest.raises(ValueError, match=r"n\.sh3f.*entry #1.*wide"):
        Catalogue(bad_number)
    for obj in ("v 0 0 0\nf 1 2 x\n", "v 0 0 0\nf 1 2 9\n", "v 0 0 0\n"):
        catalogue = one_model(tmp_path / "c.sh3f", obj)
        with pytest.raises(ValueError, match=r"c\.sh3f: model t#chair \(a/c\.obj\): cannot be read"):
            catalogue.load(catalogue.entries[0])
    catalogue = Catalogue(made.write_catalogue(tmp_path / "m.sh3f", made.entry(1, **CHAIR), {}))
    with pytest.raises(ValueError, match=r"m\.sh3f: model t#chair \(a/c\.obj\)"):
        catalogue.load(catalogue.entries[0])


def test_split_is_stratified_and_stable(tmp_path):
    first = Catalogue(made.cube_catalogue(tmp_path / "a.sh3f"))
    split = split_models([first])
    ids = [model.model_id for model in usable_models(first)]
    assert sorted(split["train"] + split["val"]) == sorted(ids)
    for k in range(len(made.MODELS)):
        pair = {f"t#{made.MODELS[k][0]}{2 * k + 1}", f"t#{made.MODELS[k][0]}{2 * k + 2}"}
        if made.MODELS[k][0] not in ("Cupboard", "Lower cabinet"):  # these share the class cabinet
            assert len(pair & set(split["val"])) == 1
    more = made.entry(1, **CHAIR | {"id": "u#lamp", "name": "Lamp"}) + made.entry(2, **CHAIR | {"id": "u#chair"})
    second = Catalogue(made.write_catalogue(tmp_path / "b.sh3f", more, {"a/c.obj": made.CUBE_OBJ}))
    both = split_models([first, second])
    assert set(split["val"]) <= set(both["val"]) and set(split["train"]) <= set(both["train"])
    assert "u#lamp" in both["train"]  # the only model of its class
    library = ModelLibrary([first], "val")
    assert {m.model_id for models in library.by_class.values() for m in models} == set(split["val"])
    with pytest.raises(ValueError, match="'train' or 'val'"):
        ModelLibrary([first], "test")
