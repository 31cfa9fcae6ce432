"""Starts a model from another one's weights, which may know other modalities (4M-21 was started from 4M-7).

Both are looked at through the reference implementation's keys (`fm4m.interop.layout`), which name every tensor by layer
or by modality, whatever the tables are laid out like.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

from fm4m.interop.layout import Layout
from fm4m.loading import LoadedModel
from fm4m.modalities import ModalitySet
from fm4m.model import ModelConfig

log = logging.getLogger("fm4m")

# Fields of a model that no tensor's shape shows.
_MEANING = ("num_heads", "activation", "grid_positions", "decoder_sep_mask", "decoder_causal_mask")

_EMBEDDINGS = ("encoder_embeddings.", "decoder_embeddings.")


def transplant(source: LoadedModel, config: ModelConfig, modalities: ModalitySet, params: Any) -> dict[str, Any]:
    """``params`` with every tensor replaced that ``source`` has too.

    The layers must be the same. A modality that the source lacks keeps its initial tables, one that only the source has
    is left behind; both are reported in the log.

    Args:
      source: the trained model.
      config, modalities: of the new model.
      params: its initial parameters.

    Returns:
      A tree of numpy arrays like ``params``.

    Raises ValueError naming a field of the model that differs, the first tensor of the layers that is missing, left
    over or of another shape, a modality whose vocabulary or width differs, or two different tensors that the new model
    has only one place for.
    """
    for field in _MEANING:
        theirs, ours = getattr(source.config, field), getattr(config, field)
        if theirs != ours:
            raise ValueError(f"the model to start from has {field} = {theirs!r}, here model.{field} = {ours!r}")
    old, new = Layout(source.config, source.modalities), Layout(config, modalities)
    params = jax.tree.map(np.array, params)
    known, fresh = set(old.parameters), set()
    for key in new.parameters:
        if key not in known:
            if not key.startswith(_EMBEDDINGS):
                raise ValueError(f"the model to start from has no {key}; model.* must describe the same layers")
            fresh.add(_modality(key, modalities))
            continue
        if old.shape(key) != new.shape(key):
            raise ValueError(f"{key} has shape {old.shape(key)} in the model to start from, here {new.shape(key)}")
        tensor = old.get(source.params, key)
        twin = new.twins.get(key)
        if twin in known and not np.array_equal(tensor, old.get(source.params, twin)):
            option = "share_modality_embeddings" if key.endswith("mod_emb") else "tied_heads"
            raise ValueError(
                f"{key} and {twin} differ in the model to start from, here they are one: set model.{option}=False"
            )
        new.set(params, key, tensor)
    left = known - set(new.parameters)
    for key in sorted(left):
        if not key.startswith(_EMBEDDINGS):
            raise ValueError(f"the model to start from also has {key}; model.* must describe the same layers")
    dropped = {_modality(key, source.modalities) for key in left}
    log.info(
        "%d of %d tensors taken over; modalities with fresh tables: %s; left behind: %s",
        len(known & set(new.parameters)), len(new.parameters), ", ".join(sorted(fresh)) or "none",
        ", ".join(sorted(dropped)) or "none",
    )  # fmt: skip
    return params


def _modality(key: str, modalities: ModalitySet) -> str:
    return next(name for name in modalities.names if key.split(".", 1)[1].startswith(f"{name}."))
