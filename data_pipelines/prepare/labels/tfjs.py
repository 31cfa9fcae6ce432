"""Reads a TensorFlow.js graph model (model.json and binary shards) and runs it as a JAX function.

Covers the operations of convolutional networks whose batch normalisation is folded: 15 kinds, in NHWC. Anything else is
an error that names the node. Reading parses JSON and copies numbers; nothing of the file is executed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DTYPES = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "uint8": np.uint8, "uint16": np.uint16}
Params = Mapping[str, jax.Array]


class Graph:
    """A graph model.

    Attributes:
      params: name to array of the constants; float ones are what `function` takes.
      inputs: names of the placeholders and their shapes, -1 where free.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the model.

        Args:
          path: the .json file; its shards lie beside it.

        Raises:
          FileNotFoundError: the file or a shard is not there.
          ValueError: not a graph model, or a shard that is shorter or longer than the file says.
        """
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such TensorFlow.js model")
        try:
            data = json.loads(self.path.read_text("utf-8"))
            self._nodes = {node["name"]: node for node in data["modelTopology"]["node"]}
            groups = data["weightsManifest"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a TensorFlow.js graph model: {error!r}") from error
        self.params: dict[str, np.ndarray] = {}
        for group in groups:
            self._read_group(group)
        self.inputs = {name: _shape(node) for name, node in self._nodes.items() if node["op"] == "Placeholder"}

    def _read_group(self, group: Mapping[str, Any]) -> None:
        shards = []
        for name in group["paths"]:
            shard = self.path.parent / name
            if pathlib.PurePath(name).name != name or not shard.is_file():
                raise FileNotFoundError(f"{self.path}: the shard {name!r} is not beside it")
            shards.append(shard.read_bytes())
        raw, offset = b"".join(shards), 0
        for weight in group["weights"]:
            name, quantization = weight["name"], weight.get("quantization") or {}
            stored = quantization.get("dtype", weight["dtype"])
            if stored not in _DTYPES:
                raise ValueError(f"{self.path}: weight {name} is stored as {stored}; known: {', '.join(_DTYPES)}")
            count, dtype = math.prod(weight["shape"]), np.dtype(_DTYPES[stored])
            if offset + count * dtype.itemsize > len(raw):
                raise ValueError(f"{self.path}: the shards end within weight {name}; download them again")
            values = np.frombuffer(raw, dtype, count, offset).reshape(weight["shape"])
            offset += values.nbytes
            if quantization:
                scale, least = quantization.get("scale", 1.0), quantization.get("min", 0.0)
                values = values.astype(np.float32) * np.float32(scale) + np.float32(least)
            self.params[name] = values
        if offset != len(raw):
            raise ValueError(f"{self.path}: {len(raw) - offset} bytes of {group['paths']} belong to no weight")

    def function(self, outputs: Sequence[str]) -> tuple[dict[str, np.ndarray], Callable[..., list[jax.Array]]]:
        """The part of the graph that some outputs need.

        Args:
          outputs: names of nodes.

        Returns:
          (float constants of that part, function of such a mapping and of a mapping from placeholder to array that
          gives the outputs in their order; it can be jitted.)

        Raises:
          ValueError: an output or an input of a node is not in the graph, or an operation is not known.
        """
        order = self._order(outputs)
        for name in order:
            if self._nodes[name]["op"] not in _OPS:
                raise ValueError(
                    f"{self.path}: node {name} is of the kind {self._nodes[name]['op']!r}; "
                    f"known kinds are {', '.join(sorted(_OPS))}"
                )
        constants = {name for name in order if self._nodes[name]["op"] == "Const"}
        lacking = sorted(constants - self.params.keys())
        if lacking:
            raise ValueError(f"{self.path}: no weights for the constants {lacking[:3]}")
        floats = {name: self.params[name] for name in constants if self.params[name].dtype == np.float32}

        def run(params: Params, feeds: Mapping[str, jax.Array]) -> list[jax.Array]:
            # Integer constants are shapes and axes: they stay NumPy arrays, known while the function is traced.
            values: dict[str, Any] = {name: self.params[name] for name in constants} | dict(params) | dict(feeds)
            for name in order:
                if name not in values:
                    node = self._nodes[name]
                    arguments = [values[source] for source in _sources(node)]
                    try:
                        values[name] = _OPS[node["op"]](_Attributes(node), *arguments)
                    except (TypeError, ValueError, KeyError) as error:
                        raise ValueError(f"{self.path}: node {name} ({node['op']}): {error}") from error
            return [values[name] for name in outputs]

        return floats, run

    def _order(self, outputs: Sequence[str]) -> list[str]:
        """Nodes that the outputs need, every one after its inputs."""
        order: list[str] = []
        state: dict[str, bool] = {}
        stack = [(name, "the outputs") for name in reversed(outputs)]
        while stack:
            name, asked_by = stack[-1]
            if name not in self._nodes:
                known = ", ".join(list(self._nodes)[-3:])
                raise ValueError(f"{self.path}: no node {name!r}, asked for by {asked_by}; its last nodes are {known}")
            waiting = [] if name in state else [s for s in _sources(self._nodes[name]) if not state.get(s)]
            if any(source in state for source in waiting):
                raise ValueError(f"{self.path}: node {name} is part of a loop")
            if waiting:
                state[name] = False
                stack += [(source, name) for source in waiting]
                continue
            stack.pop()
            if not state.get(name):
                state[name] = True
                order.append(name)
        return order


def _sources(node: Mapping[str, Any]) -> list[str]:
    # "name:0" is the first result of a node, and all known kinds have one; "^name" orders without handing data over.
    names = [name for name in node.get("input", []) if not name.startswith("^")]
    return [name.removesuffix(":0") for name in names]


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(d["size"]) for d in node.get("attr", {}).get("shape", {}).get("shape", {}).get("dim", []))


class _Attributes:
    """Attributes of a node; text in them is base64."""

    def __init__(self, node: Mapping[str, Any]):
        self._attributes = node.get("attr", {})

    def text(self, name: str) -> str:
        return base64.b64decode(self._attributes[name]["s"]).decode()

    def texts(self, name: str) -> list[str]:
        return [base64.b64decode(s).decode() for s in self._attributes.get(name, {}).get("list", {}).get("s", [])]

    def flag(self, name: str) -> bool:
        return bool(self._attributes.get(name, {}).get("b", False))

    def spatial(self, name: str) -> tuple[int, int]:
        """(rows, columns) of a list for N, H, W, C."""
        numbers = [int(i) for i in self._attributes.get(name, {}).get("list", {}).get("i", [1, 1, 1, 1])]
        if numbers[0] != 1 or numbers[3] != 1:
            raise ValueError(f"{name} {numbers} reach over pictures or channels")
        return numbers[1], numbers[2]


def _conv(attributes: _Attributes, x: jax.Array, kernel: jax.Array, *rest: jax.Array) -> jax.Array:
    _expect_nhwc(attributes)
    y = lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        attributes.spatial("strides"),
        attributes.text("padding"),
        rhs_dilation=attributes.spatial("dilations"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        # Labels are compared across machines; the default would be bfloat16 on TPU and TF32 on GPU.
        precision=lax.Precision.HIGHEST,
    )
    return _fused(attributes, y, rest)


def _depthwise(attributes: _Attributes, x: jax.Array, kernel: jax.Array, *rest: jax.Array) -> jax.Array:
    """As a sum over the kernel's positions, which XLA fuses: 8 times faster on CPU than a grouped convolution."""
    _expect_nhwc(attributes)
    (rows, columns), edges = attributes.spatial("strides"), kernel.shape[:2]
    if kernel.shape[3] != 1 or attributes.spatial("dilations") != (1, 1):
        raise ValueError(f"depthwise kernels {kernel.shape} with several outputs a channel or dilation are not known")
    padding = lax.padtype_to_pads(x.shape[1:3], edges, (rows, columns), attributes.text("padding"))
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    height, width = ((n - edge) // stride + 1 for n, edge, stride in zip(x.shape[1:3], edges, (rows, columns)))
    y = 0.0
    for i in range(edges[0]):
        for j in range(edges[1]):
            part = x[:, i : i + (height - 1) * rows + 1 : rows, j : j + (width - 1) * columns + 1 : columns]
            y = y + part * kernel[i, j, :, 0]
    return _fused(attributes, y, rest)


def _expect_nhwc(attributes: _Attributes) -> None:
    if (layout := attributes.text("data_format")) != "NHWC":
        raise ValueError(f"the layout {layout} is not known, only NHWC")


def _fused(attributes: _Attributes, y: jax.Array, rest: Sequence[jax.Array]) -> jax.Array:
    steps = {"BiasAdd": lambda y: y + rest[0], "Relu": jax.nn.relu, "Relu6": jax.nn.relu6}
    for step in attributes.texts("fused_ops"):
        if step not in steps:
            raise ValueError(f"the fused step {step!r} is not known, only {', '.join(steps)}")
        y = steps[step](y)
    return y


def _resize(attributes: _Attributes, x: jax.Array, size: np.ndarray) -> jax.Array:
    """Bilinear; pixel i of the result lies at i * (n_in / n_out), or at pixel centres if the node says so."""
    if attributes.flag("align_corners"):
        raise ValueError("align_corners is not known")
    shift = 0.5 if attributes.flag("half_pixel_centers") else 0.0
    for axis, equation in ((1, "oi,bihc->bohc"), (2, "oi,bhic->bhoc")):
        inputs, count = x.shape[axis], int(size[axis - 1])
        at = np.clip((np.arange(count) + shift) * inputs / count - shift, 0, inputs - 1)
        low = np.floor(at).astype(int)
        matrix = np.zeros((count, inputs), np.float32)
        matrix[np.arange(count), low] += (1 - (at - low)).astype(np.float32)
        matrix[np.arange(count), np.minimum(low + 1, inputs - 1)] += (at - low).astype(np.float32)
        x = jnp.einsum(equation, matrix, x, precision=lax.Precision.HIGHEST)
    return x


def _placeholder(attributes: _Attributes) -> jax.Array:
    raise ValueError("no value was given for this placeholder")


_OPS: dict[str, Callable[..., jax.Array]] = {
    "Const": lambda a: None,
    "Placeholder": _placeholder,
    "Identity": lambda a, x: x,
    "Add": lambda a, x, y: x + y,
    "AddV2": lambda a, x, y: x + y,
    "Mul": lambda a, x, y: x * y,
    "Relu": lambda a, x: jax.nn.relu(x),
    "Relu6": lambda a, x: jax.nn.relu6(x),
    "Sigmoid": lambda a, x: jax.nn.sigmoid(x),
    "Mean": lambda a, x, axes: x.mean(tuple(np.ravel(axes).tolist()), keepdims=a.flag("keep_dims")),
    "ConcatV2": lambda a, *x: jnp.concatenate(x[:-1], axis=int(x[-1])),
    "ResizeBilinear": _resize,
    "Conv2D": _conv,
    "_FusedConv2D": _conv,
    "DepthwiseConv2dNative": _depthwise,
    "FusedDepthwiseConv2dNative": _depthwise,
}
