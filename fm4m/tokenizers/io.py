"""One safetensors file per tokenizer: weights, codebook, statistics, and the configuration as JSON in the metadata.

Tensor names are paths of the nested dicts joined by dots ("params.encoder.proj.kernel", "codebook.embed",
"stats.mean"). Tokenizers that come from the reference implementation keep its configuration ("origin" in the metadata)
and its position tables ("origin.encoder.pos_emb"). Loading reads numbers and JSON only; nothing is executed.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.files import complete_file
from fm4m.tokenizers import preprocess, vqvae_model
from fm4m.tokenizers.config import VQConfig
from fm4m.tokenizers.tokenizer import Tokenizer

FORMAT = "fm4m-vq-tokenizer-1"
_STORED_DTYPES = ("float16", "float32")
_ORIGIN = "origin."


def _flatten(tree, prefix: str) -> dict:
    """{"a": {"b": x}} -> {"prefix.a.b": x}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flatten(value, f"{prefix}.{key}").items()}


def _unflatten(flat: dict) -> dict:
    tree: dict = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def expected_shapes(config: VQConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name a tokenizer file of this configuration must hold, with its shape."""
    params, codebook = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0))
    leaves = _flatten(params, "params") | _flatten(codebook, "codebook")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    if config.domain in preprocess.STANDARDISED:
        shapes |= {f"stats.{name}": (config.channels, *tail) for name, tail in preprocess.STATS_SHAPES.items()}
    return shapes


def save(path: str | os.PathLike, tokenizer: Tokenizer, dtype: str = "float32") -> None:
    """Writes a tokenizer; the file appears under its name only when complete (written beside, then renamed).

    Args:
      path: target, usually `<domain>.safetensors`; its folder is made.
      tokenizer: what to write.
      dtype: "float32" or "float16", the type of the network's weights in the file (always computed in float32).
        Codebook and statistics stay float32: rounding them would move codes.

    Raises:
      ValueError: another dtype, or a weight that float16 cannot hold.
    """
    from safetensors.numpy import save as to_bytes

    if dtype not in _STORED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_STORED_DTYPES)}, got {dtype!r}")
    path = pathlib.Path(path)
    tensors = {k: np.asarray(v, np.float32) for k, v in _flatten(tokenizer.params, "params").items()}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):  # found and named in the next line
            tensors[name] = tensor.astype(dtype)
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{path}: tensor {name!r} is not finite as {dtype}")
    for prefix, tree in (("codebook", tokenizer.codebook), ("stats", tokenizer.stats)):
        tensors |= {f"{prefix}.{k}": np.asarray(v, np.float32) for k, v in tree.items()}
    metadata = {"format": FORMAT, "config": tokenizer.config.to_json()}
    if tokenizer.origin:
        origin = dict(tokenizer.origin)
        tensors |= {f"{_ORIGIN}{k}": np.asarray(v, np.float32) for k, v in origin.pop("positions", {}).items()}
        metadata["origin"] = json.dumps(origin)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    with complete_file(path) as beside:
        # As bytes rather than by `save_file`, which makes files that only their owner may read.
        beside.write_bytes(_sorted_metadata(to_bytes(tensors, metadata=metadata)))


def _sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in an order that differs from call to call,
    and equal tokenizers should be equal files."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def load(
    path: str | os.PathLike, domain: str | None = None, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Tokenizer:
    """Reads a tokenizer written by `save`, or one of the reference implementation; weights become float32.

    Args:
      path: the file, or a folder of the reference implementation's.
      domain, presets: for the reference implementation's only, see `fm4m.interop.ml4m_tokenizers.load`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a tokenizer file, truncated, unknown configuration key, or a tensor that is missing, extra or of
        the wrong shape or dtype; the message names file and tensor.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        from fm4m.interop import ml4m_tokenizers

        return ml4m_tokenizers.load(path, domain, presets)
    metadata, tensors = _read(path)
    if metadata.get("format") != FORMAT or "config" not in metadata:
        if "enc_type" in metadata or path.with_name("config.json").is_file():
            from fm4m.interop import ml4m_tokenizers

            return ml4m_tokenizers.load(path, domain, presets)
        raise ValueError(
            f"{path} is a safetensors file but not a tokenizer of fm4m: its metadata says format = "
            f"{metadata.get('format')!r}, expected {FORMAT!r} with a 'config' entry"
        )
    try:
        config = VQConfig.from_json(metadata["config"])
        origin = json.loads(metadata["origin"]) if "origin" in metadata else None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if domain not in (None, config.domain):
        raise ValueError(f"{path} is a tokenizer of domain {config.domain!r}, not {domain!r}")

    positions = {name.removeprefix(_ORIGIN): tensors.pop(name) for name in list(tensors) if name.startswith(_ORIGIN)}
    if positions and origin is None:
        raise ValueError(f"{path} holds {_ORIGIN}{min(positions)}, but its metadata says nothing of an origin")
    _check(path, tensors, expected_shapes(config))
    tree = _unflatten({name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    params = jax.tree.map(jnp.asarray, tree["params"])
    codebook = {name: jnp.asarray(leaf) for name, leaf in tree.get("codebook", {}).items()}
    origin = origin if origin is None else origin | {"positions": positions}
    return Tokenizer(config, params, codebook, tree.get("stats"), origin)


def _read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}; configs/tokenizers/rooms.py says how to train one")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            # The reference implementation's may hold types that numpy has not; their reader is another.
            ours = metadata.get("format") == FORMAT
            return metadata, {name: file.get_tensor(name) for name in list(file.keys())} if ours else {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy or train it again") from None


def _check(path: pathlib.Path, tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(f"{path} does not fit its own configuration: missing {missing}, unexpected {extra}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or tensor.dtype.name not in _STORED_DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} is {tensor.dtype.name} {list(tensor.shape)}, expected float32 or float16 "
                f"{list(shapes[name])}"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name!r} holds values that are not finite")
