"""A diffusion decoder's parameters as the reference implementation's tensors "decoder.*", in both directions.

PyTorch's convolutions are (out, in, height, width) and its matrices (out, in); ours are (height, width, in, out) and
(in, out). Blocks of the UViT's transformer are numbered there and stacked along the first axis here. The noise schedule
has no tensors: it follows from the configuration.

The UViT's convolutional levels have the names of the diffusers library (0.20), whose blocks the reference builds on.
Its downsampling before the transformer is one layer under two names (`twins`): a state dict holds both, a file of the
Hugging Face hub the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fm4m.interop.reference_config import FormatError
from fm4m.positions import grid_positions
from fm4m.tokenizers import divae_model, unet, uvit
from fm4m.tokenizers.diffusion_config import UNetConfig, UViTConfig

PREFIX = "decoder."
# How far a stored position table may be from ours: the reference computes it in float32.
POSITION_ROUNDING = 1e-4


# How the axes of a tensor are ordered: ours to the reference's, and back.
_ORDERS = {
    "same": (lambda x: x, lambda x: x),
    "linear": (np.transpose, np.transpose),
    "conv": (lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)),
    # A linear layer stored as a convolution of size 1 along one axis.
    "conv1": (lambda x: x.T[..., None], lambda x: x[..., 0].T),
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the reference: its key, our array's path, the layer of a stack, and how the axes are ordered."""

    key: str
    path: tuple[str, ...]
    layer: int | None = None
    order: str = "same"  # or a key of _ORDERS

    def out(self, array: np.ndarray) -> np.ndarray:
        """Our array as the reference's tensor."""
        array = array if self.layer is None else array[self.layer]
        return _ORDERS[self.order][0](array)

    def into(self, tensor: np.ndarray) -> np.ndarray:
        """The reference's tensor as our array (one layer of it)."""
        return _ORDERS[self.order][1](tensor)


def _linear(key: str, path: tuple[str, ...], order: str = "linear", layer: int | None = None) -> Iterator[_Tensor]:
    yield _Tensor(f"{key}.weight", (*path, "kernel"), layer, order)
    yield _Tensor(f"{key}.bias", (*path, "bias"), layer)


def _norm(key: str, path: tuple[str, ...], layer: int | None = None) -> Iterator[_Tensor]:
    yield _Tensor(f"{key}.weight", (*path, "scale"), layer)
    yield _Tensor(f"{key}.bias", (*path, "bias"), layer)


# ---- UNet

_UNET_RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "shortcut": "skip_connection",
}  # fmt: skip
_DIFFUSERS_RESIDUAL = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip


def _residual(key: str, path: tuple[str, ...], names: dict[str, str], shortcut: bool) -> Iterator[_Tensor]:
    for ours, theirs in names.items():
        if ours == "shortcut" and not shortcut:
            continue
        if ours.startswith("norm"):
            yield from _norm(f"{key}.{theirs}", (*path, ours))
        else:
            yield from _linear(f"{key}.{theirs}", (*path, ours), "linear" if ours == "time" else "conv")


def _attention(key: str, path: tuple[str, ...]) -> Iterator[_Tensor]:
    yield from _norm(f"{key}.norm", (*path, "norm"))
    yield from _linear(f"{key}.qkv", (*path, "qkv"), "conv1")
    yield from _linear(f"{key}.proj_out", (*path, "proj"), "conv1")


def _unet_tensors(config: UNetConfig) -> Iterator[_Tensor]:
    inputs, outputs, _ = unet.plan(config, cell_channels=0)
    yield from _linear("time_embed.0", ("time", "fc1"))
    yield from _linear("time_embed.2", ("time", "fc2"))
    for side, blocks in (("input", inputs), ("output", outputs)):
        for i, block in enumerate(blocks):
            key, path = f"{side}_blocks.{i}", (side, str(i))
            if block.kind == "conv":
                yield from _linear(f"{key}.0", (*path, "conv"), "conv")
            elif block.kind == "down":
                yield from _linear(f"{key}.0.op", (*path, "down"), "conv")
            else:
                yield from _residual(f"{key}.0", (*path, "res"), _UNET_RESIDUAL, block.fan_in != block.fan_out)
                if block.attention:
                    yield from _attention(f"{key}.1", (*path, "attn"))
                if block.up:
                    yield from _linear(f"{key}.{1 + block.attention}.conv", (*path, "up"), "conv")
    yield from _residual("middle_block.0", ("middle", "res1"), _UNET_RESIDUAL, False)
    yield from _attention("middle_block.1", ("middle", "attn"))
    yield from _residual("middle_block.2", ("middle", "res2"), _UNET_RESIDUAL, False)
    yield from _norm("out.0", ("norm",))
    yield from _linear("out.2", ("out",), "conv")


