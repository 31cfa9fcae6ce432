"""The jitted programs of generation: some tokens of a grid, or a whole sequence.

Every program works on branches: canvases of the same samples that differ in the conditions they show. The first is the
unconditional one; with it alone there is no guidance. What is generated is written to all branches. Branches that show
equally many tokens run in one batch, and those of a sequence always: there a token costs one pass over the weights,
whatever the batch.

MaskGIT (Chang et al. 2022) samples all open cells and keeps the most confident; ROAR (4M, generation) samples cells in
a random order, those of one step independently of each other; sequences are decoded from left to right.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fm4m import model as model_lib
from fm4m.attention import Visibility
from fm4m.batch import Tokens
from fm4m.generate import cached
from fm4m.generate.absorbed import FewQueries
from fm4m.generate.canvas import Canvas, encoder_tokens
from fm4m.generate.sampling import Filter, guide, sample
from fm4m.modalities import FIRST_SENTINEL_ID, NUM_SENTINELS, PAD_ID, ModalitySet

Params = dict[str, Any]
Branches = tuple[Canvas, ...]


@dataclasses.dataclass(frozen=True)
class GridStep:
    """What is static of one step on a grid.

    Attributes:
      target: name of the modality.
      scheme: "roar" or "maskgit".
      queries: cells that are computed: for "roar" at least those that are written, for "maskgit" at least as many as
        are open in any sample.
      slots: encoder slots of each branch, at least as many as any sample shows tokens.
      chosen: what may be sampled.
      trace: also give the logits of all queried cells.
    """

    target: str
    scheme: str
    queries: int
    slots: tuple[int, ...]
    chosen: Filter
    trace: bool = False


def encode(
    params: Params, config: model_lib.ModelConfig, modalities: ModalitySet, branches: Branches, slots: tuple[int, ...]
) -> model_lib.Encoded:
    """The encoder's output for all branches, [branches * B, most slots, D]; branches of one size run together."""
    parts = _by_size(params, config, modalities, branches, slots, lambda encoded, copies: encoded)
    most = max(part.valid.shape[1] for part in parts)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, most - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    return _concatenate([jax.tree.map(pad, part) for part in parts])


def _by_size(params, config, modalities, branches, slots, function) -> list:
    """``function(encoded, copies)`` of every branch; those with as many slots are encoded, and given to it, together.

    ``encoded`` is [copies * B, ...], and so are the leaves of what the function returns.
    """
    out: list = [None] * len(branches)
    for size in sorted(set(slots)):
        some = [i for i, n in enumerate(slots) if n == size]
        tokens = _concatenate([encoder_tokens(branches[i], modalities, size) for i in some])
        dense = _concatenate([branches[i].dense for i in some])
        result = function(model_lib.encode(params, config, modalities, tokens, dense), len(some))
        for part, i in enumerate(some):
            rows = slice(part * branches[i].size, (part + 1) * branches[i].size)
            out[i] = jax.tree.map(lambda x, rows=rows: x[rows], result)
    return out


def _concatenate(trees: list) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


@functools.partial(jax.jit, static_argnames=("config", "modalities", "step"))
def grid_step(
    params: Params,
    branches: Branches,
    weights: jax.Array,
    keys: jax.Array,
    order: jax.Array,
    count: jax.Array,
    temperature: jax.Array,
    *,
    config: model_lib.ModelConfig,
    modalities: ModalitySet,
    step: GridStep,
) -> tuple[Branches, dict[str, jax.Array]]:
    """Writes ``count`` cells of a grid in every sample, or those that are open where there are fewer.

    Args:
      params: the model's.
      branches: one canvas a branch, each with the target's modality.
      weights: float32 [branches - 1], of guidance.
      keys: one key a sample, [B], of this step.
      order: float32 [B, cells]; ROAR takes the open cells with the smallest numbers. MaskGIT does not look at it.
      count: int32 scalar.
      temperature: scalar.
      config, modalities, step: static.

    Returns:
      The branches after the step; and of every queried cell, [B, slots]: ``position``, ``valid``, ``token``,
      ``confidence`` (see `sampling.sample`) and ``chosen`` (whether it was written); with ``step.trace`` also
      ``logits`` [B, slots, V] after guidance.
    """
    m, name = modalities[step.target], step.target
    ids, known = branches[0].ids[name], branches[0].seen[name]
    size, cells = known.shape
    slots = min(step.queries, cells)
    rank = jnp.where(known, jnp.inf, order if step.scheme == "roar" else jnp.arange(cells, dtype=jnp.float32))
    position = jnp.argsort(rank, axis=1, stable=True)[:, :slots].astype(jnp.int32)
    valid = ~jnp.take_along_axis(known, position, 1)
    if step.scheme == "roar":
        valid &= jnp.arange(slots) < count
    logits = _grid_logits(params, branches, weights, position, valid, config, modalities, step)
    token, confidence = sample(keys, logits, temperature, step.chosen)
    chosen = valid
    if step.scheme == "maskgit":
        confident = jnp.argsort(jnp.where(valid, -confidence, jnp.inf), axis=1, stable=True)
        chosen = valid & (jnp.argsort(confident, axis=1) < count)
    # What is not chosen is dropped: its position is outside of the grid.
    place = jnp.where(chosen, position, m.max_tokens)
    samples = jnp.arange(size)[:, None]
    ids = ids.at[samples, place].set(token, mode="drop")
    known = known.at[samples, place].set(True, mode="drop")
    told = {"position": position, "valid": valid, "token": token, "confidence": confidence, "chosen": chosen}
    if step.trace:
        told["logits"] = logits
    return tuple(b.write(name, ids, known) for b in branches), told


