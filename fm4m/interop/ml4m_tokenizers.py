"""Tokenizers as the reference implementation (and its users on Hugging Face) store them.

A safetensors file whose metadata holds the configuration, every value the text of a Python object, or a folder with
``model.safetensors`` and ``config.json``. Both are read strictly: every tensor that the configuration asks for, with
its shape, and none besides.

The files do not say what an image is of; that follows from the file's name or is given (`domain_of`). Numbers of heads
cannot be seen in weights, so encoders and decoders that are none of the released ones need their sizes (``presets``).
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fm4m.files import complete_folder
from fm4m.interop import ml4m_divae, tensor_file, tokenizer_config
from fm4m.interop.reference_config import FormatError, literal, read_json
from fm4m.positions import grid_positions
from fm4m.tokenizers import vqvae_model
from fm4m.tokenizers.config import DIFFUSION_DECODERS, VQConfig
from fm4m.tokenizers.preprocess import STANDARDISED
from fm4m.tokenizers.tokenizer import Tokenizer
from fm4m.tokenizers.vit import CONVNEXT_BLOCKS

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The reference's flag that a codebook has been filled; there is none in memcodes.
INITIALISED = "quantize._codebook.initted"
# How far a stored position may be from ours; the reference computes in float32.
_ROUNDING = 1e-4

Presets = Mapping[str, Mapping[str, Any]]


class _Tensor(NamedTuple):
    """One tensor of the reference: its key, our array's path, the layer of a stack, and how the axes are ordered."""

    key: str
    path: tuple[str, ...]
    layer: int | None = None
    order: str = "same"  # or "linear", "conv1" (1x1), "patch", "depthwise"

    def out(self, array: np.ndarray, config: VQConfig) -> np.ndarray:
        array = array if self.layer is None else array[self.layer]
        if self.order == "linear":
            return array.T
        if self.order == "conv1":
            return array.T[..., None, None]
        if self.order == "patch":
            return array.T.reshape(array.shape[1], config.in_channels, config.cell_size, config.cell_size)
        return array.transpose(3, 2, 0, 1) if self.order == "depthwise" else array

    def into(self, tensor: np.ndarray) -> np.ndarray:
        if self.order == "depthwise":
            return tensor.transpose(2, 3, 1, 0)
        return tensor if self.order == "same" else tensor.reshape(len(tensor), -1).T


# ---- layout


def _linear(key: str, path: tuple[str, ...], layer: int | None = None, order: str = "linear") -> Iterator[_Tensor]:
    yield _Tensor(f"{key}.weight", (*path, "kernel"), layer, order)
    yield _Tensor(f"{key}.bias", (*path, "bias"), layer)


def _norm(key: str, path: tuple[str, ...], layer: int | None = None) -> Iterator[_Tensor]:
    yield _Tensor(f"{key}.weight", (*path, "scale"), layer)
    yield _Tensor(f"{key}.bias", (*path, "bias"), layer)


def _transformer(side: str, depth: int, post_mlp: bool) -> Iterator[_Tensor]:
    path = ("params", side)
    for i in range(depth):
        key, block = f"{side}.blocks.{i}", (*path, "blocks")
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{key}.{norm}", (*block, norm), i)
        for group, names in (("attn", ("qkv", "proj")), ("mlp", ("fc1", "fc2"))):
            for name in names:
                yield from _linear(f"{key}.{group}.{name}", (*block, group, name), i)
    if post_mlp:
        yield from _norm(f"{side}.norm_mlp", (*path, "norm_mlp"))
        for name in ("fc1", "fc2"):
            yield from _linear(f"{side}.post_mlp.{name}", (*path, "post_mlp", name))


def _mlp(side: str, depth: int) -> Iterator[_Tensor]:
    path = ("params", side)
    for name in ("linear_in", "linear_out"):
        yield from _linear(f"{side}.{name}", (*path, name))
    for i in range(depth):
        yield from _norm(f"{side}.layernorms.{i}", (*path, "blocks", "norm"), i)
        for theirs, ours in (("0", "fc1"), ("2", "fc2")):
            yield from _linear(f"{side}.blocks.{i}.block.{theirs}", (*path, "blocks", ours), i)


def _decoder(config: VQConfig) -> Iterator[_Tensor]:
    if config.decoder == "mlp":
        yield from _mlp("decoder", config.decoder_depth)
        return
    yield from _transformer("decoder", config.decoder_depth, config.post_mlp)
    yield from _linear("decoder.out_proj", ("params", "decoder", "out_proj"))
    for i in range(CONVNEXT_BLOCKS if config.out_conv else 0):
        key, path = f"decoder.out_conv.{i}", ("params", "decoder", "out_conv", str(i))
        yield from _linear(f"{key}.dwconv", (*path, "dwconv"), order="depthwise")
        yield from _norm(f"{key}.norm", (*path, "norm"))
        for name in ("pwconv1", "pwconv2"):
            yield from _linear(f"{key}.{name}", (*path, name))
        yield _Tensor(f"{key}.gamma", (*path, "gamma"))