# ---- UViT

# Our name of a transformer part -> the reference's.
_TRANSFORMER = {"proj_in": "mid_proj_in", "proj_out": "mid_proj_out", "cond": "mid_cond_proj"}
_BLOCK = {
    "norm1": "norm1", "norm_cross": "query_norm", "norm_context": "context_norm", "norm2": "norm2",
    "qkv": "attn.qkv", "proj": "attn.proj", "cross_q": "cross_attn.q", "cross_kv": "cross_attn.kv",
    "cross_proj": "cross_attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "modulation": "adaLN_modulation",
    "gate": "adaLN_gate", "skip": "skip_linear",
}  # fmt: skip
# Self-attention is called otherwise where there is cross-attention beside it.
_CROSS_BLOCK = _BLOCK | {"qkv": "self_attn.qkv", "proj": "self_attn.proj"}
_POSITIONS = "mid_block.mid_pos_emb"
# Names of the downsampling before the transformer.
_DOWNSAMPLING = ("downsample_mid.Conv2d_0", "downsample_mid.conv")


def _uvit_tensors(config: UViTConfig, abstract: Any) -> Iterator[_Tensor]:
    yield from _linear("conv_in", ("conv_in",), "conv")
    for ours, theirs in (("time", "time_embedding"), ("height", "height_embedding"), ("width", "width_embedding")):
        if ours in abstract:
            yield from _linear(f"{theirs}.linear_1", (ours, "fc1"))
            yield from _linear(f"{theirs}.linear_2", (ours, "fc2"))
    for side, change, name in (("down", "down", "downsamplers"), ("up", "up", "upsamplers")):
        for level, block in sorted(abstract[side].items()):
            key, path = f"{side}_blocks.{level}", (side, level)
            for i, res in sorted(block["res"].items()):
                yield from _residual(f"{key}.resnets.{i}", (*path, "res", i), _DIFFUSERS_RESIDUAL, "shortcut" in res)
            if change in block:
                yield from _linear(f"{key}.{name}.0.conv", (*path, change), "conv")
    if config.extra_downsample:
        for name in _DOWNSAMPLING:
            yield from _linear(name, ("extra_down",), "conv")
        yield from _linear("upsample_mid.conv", ("extra_up",), "conv")
    for ours, theirs in _TRANSFORMER.items():
        if ours in abstract["mid"]:
            yield from _linear(f"mid_block.{theirs}", ("mid", ours))
    if "mask_token" in abstract["mid"]:
        yield _Tensor("mid_block.mask_token", ("mid", "mask_token"))
    names, number = _CROSS_BLOCK if config.conditioning == "xattn" else _BLOCK, 0
    for stack, depth in uvit.stacks(config).items():
        for layer in range(depth):
            for part in abstract["mid"][stack]:
                key, path = f"mid_block.mid_block.{number}.{names[part]}", ("mid", stack, part)
                yield from (_norm(key, path, layer) if "norm" in part else _linear(key, path, layer=layer))
            number += 1
    yield from _norm("conv_norm_out", ("norm",))
    yield from _linear("conv_out", ("out",), "same")


def _position_table(config: UViTConfig) -> np.ndarray:
    """The UViT's constant position table, f32 [1, dim, rows, columns]."""
    grid = (config.position_grid,) * 2
    table = grid_positions(grid, config.dim).T.reshape(1, config.dim, *grid)
    return np.ascontiguousarray(table, np.float32)


