"""ONNX models as labellers: small models written here byte by byte, so that no test needs the onnx package."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from data_pipelines.prepare import labels
from data_pipelines.prepare.labels import onnx_outputs, pixels

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install '.[labels]'")

# ---- Protocol buffers of onnx.proto: (number of a field, its value) with int, float, bytes, text, or lists of them.

_TYPES = {"float": 1, "uint8": 2, "int64": 7, "string": 8, "float16": 10}


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(*fields: tuple[int, object]) -> bytes:
    out = b""
    for number, value in fields:
        for v in value if isinstance(value, list | tuple) else [value]:
            if isinstance(v, int):
                out += _varint(number << 3) + _varint(v)
            elif isinstance(v, float):
                out += _varint(number << 3 | 5) + struct.pack("<f", v)
            else:
                v = v.encode() if isinstance(v, str) else v
                out += _varint(number << 3 | 2) + _varint(len(v)) + v
    return out


def value_info(name: str, shape: list, kind: str = "float") -> bytes:
    dims = [message((1, n)) if isinstance(n, int) else message((2, n)) for n in shape]
    return message((1, name), (2, message((1, message((1, _TYPES[kind]), (2, message((1, dims))))))))


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> bytes:
    described = []
    for name, value in attributes.items():
        if isinstance(value, list):
            described.append(message((1, name), (8, value), (20, 7)))
        else:
            described.append(message((1, name), (3, value), (20, 2)))
    return message((1, inputs), (2, outputs), (4, op), (5, described))


def constant(name: str, array: np.ndarray) -> bytes:
    kind = _TYPES["int64"] if array.dtype == np.int64 else _TYPES["float"]
    return message((1, list(array.shape)), (2, kind), (8, name), (9, array.tobytes()))


@pytest.fixture
def model(tmp_path):
    """model(nodes, inputs, outputs, constants=()) -> path of a file."""

    def write(nodes, inputs, outputs, constants=()):
        graph = message((1, nodes), (2, "g"), (5, list(constants)), (11, inputs), (12, outputs))
        path = tmp_path / "net.onnx"
        path.write_bytes(message((1, 8), (7, graph), (8, message((1, ""), (2, 13)))))
        return path

    return write


NCHW, NHWC = ["N", 3, "H", "W"], ["N", "H", "W", 3]


def identity(model, shape=NCHW, kind="float"):
    return model([node("Identity", ["x"], ["y"])], [value_info("x", shape, kind)], [value_info("y", shape, kind)])


def images(count=3, height=12, width=16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# ---- inputs


@pytest.mark.parametrize("shape", [NCHW, NHWC, [2, 3, 12, 16], ["N", 12, 16, 3]])
def test_pixels_arrive_normalised_in_the_models_layout(model, shape):
    options = dict(scale=0.5, mean=(1, 2, 3), std=(2, 4, 8), bgr=True)
    # The mean over the channels of what the model gets; of 5 pictures, the last call is of one.
    axis = shape.index(3)
    out = [*shape]
    out[axis] = 1
    path = model(
        [node("ReduceMean", ["x"], ["y"], axes=[axis], keepdims=1)], [value_info("x", shape)], [value_info("y", out)]
    )
    labeller = labels.make("onnx", model=path, output="depth", batch_size=2, **options)
    assert isinstance(labeller, labels.Labeller) and labeller.domain == "depth"
    x = images(5)
    expected = ((x[..., ::-1] * 0.5 - np.array([1, 2, 3])) / np.array([2, 4, 8])).mean(axis=3)
    found = labeller.label(x)
    assert found.shape == (5, 12, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(labeller.label(x[3:4]), expected[3:4], rtol=1e-5)


def test_pixels_of_uint8_and_float16(model):
    x = images()
    found = labels.make("onnx", model=identity(model, NHWC, "uint8"), output={"kind": "normal", "range": (0, 255)})
    length = np.linalg.norm(found.label(x).astype(float) / 127.5 - 1, axis=3)
    np.testing.assert_allclose(length, 1, atol=0.02)
    with pytest.raises(ValueError, match="takes pixels as they are: leave out scale, mean and std"):
        labels.make("onnx", model=identity(model, NHWC, "uint8"), output="normal", scale=1.0)
    half = labels.make("onnx", model=identity(model, NCHW, "float16"), output="features")
    np.testing.assert_allclose(half.label(x), x / 255, atol=1e-3)


def test_size_of_the_input(model):
    pool = [node("AveragePool", ["x"], ["y"], kernel_shape=[4, 4], strides=[4, 4])]
    path = model(pool, [value_info("x", [1, 3, 32, 32])], [value_info("y", [1, 3, 8, 8])])
    assert labels.make("onnx", model=path, output="features").label(images()).shape == (3, 8, 8, 3)
    with pytest.raises(
        ValueError, match=r"size=64 does not fit the input 'x'\. The model's inputs: x float \[1, 3, 32"
    ):
        labels.make("onnx", model=path, output="features", size=64)
    path = model(pool, [value_info("x", NCHW)], [value_info("y", ["N", 3, "h", "w"])])
    assert labels.make("onnx", model=path, output="features", size=(16, 24)).label(images()).shape == (3, 4, 6, 3)
    assert labels.make("onnx", model=path, output="features").label(images()).shape == (3, 3, 4, 3)


# ---- outputs


def test_depth_is_brought_back_to_the_picture(model):
    ramp = np.repeat(np.linspace(0, 255, 16)[None, None, :, None], 3, axis=3).repeat(12, axis=1).astype(np.uint8)
    nodes = [
        node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1),
        node("AveragePool", ["m"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    path = model(nodes, [value_info("x", [1, 3, 32, 32])], [value_info("y", [1, 1, 16, 16])])

    def make(**options):
        return labels.make("onnx", model=path, output={"kind": "depth", **options}, resize="letterbox")

    depth = make().label(ramp)
    assert depth.shape == (1, 12, 16) and np.abs(depth[0] - ramp[0, ..., 0] / 255).max() < 0.1
    near = make(range="picture", invert=True).label(ramp)
    assert near[0, 6, 0] == 1 and near[0, 6, -1] == 0 and (np.diff(near[0, 6]) <= 0).all()
    np.testing.assert_allclose(make(range=(0.0, 2.0)).label(ramp), depth / 2, atol=1e-6)


def test_class_maps(model):
    x = np.zeros((1, 4, 6, 3), np.uint8)
    x[:, :, :2, 0], x[:, :, 2:4, 1], x[:, :, 4:, 2] = 9, 9, 9
    path = identity(model)
    ids = labels.make("onnx", model=path, output="semseg").label(x)
    assert ids.dtype == np.uint8 and (ids[0] == [0, 0, 1, 1, 2, 2]).all()
    mapped = labels.make("onnx", model=path, output={"kind": "semseg", "class_map": [255, 7, 3]}).label(x)
    assert (mapped[0, 0] == [255, 255, 7, 7, 3, 3]).all()
    with pytest.raises(ValueError, match=r"class ids are 0\.\.2, but class_map has 2 entries\. The model's inputs: x"):
        labels.make("onnx", model=path, output={"kind": "semseg", "class_map": [1, 2]}).label(x)


def test_edges_vectors_and_logits(model):
    x = images()
    pooled = model(
        [node("GlobalAveragePool", ["x"], ["y"])], [value_info("x", NCHW)], [value_info("y", ["N", 3, 1, 1])]
    )
    mean = x.mean(axis=(1, 2)) / 255
    vectors = labels.make("onnx", model=pooled, output={"kind": "vector", "normalize": True}).label(x)
    np.testing.assert_allclose(vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-4)
    flat = model(
        [node("GlobalAveragePool", ["x"], ["p"]), node("Flatten", ["p"], ["y"], axis=1)],
        [value_info("x", NCHW)],
        [value_info("y", ["N", 3])],
    )
    logits = labels.make("onnx", model=flat, output={"kind": "logits", "softmax": True}).label(x)
    np.testing.assert_allclose(logits, np.exp(mean) / np.exp(mean).sum(axis=1, keepdims=True), rtol=1e-4)
    grey = model(
        [node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)],
        [value_info("x", NCHW)],
        [value_info("y", ["N", "H", "W"])],
    )
    edges = labels.make("onnx", model=grey, output={"kind": "edges", "sigmoid": True, "range": (0.5, 1)}).label(x)
    expected = 255 * (2 / (1 + np.exp(-x.mean(axis=3) / 255)) - 1)
    assert edges.dtype == np.uint8 and np.abs(edges - expected).max() <= 0.51


def test_tokens_become_a_map():
    where = onnx_outputs.Geometry((8, 8), (8, 8), None, "NCHW")
    tokens = np.arange(2 * 7 * 4, dtype=np.float32).reshape(2, 7, 4)
    found = onnx_outputs.open_output({"kind": "features", "drop_tokens": 1, "grid": (2, 3)}).labels(
        {"output": tokens}, where
    )
    np.testing.assert_array_equal(found.reshape(2, 6, 4), tokens[:, 1:])
    with pytest.raises(ValueError, match="7 tokens less 0 do not fill a grid of 2 x 2"):
        onnx_outputs.open_output("features").labels({"output": tokens}, where)


@pytest.mark.parametrize(
    ("format_", "numbers"),
    [("xyxy", [4, 8, 12, 24]), ("yxyx", [8, 4, 24, 12]), ("xywh", [4, 8, 8, 16]), ("cxcywh", [8, 16, 8, 16])],
)
def test_boxes(model, format_, numbers, tmp_path):
    rows = np.array([numbers, numbers, [0, 0, 2, 2], numbers], np.float32)[None]
    scores, classes = np.array([[0.8, 0.9, 0.2, 0.7]], np.float32), np.array([[1, 1, 1, 2]], np.int64)
    outputs = [value_info("b", [1, 4, 4]), value_info("s", [1, 4]), value_info("c", [1, 4], "int64")]
    path = model(
        [node("Identity", [name.upper()], [name]) for name in "bsc"],
        [value_info("x", [1, 3, 32, 32])],
        outputs,
        [constant("B", rows), constant("S", scores), constant("C", classes)],
    )
    (tmp_path / "names.txt").write_text("cat\nwine glass\n")
    output = {"kind": "boxes", "class_names": str(tmp_path / "names.txt"), "format": format_, "first_class": 1}
    names = {"boxes": "b", "scores": "s", "classes": "c"}
    found = labels.make("onnx", model=path, output=output, output_names=names).label(images(2))
    assert len(found) == 2 and found[0] == found[1]
    assert [(f["class_name"], round(f["score"], 3)) for f in found[0]] == [("cat", 0.9), ("wine glass", 0.7)]
    assert found[0][0]["boxes"] == [0.125, 0.25, 0.375, 0.75]
    boxed = labels.make("onnx", model=path, output=output, output_names=names, resize="letterbox").label(images(1))
    # 12 x 16 pixels lie in rows 4..28 of 32: y = (8 - 4) / 24.
    assert boxed[0][0]["boxes"] == [0.125, round(4 / 24, 6), 0.375, round(20 / 24, 6)]
    with pytest.raises(ValueError, match="class 2 has no name: 1 names start at 1"):
        labels.make("onnx", model=path, output=output | {"class_names": ["cat"]}, output_names=names).label(images(1))
    with pytest.raises(ValueError, match="to say which output is boxes, scores, classes.*outputs: b float"):
        labels.make("onnx", model=path, output=output)
    with pytest.raises(ValueError, match="there is no output 'q'"):
        labels.make("onnx", model=path, output=output, output_names=names | {"scores": "q"})
    with pytest.raises(ValueError, match=r"scores \[1, 4\] are not of single classes: name the output of classes"):
        labels.make("onnx", model=path, output=output, output_names={"boxes": "b", "scores": "s"}).label(images(1))


def test_scores_of_every_class():
    output = onnx_outputs.open_output({"kind": "boxes", "class_names": ["a", "b"], "unit": "relative"})
    where = onnx_outputs.Geometry((8, 8), (8, 8), pixels.Placed(0, 0, 8, 8), "NCHW")
    arrays = {"boxes": np.array([[[0, 0, 0.5, 1]]]), "scores": np.array([[[0.2, 0.6]]])}
    assert output.labels(arrays, where) == [[{"boxes": [0, 0, 0.5, 1], "class_name": "b", "score": 0.6}]]


# ---- errors


def test_errors_say_what_the_model_has(model, tmp_path):
    path = identity(model)
    has = r"net\.onnx: .*The model's inputs: x float \['N', 3, 'H', 'W'\]; outputs: y float \['N', 3, 'H', 'W'\]"
    for options in (
        dict(output="logits"),
        dict(output="depth", layout="NHWC"),
        dict(output="depth", output_names="z"),
        dict(output="depth", output_names={"depth": "y"}),
    ):
        with pytest.raises(ValueError, match=has):
            labels.make("onnx", model=path, **options)
    with pytest.raises(ValueError, match=r"has 3 channels, expected 1\. The model's inputs"):
        labels.make("onnx", model=path, output="depth").label(images())
    for shape, message_ in [
        (["N", 4, 8, 8], "has not 3 channels"),
        (["N", "C", "H", "W"], "give layout"),
        (["N", 3, "W"], "has 3 dimensions"),
        (["N", 3, 32, "W"], "leaves one edge open; give size"),
    ]:
        with pytest.raises(ValueError, match=message_):
            labels.make("onnx", model=identity(model, shape), output="features")
    two = model(
        [node("Add", ["x", "z"], ["y"])], [value_info("x", NCHW), value_info("z", NCHW)], [value_info("y", NCHW)]
    )
    with pytest.raises(ValueError, match="only models with one input"):
        labels.make("onnx", model=two, output="features")
    (tmp_path / "bad.onnx").write_bytes(b"no protocol buffer")
    with pytest.raises(ValueError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
        labels.make("onnx", model=tmp_path / "bad.onnx", output="depth")
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx: no such ONNX model"):
        labels.make("onnx", model=tmp_path / "absent.onnx", output="depth")


@pytest.mark.parametrize(
    ("output", "message_"),
    [
        ("dept", r"kind of output named 'dept'\. Did you mean 'depth'"),
        (
            {"kind": "depth", "inverse": True},
            "option of the output kind 'depth' named 'inverse'. Did you mean 'invert'",
        ),
        ({"kind": "depth", "invert": True}, "give a range too"),
        ({"kind": "depth", "range": (1, 1)}, "two different numbers"),
        ({"kind": "depth", "range": "image"}, "range is 'image'"),
        ({"kind": "normal", "signs": (1, 2, 1)}, "three of 1 and -1"),
        ({"kind": "semseg", "class_map": [300]}, r"ids in 0\.\.255"),
        ({"kind": "edges", "layout": "CHW"}, "it is NCHW or NHWC"),
        ("boxes", "boxes need class_names"),
        ({"kind": "boxes", "class_names": ["a"], "format": "xxyy"}, "format is 'xxyy'"),
    ],
)
def test_wrong_outputs_are_named(output, message_):
    with pytest.raises(ValueError, match=message_):
        onnx_outputs.open_output(output)