def _grid_logits(params, branches, weights, position, valid, config, modalities, step):
    """Guided logits [B, slots, V] of some cells; they see each other all, whatever the decoder's masks in training."""

    def decoded(encoded: model_lib.Encoded, copies: int) -> jax.Array:
        place = jnp.tile(position + modalities.position_offset[step.target], (copies, 1))
        zeros = jnp.zeros_like(place)
        query = Tokens(zeros, zeros + modalities.index(step.target), place, jnp.tile(valid, (copies, 1)))
        own = Visibility(zeros, zeros, jnp.where(query.valid, 0, -1), zeros)
        hidden = model_lib.decode(params, config, modalities, encoded, query, own=own, kind=FewQueries)
        return model_lib.own_logits(params, config, modalities, step.target, hidden)

    return guide(jnp.stack(_by_size(params, config, modalities, branches, step.slots, decoded)), weights)


@functools.partial(jax.jit, static_argnames=("config", "modalities", "target", "slots", "chosen", "length"))
def sequence(
    params: Params,
    branches: Branches,
    weights: jax.Array,
    keys: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    temperature: jax.Array,
    *,
    config: model_lib.ModelConfig,
    modalities: ModalitySet,
    target: str,
    slots: tuple[int, ...],
    chosen: Filter,
    length: int,
) -> jax.Array:
    """Decodes a sequence from left to right; each sample stops on its own, the program when all have.

    Args:
      params, branches, weights, keys, temperature: as for `grid_step`.
      first: int32 [B], the token that the decoder starts from (a sentinel).
      stop: int32 [B], the token that ends a sample.
      length: tokens at most, the first one included.
      target, slots, chosen: static, as in `GridStep`.

    Returns:
      int32 [B, length]: the first token, what follows up to and with the stop token, then `PAD_ID`.
    """
    m, index, copies = modalities[target], modalities.index(target), len(branches)
    encoded = encode(params, config, modalities, branches, slots)
    layers = cached.layers_of(params, config)
    limit = m.max_positions or m.max_tokens

    def next_token(t: jax.Array, token: jax.Array, cache: cached.Cache) -> tuple[jax.Array, cached.Cache]:
        rows = jnp.tile(token[:, None], (copies, 1))
        place = jnp.full_like(rows, jnp.where(t < limit, t, 0) + modalities.position_offset[target])
        row = rows + modalities.output_offset[target]
        query = Tokens(row, jnp.full_like(rows, index), place, jnp.ones(rows.shape, bool))
        hidden, cache = cached.step(params, config, modalities, layers, cache, query, t)
        logits = model_lib.own_logits(params, config, modalities, target, hidden)
        logits = guide(logits.reshape(copies, -1, logits.shape[-1]), weights)
        return sample(jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits, temperature, chosen)[0], cache

    def body(carry):
        t, token, done, ids, cache = carry
        token, cache = next_token(t, token, cache)
        token = jnp.where(done, PAD_ID, token)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], t + 1, 1)
        return t + 1, token, done | (token == stop), ids, cache

    ids = jnp.full((first.shape[0], length), PAD_ID, jnp.int32).at[:, 0].set(first)
    cache = cached.start(params, config, layers, encoded, length)
    carry = jnp.zeros((), jnp.int32), first, jnp.zeros(first.shape, bool), ids, cache
    return jax.lax.while_loop(lambda c: (c[0] < length - 1) & ~c[2].all(), body, carry)[3]


def is_sentinel(token: int) -> bool:
    """Whether an id stands for a gap of a text."""
    return FIRST_SENTINEL_ID <= token < FIRST_SENTINEL_ID + NUM_SENTINELS


def merge_spans(shown: list[int], generated: list[int]) -> list[int]:
    """A text with gaps, and what was generated for them, as one text.

    Args:
      shown: the ids that the encoder saw; a sentinel stands for a gap.
      generated: sentinels, each followed by what belongs into its gap. What follows a sentinel that is no gap of the
        text (such as the closing one) is dropped; so is a gap that nothing was generated for.
    """
    spans, current = {}, None
    for token in generated:
        if is_sentinel(token):
            current = spans.setdefault(token, [])
        elif current is not None:
            current.append(token)
    return [t for token in shown for t in (spans.get(token, []) if is_sentinel(token) else [token])]