def _tensors(config: VQConfig) -> Iterator[_Tensor]:
    """All tensors but constants and those of a diffusion decoder."""
    if config.encoder == "mlp":
        yield from _mlp("encoder", config.encoder_depth)
    else:
        yield from _linear("encoder.proj", ("params", "encoder", "proj"), order="patch")
        yield from _transformer("encoder", config.encoder_depth, config.post_mlp)
    yield from _linear("quant_proj", ("params", "quant_proj"), order="conv1")
    if config.decoder not in DIFFUSION_DECODERS:
        yield from _linear("post_quant_proj", ("params", "post_quant_proj"), order="conv1")
        yield from _decoder(config)
    if config.domain == "semseg":
        yield _Tensor("cls_emb.weight", ("params", "cls_emb"))
    if config.quantizer == "memcodes":
        yield _Tensor("quantize.codes", ("params", "quantizer", "codes"))
        for name in ("to_k", "to_v"):
            yield _Tensor(f"quantize.{name}.weight", ("params", "quantizer", name))
    else:
        for name in ("embed", "cluster_size") + (("embed_avg",) if config.quantizer == "euclidean" else ()):
            yield _Tensor(f"quantize._codebook.{name}", ("codebook", name))


def _constants(config: VQConfig) -> dict[str, np.ndarray]:
    """Tensors that hold no parameters, by key: position tables f32 [1, D, h, w], and the codebook's flag."""
    found = {}
    for side, grid in (("encoder", config.encoder_grid), ("decoder", config.decoder_grid)):
        if getattr(config, side) == "vit":
            dim = getattr(config, f"{side}_dim")
            table = grid_positions(grid, dim).reshape(1, *grid, dim).transpose(0, 3, 1, 2)
            found[f"{side}.pos_emb"] = np.ascontiguousarray(table, np.float32)
    if config.quantizer != "memcodes":
        found[INITIALISED] = np.ones(1, np.float32)
    return found


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _abstract(config: VQConfig) -> dict[str, Any]:
    params, codebook = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0))
    return {"params": params, "codebook": codebook}


def shapes(config: VQConfig) -> dict[str, tuple[int, ...]]:
    """The keys of all tensors in the reference's naming, with their shapes."""
    found = {key: value.shape for key, value in _constants(config).items()}
    abstract = _abstract(config)
    for tensor in _tensors(config):
        blank = np.broadcast_to(np.float32(0), _leaf(abstract, tensor.path).shape)
        found[tensor.key] = tensor.out(blank, config).shape
    return found | (ml4m_divae.keys(config) if config.decoder in DIFFUSION_DECODERS else {})


# ---- reading


def to_tokenizer(config: VQConfig, tensors: Mapping[str, np.ndarray], where: str = "the file") -> Tokenizer:
    """A tokenizer from the reference's tensors.

    Args:
      config: what they belong to.
      tensors: f32 by key.
      where: for messages.

    Raises FormatError for a key that is missing, left over, of another shape, or a constant of another format.
    """
    wanted = shapes(config)
    twins = ml4m_divae.twins(config) if config.decoder in DIFFUSION_DECODERS else {}
    left_out = sorted(key for pair in twins.items() for key in pair if key not in tensors)
    if twins:
        tensors = ml4m_divae.with_twins(config, tensors)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for keys, problem in ((missing, "lacks {}, which its configuration asks for"),
                          (extra, "holds {}, which its configuration has no place for")):  # fmt: skip
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise FormatError(f"{where} {problem.format(keys[0] + more)}")
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise FormatError(f"{where}: {key} has shape {tensors[key].shape}; its configuration asks for {shape}")
        if not np.isfinite(tensors[key]).all():
            raise FormatError(f"{where}: {key} holds values that are not finite")

    constants = _constants(config)
    for key, ours in constants.items():
        if not np.allclose(tensors[key], ours, rtol=0, atol=_ROUNDING):
            what = "no sine-cosine table of this format"
            if key == INITIALISED:
                what = "0: its codebook waits for a k-means that never ran"
            raise FormatError(f"{where}: {key} is {what}")
    tree = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), _abstract(config))
    for tensor in _tensors(config):
        array = _leaf(tree, tensor.path)
        view = array if tensor.layer is None else array[tensor.layer]
        view[...] = tensor.into(tensors[tensor.key])
    if config.decoder in DIFFUSION_DECODERS:
        tree["params"]["decoder"] = ml4m_divae.to_params(config, dict(tensors))
        constants |= ml4m_divae.from_params(config, tree["params"]["decoder"])
    # Tables that differ from ours in their last bits; kept, so that what is written again is the same file.
    positions = {k: tensors[k] for k, ours in constants.items() if tensors[k].tobytes() != ours.tobytes()}
    stats = {}
    if config.domain in STANDARDISED:  # the reference takes features as they are
        stats = {"mean": np.zeros(config.channels), "std": np.ones(config.channels), "pca": np.eye(config.channels, 3)}
        stats = {name: value.astype(np.float32) for name, value in stats.items()}
    origin = {"positions": positions, "metadata": {}} | ({"left_out": left_out} if left_out else {})
    return Tokenizer(config, tree["params"], tree["codebook"], stats, origin)


