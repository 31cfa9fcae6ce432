"""One safetensors file per tokenizer: weights, codebook, statistics, and the configuration as JSON in the metadata.

Tensor names are paths of the nested dicts joined by dots ("params.encoder.proj.kernel", "codebook.embed",
"stats.mean"). Loading reads numbers and JSON only; nothing is executed.
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.files import complete_file
from fm4m.tokenizers import preprocess, vqvae_model
from fm4m.tokenizers.config import VQConfig
from fm4m.tokenizers.tokenizer import Tokenizer

FORMAT = "fm4m-vq-tokenizer-1"
_STORED_DTYPES = ("float16", "float32")


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
    if config.domain == "features":
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
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    with complete_file(path) as beside:
        # As bytes rather than by `save_file`, which makes files that only their owner may read.
        beside.write_bytes(to_bytes(tensors, metadata={"format": FORMAT, "config": tokenizer.config.to_json()}))


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer written by `save`; weights become float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a tokenizer file, truncated, unknown configuration key, or a tensor that is missing, extra or of
        the wrong shape or dtype; the message names file and tensor.
    """
    from safetensors import SafetensorError, safe_open

    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}; configs/tokenizers/rooms.py says how to train one")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy or train it again") from None
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but not a tokenizer of fm4m: its metadata says format = "
            f"{metadata.get('format')!r}, expected {FORMAT!r} with a 'config' entry"
        )
    try:
        config = VQConfig.from_json(metadata["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None

    shapes = expected_shapes(config)
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
    tree = _unflatten({name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    params = jax.tree.map(jnp.asarray, tree["params"])
    codebook = {name: jnp.asarray(leaf) for name, leaf in tree["codebook"].items()}
    return Tokenizer(config, params, codebook, tree.get("stats"))
