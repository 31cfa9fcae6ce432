"""Inference as `jax.export` artefacts: a folder that runs from plain JAX, without fm4m.

A folder holds ``params.safetensors`` (flat names), two functions as serialised StableHLO, and ``signature.json``, which
says what goes in and out:

* ``encode``: (params, inputs) -> hidden states of the encoder [batch, tokens, width], and which of them are valid.
* ``predict``: (params, inputs) -> for every target the codes [batch, tokens]; grids in one parallel step, sequences
  greedily from left to right (`fm4m.generate`).

``inputs`` is a dict: for a discrete modality ``NAME`` int32 codes [batch, max_tokens], clipped to its vocabulary (and,
for a sequence, its ``NAME/length`` int32 [batch]), for pixels uint8 [batch, height, width, 3], for an embedding float16
[batch, max_tokens, width] with its length. The batch size is free. To run one::

    from jax import export
    from safetensors.numpy import load_file
    predict = export.deserialize(open("predict.jax_export", "rb").read())
    codes = predict.call(load_file("params.safetensors"), {"rgb@224": images})
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m import generate, model
from fm4m.batch import RawBatch
from fm4m.files import complete_folder
from fm4m.interop import tensor_file
from fm4m.modalities import ModalitySet
from fm4m.optim import path_name

if TYPE_CHECKING:
    from fm4m.loading import LoadedModel

PLATFORMS = ("cpu", "cuda", "tpu")
FUNCTIONS = ("encode", "predict")
SUFFIX = ".jax_export"


def input_specs(modalities: ModalitySet, inputs: Sequence[str], batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the artefact's ``inputs`` for a batch size (a number or a symbol)."""
    specs = {}
    for name in inputs:
        m = modalities[name]
        if m.discrete:
            specs[name] = jax.ShapeDtypeStruct((batch, m.max_tokens), jnp.int32)
        elif m.kind == "pixels":
            height, width = (cells * m.patch_size for cells in m.grid)
            specs[name] = jax.ShapeDtypeStruct((batch, height, width, m.channels), jnp.uint8)
        else:
            specs[name] = jax.ShapeDtypeStruct((batch, m.max_tokens, m.channels), jnp.float16)
        if m.kind in ("sequence", "embedding"):
            specs[f"{name}/length"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return specs


def raw_batch(modalities: ModalitySet, inputs: Mapping[str, jax.Array]) -> RawBatch:
    """A raw batch with these inputs (see the module's docstring) and nothing else; works under jit."""
    size = next(iter(inputs.values())).shape[0]
    tokens = jnp.zeros((size, modalities.num_slots), jnp.uint16)
    lengths, dense = [], {}
    for m in modalities.modalities:
        given = inputs.get(m.name)
        if given is None:
            lengths.append(jnp.zeros(size, jnp.int16))
            continue
        full = jnp.full(size, m.max_tokens, jnp.int32)
        lengths.append(inputs.get(f"{m.name}/length", full).astype(jnp.int16))
        if m.discrete:
            start = modalities.slot_offset[m.name]
            # Before the cast, in which -1 would become 65,535.
            codes = jnp.clip(given, 0, m.vocab_size - 1).astype(jnp.uint16)
            tokens = tokens.at[:, start : start + m.max_tokens].set(codes)
        else:
            dense[m.name] = given
    return RawBatch(tokens, jnp.stack(lengths, axis=1), jnp.zeros(size, jnp.uint8), dense)


def flat_params(params: Any) -> dict[str, Any]:
    """{"encoder/attention/query/kernel": array, ...}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def functions(loaded: LoadedModel, inputs: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """The two functions of (flat parameters, inputs) that are exported."""
    structure = jax.tree.structure(loaded.params)
    names = list(flat_params(loaded.params))
    config, modalities = loaded.config, loaded.modalities

    def unflatten(flat: Mapping[str, jax.Array]) -> Any:
        return jax.tree.unflatten(structure, [flat[name] for name in names])

    def encode(flat: Mapping[str, jax.Array], given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        visible = generate.visible_tokens(raw_batch(modalities, given), modalities, inputs)
        encoded = model.encode(unflatten(flat), config, modalities, *visible)
        return {"hidden": encoded.hidden.astype(jnp.float32), "valid": encoded.valid}

    def predict(flat: Mapping[str, jax.Array], given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        raw = raw_batch(modalities, given)
        return generate.predict_ids(unflatten(flat), config, modalities, raw, tuple(inputs), tuple(targets))

    return {"encode": encode, "predict": predict}


def save(
    folder: str | os.PathLike,
    loaded: LoadedModel,
    inputs: Sequence[str],
    targets: Sequence[str] = (),
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the artefact folder; nothing half-written stays.

    Args:
      folder: must not exist, or be empty.
      loaded: the model.
      inputs: modalities that are given, at least one.
      targets: modalities to predict; default all outputs that are not given.
      platforms: that the functions are lowered for.

    Raises:
      ValueError: no input, or a modality that this model does not see or predict.
      FileExistsError: the folder holds something.
    """
    from jax import export

    modalities = loaded.modalities
    if not inputs:
        raise ValueError(f"name the inputs of the exported functions; this model has {', '.join(modalities.inputs)}")
    targets = tuple(targets) or tuple(name for name in modalities.outputs if name not in inputs)
    if not targets:
        raise ValueError("every output of this model is among the inputs; name the targets")
    generate.check_names(modalities, inputs, targets)
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ValueError(f"no platform {', '.join(unknown) or 'given'}; choose from {', '.join(PLATFORMS)}")
    params = flat_params(loaded.params)
    (batch,) = export.symbolic_shape("batch")
    specs = input_specs(modalities, inputs, batch)
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    with complete_folder(folder) as beside:
        signature: dict[str, Any] = {"platforms": list(platforms), "jax": jax.__version__, "inputs": _describe(specs)}
        for name, function in functions(loaded, inputs, targets).items():
            exported = export.export(jax.jit(function), platforms=tuple(platforms))(abstract, specs)
            (beside / f"{name}{SUFFIX}").write_bytes(exported.serialize())
            out = jax.tree.unflatten(exported.out_tree, exported.out_avals)
            signature[name] = _describe(out)
        shapes = {name: tuple(leaf.shape) for name, leaf in params.items()}
        tensor_file.write(beside / "params.safetensors", shapes, lambda name: np.asarray(params[name]), {})
        described = {"modalities": modalities.to_dict(), "targets": list(targets)}
        (beside / "signature.json").write_text(json.dumps(signature | described, indent=2) + "\n")


def _describe(specs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"shape": [str(d) for d in s.shape], "dtype": str(s.dtype)} for name, s in specs.items()}