def load(path: str | os.PathLike, domain: str | None = None, presets: Presets | None = None) -> Tokenizer:
    """Reads a tokenizer of the reference implementation.

    Args:
      path: a safetensors file with the configuration in its metadata or in a ``config.json`` beside it, or a folder
        that holds ``model.safetensors``.
      domain: what its images are of (`fm4m.tokenizers.config.DOMAINS`), if neither name nor configuration says.
      presets: sizes of encoders and decoders that are none of the released ones, by the name that the configuration
        calls them (see `tokenizer_config.parse`).

    Raises:
      FileNotFoundError: there is no such file.
      TensorFileError: the file is truncated or damaged.
      FormatError: keys are missing or left over, or the configuration is unknown; it names them.
    """
    path = pathlib.Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    with tensor_file.TensorFile(path) as file:
        values = file.metadata
        beside = path.with_name(CONFIG)
        if "enc_type" not in values and beside.is_file():
            values = read_json(beside)
        if "enc_type" not in values:
            raise FormatError(f"{path} holds no tokenizer configuration (enc_type, ...), nor does a {CONFIG} beside it")
        config = tokenizer_config.parse(values, str(path), file.shapes, domain or _named_domain(path), presets or {})
        tokenizer = to_tokenizer(config, {key: file.read(key) for key in file.shapes}, str(path))
    kept = {name: str(value) for name, value in values.items()}
    return Tokenizer(
        config, tokenizer.params, tokenizer.codebook, tokenizer.stats,
        {**tokenizer.origin, "metadata": kept, "config": config.to_json()},
    )  # fmt: skip


def _named_domain(path: pathlib.Path) -> str | None:
    name = path.absolute().parent.name if path.name == WEIGHTS else path.stem
    return tokenizer_config.domain_of(name)


# ---- writing


def from_tokenizer(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """All tensors of a tokenizer in the reference's naming, f32. Inverse of `to_tokenizer`."""
    config = tokenizer.config
    tree = {"params": tokenizer.params, "codebook": tokenizer.codebook}
    found = _constants(config)
    for tensor in _tensors(config):
        array = tensor.out(np.asarray(_leaf(tree, tensor.path), np.float32), config)
        found[tensor.key] = np.ascontiguousarray(array)
    if config.decoder in DIFFUSION_DECODERS:
        found |= ml4m_divae.from_params(config, tokenizer.params["decoder"])
    kept = (tokenizer.origin or {}).get("positions", {})
    return found | {k: np.asarray(v, np.float32) for k, v in kept.items() if k in found and v.shape == found[k].shape}


def save(path: str | os.PathLike, tokenizer: Tokenizer, presets: Presets | None = None) -> None:
    """Writes a tokenizer as the reference implementation stores it.

    Args:
      path: a name that ends in ``.safetensors`` for one file with the configuration in its metadata; else a folder (new
        or empty) for ``model.safetensors`` and ``config.json``.
      tokenizer: what to write. If it was imported and has the same shape still, its configuration is written as it was.
      presets: names of encoders and decoders by their sizes, for those that are none of the released ones.

    Raises:
      FormatError: the reference has no place for it: FSQ, standardised features, an image that is not square, ...
      FileExistsError: the folder holds something.
    """
    path, config = pathlib.Path(path), tokenizer.config
    origin = tokenizer.origin or {}
    left_out = origin.get("left_out", [])
    if origin.get("config") and tokenizer_config.same_shape(config, VQConfig.from_json(origin["config"])):
        metadata = dict(origin["metadata"])
    else:
        values = tokenizer_config.from_config(config, presets or {})
        metadata = {name: str(value) for name, value in values.items()}
        if path.suffix != ".safetensors" and config.decoder in DIFFUSION_DECODERS:
            # The hub's folders hold every tensor once, and its other names in the metadata.
            left_out = ml4m_divae.twins(config)
            metadata |= left_out
    stats = tokenizer.stats
    if stats and (np.any(np.asarray(stats["mean"]) != 0) or np.any(np.asarray(stats["std"]) != 1)):
        raise FormatError(
            f"tokenizer {config.name!r} standardises its input, which the reference implementation's cannot say; fold "
            "mean and std into the first and last layer, or train it on standardised features with stats of 0 and 1"
        )
    tensors = {key: value for key, value in sorted(from_tokenizer(tokenizer).items()) if key not in left_out}
    sizes = {key: value.shape for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        tensor_file.write(path, sizes, tensors.__getitem__, metadata)
        return
    with complete_folder(path) as beside:
        tensor_file.write(beside / WEIGHTS, sizes, tensors.__getitem__, {"format": "pt"} | metadata)
        fields = {k: v for k, v in metadata.items() if k != "format" and "." not in k}
        typed = {k: literal(v, k, str(path)) for k, v in fields.items()}
        (beside / CONFIG).write_text(json.dumps(typed, indent=2) + "\n")