# ---- both


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _layout(config: Any) -> tuple[Any, list[_Tensor], dict[str, np.ndarray]]:
    """Our parameters' shapes, the reference's tensors, and its constants by key (without "decoder.")."""
    abstract = jax.eval_shape(lambda key: divae_model.init_decoder(config, key), jax.random.key(0))
    network = config.diffusion.network
    if isinstance(network, UNetConfig):
        return abstract, list(_unet_tensors(network)), {}
    constants = {_POSITIONS: _position_table(network)}
    return abstract, list(_uvit_tensors(network, abstract)), constants


def keys(config: Any) -> dict[str, tuple[int, ...]]:
    """The keys of a diffusion decoder's tensors in the reference's naming, with their shapes."""
    abstract, tensors, constants = _layout(config)
    shapes = {PREFIX + key: value.shape for key, value in constants.items()}
    for tensor in tensors:
        blank = np.broadcast_to(np.float32(0), _leaf(abstract, tensor.path).shape)
        shapes[PREFIX + tensor.key] = tensor.out(blank).shape
    return shapes


def twins(config: Any) -> dict[str, str]:
    """Keys of tensors that a state dict holds a second time, with those under which they are kept by the hub."""
    network = config.diffusion.network
    if not getattr(network, "extra_downsample", False):
        return {}
    first, second = (PREFIX + name for name in _DOWNSAMPLING)
    return {f"{second}.{part}": f"{first}.{part}" for part in ("weight", "bias")}


def with_twins(config: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under both of their names, where a file has one of the two.

    Raises FormatError if a file has both, and they differ.
    """
    found = dict(tensors)
    for pair in twins(config).items():
        present = [key for key in pair if key in tensors]
        if len(present) == 2 and not np.array_equal(*(tensors[key] for key in pair)):
            raise FormatError(f"{pair[0]} and {pair[1]} are one tensor of the diffusion decoder, but differ")
        for key in pair if present else ():
            found[key] = tensors[present[0]]
    return found


def to_params(config: Any, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Reads the diffusion decoder of a reference tokenizer.

    Args:
      config: tokenizer configuration with `diffusion` set.
      tensors: by key; those outside of "decoder." are none of this function's business and are left alone. One name of
        `twins` is enough.

    Returns:
      The "decoder" part of our parameters, f32 numpy arrays.

    Raises:
      FormatError: a key is missing or left over, has another shape, or is a constant of another format; it names it.
    """
    have = {key: np.asarray(value) for key, value in tensors.items() if key.startswith(PREFIX)}
    have = with_twins(config, have)
    wanted, kind = keys(config), config.diffusion.kind
    for key in wanted:
        if key not in have:
            raise FormatError(f"the diffusion decoder lacks {key}, which its configuration (a {kind}) asks for")
    extra = sorted(set(have) - set(wanted))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise FormatError(f"{extra[0]}{more} of the diffusion decoder has no place in its configuration (a {kind})")
    for key, shape in wanted.items():
        if have[key].shape != shape:
            raise FormatError(f"{key} has shape {have[key].shape}, but this configuration's is {shape}")
    abstract, layout, constants = _layout(config)
    for key, value in constants.items():
        if not np.allclose(have[PREFIX + key], value, rtol=0, atol=POSITION_ROUNDING):
            raise FormatError(f"{PREFIX}{key} is not the sine-cosine table of its format and cannot be represented")
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    for tensor in layout:
        array = _leaf(params, tensor.path)
        view = array if tensor.layer is None else array[tensor.layer]
        view[...] = tensor.into(have[PREFIX + tensor.key])
    return params


def from_params(config: Any, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `to_params`: the tensors "decoder.*" of the "decoder" part of our parameters, f32 and contiguous.

    Raises ValueError naming the parameter if one is missing or has another shape than the configuration's.
    """
    abstract, layout, constants = _layout(config)
    path_of = lambda path: ".".join(str(p.key) for p in path)  # noqa: E731
    shapes = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    given = {path_of(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(set(shapes) | set(given)):
        if shapes.get(name) != given.get(name):
            raise ValueError(
                f"the diffusion decoder's parameter {name} has shape {given.get(name, 'none (it is missing)')}; the "
                f"configuration's has {shapes.get(name, 'none (it has no such parameter)')}"
            )
    out = {PREFIX + key: value for key, value in constants.items()}
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    for tensor in layout:
        out[PREFIX + tensor.key] = np.ascontiguousarray(tensor.out(_leaf(arrays, tensor.path)))
    return out
