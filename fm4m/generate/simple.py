"""Predicts modalities from others with a trained model.

This is the plain form that sample pictures and evaluation need: everything given is visible, a grid is predicted in one
parallel step (one step of 4M's random-order decoding with all positions), a sequence greedily from left to right.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fm4m import model, sharding
from fm4m.batch import RawBatch, Tokens
from fm4m.generate import cached, canvas
from fm4m.modalities import FIRST_SENTINEL_ID, PAD_ID, ModalitySet


def visible_tokens(
    raw: RawBatch, modalities: ModalitySet, inputs: Sequence[str]
) -> tuple[Tokens, dict[str, jax.Array]]:
    """The encoder's side of a batch in which every token of ``inputs`` is visible.

    Args:
      raw: B samples.
      modalities: the model's modality set.
      inputs: names of discrete or pixel modalities, all among the set's inputs.

    Returns:
      Tokens [B, N] with N the sum of the inputs' maximal lengths, the valid ones first; and the dense vectors
      (`PackedBatch.dense`) of the continuous inputs, zeros for those that are not shown.
    """
    shown = canvas.from_raw(raw, modalities, inputs)
    return canvas.encoder_tokens(shown, modalities), shown.dense


def _grid(params, config, modalities: ModalitySet, name: str, encoded) -> jax.Array:
    m, i = modalities[name], modalities.index(name)
    shape = (encoded[0].shape[0], m.max_tokens)
    cells = jnp.broadcast_to(jnp.arange(m.max_tokens, dtype=jnp.int32), shape)
    query = Tokens(
        jnp.zeros(shape, jnp.int32),
        jnp.full(shape, i, jnp.int32),
        cells + modalities.position_offset[name],
        jnp.ones(shape, bool),
    )
    hidden = model.decode(params, config, modalities, encoded, query)
    return jnp.argmax(model.own_logits(params, config, modalities, name, hidden), -1).astype(jnp.int32)


def _sequence(params, config, modalities: ModalitySet, name: str, encoded) -> jax.Array:
    m, i = modalities[name], modalities.index(name)
    shape = (encoded[0].shape[0], m.max_tokens)
    slots = jnp.arange(m.max_tokens, dtype=jnp.int32)
    position = jnp.where(slots < (m.max_positions or m.max_tokens), slots, 0) + modalities.position_offset[name]

    layers = cached.layers_of(params, config)

    def step(t, carry):
        ids, cache = carry
        at = lambda x: jax.lax.dynamic_slice_in_dim(jnp.broadcast_to(x, shape), t, 1, axis=1)  # noqa: E731
        token = Tokens(
            at(ids + modalities.output_offset[name]), at(jnp.int32(i)), at(position), jnp.ones((shape[0], 1), bool)
        )
        hidden, cache = cached.step(params, config, modalities, layers, cache, token, t)
        token = jnp.argmax(model.own_logits(params, config, modalities, name, hidden), -1).astype(jnp.int32)
        return jax.lax.dynamic_update_index_in_dim(ids, token, t + 1, axis=1), cache

    # An empty sequence as input is one masked span; its target starts with that span's sentinel (4M, masking).
    ids = jnp.full(shape, PAD_ID, jnp.int32).at[:, 0].set(FIRST_SENTINEL_ID)
    cache = cached.start(params, config, layers, model.Encoded(*encoded), m.max_tokens)
    ids, _ = jax.lax.fori_loop(0, m.max_tokens - 1, step, (ids, cache))
    ids = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=PAD_ID)
    closed = jnp.cumsum(ids == FIRST_SENTINEL_ID + 1, axis=1) > 0
    return jnp.where(closed, PAD_ID, ids)


def check_names(modalities: ModalitySet, inputs: Sequence[str], targets: Sequence[str]) -> None:
    """Raises ValueError naming an input or target that a model with this modality set does not have."""
    for side, names, known in (("input", inputs, modalities.inputs), ("output", targets, modalities.outputs)):
        for name in names:
            if name not in known:
                raise ValueError(f"modality {name!r} is no {side} of this model; {side}s: {', '.join(known)}")


def predict_ids(
    params: dict,
    config: model.ModelConfig,
    modalities: ModalitySet,
    raw: RawBatch,
    inputs: Sequence[str],
    targets: Sequence[str],
) -> dict[str, jax.Array]:
    """`predict` as a function that can be traced: all but ``params`` and ``raw`` are static."""
    encoded = model.encode(params, config, modalities, *visible_tokens(raw, modalities, inputs))
    decoders = {"tokens": _grid, "sequence": _sequence}
    return {name: decoders[modalities[name].kind](params, config, modalities, name, encoded) for name in targets}


_predict = jax.jit(predict_ids, static_argnames=("config", "modalities", "inputs", "targets"))


def predict(
    params: dict,
    config: model.ModelConfig,
    modalities: ModalitySet,
    raw: RawBatch,
    inputs: Sequence[str],
    targets: Sequence[str],
) -> dict[str, np.ndarray]:
    """Predicts ``targets`` from all tokens of ``inputs``, each target on its own.

    Returns:
      int32 [B, max_tokens] a target: codes in row-major order for grids; for sequences the ids after the opening
      sentinel, cut before the closing one and padded with `PAD_ID`.

    Raises:
      ValueError: an input or target that this model does not have.
    """
    check_names(modalities, inputs, targets)
    out = _predict(params, config, modalities, raw, tuple(inputs), tuple(targets))
    # Over several processes the samples may be spread; everyone gets all of them.
    return {name: sharding.to_host(codes) for name, codes in out.items()}
