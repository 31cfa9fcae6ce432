"""The plain algorithms of 4M's generation: everything is encoded and decoded again for every step.

This is what `fm4m.generate` is compared with, in time (benchmarks/generation.py) and, greedily, in its results. Shapes
are fixed, so that there is one program for all steps: one forward pass a branch over all slots of all modalities in
play, visible or not, and all cells of the grid; a sequence at its full length, with all its logits, for every token.
The reference implementation's shapes change from step to step and leave out what is not visible. Random-order decoding
takes its order from outside, so that both write the same cells.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fm4m import model as model_lib
from fm4m.batch import Tokens
from fm4m.generate.canvas import Canvas, encoder_tokens
from fm4m.modalities import PAD_ID


def _query(modalities, name: str, rows: jax.Array, valid: jax.Array) -> Tokens:
    m = modalities[name]
    cells = jnp.broadcast_to(jnp.arange(m.max_tokens, dtype=jnp.int32)[: rows.shape[1]], rows.shape)
    index = jnp.full_like(rows, modalities.index(name))
    return Tokens(rows, index, cells + modalities.position_offset[name], valid)


@functools.partial(jax.jit, static_argnames=("config", "modalities", "name"))
def _grid_logits(params, canvas: Canvas, asked: jax.Array, *, config, modalities, name: str) -> jax.Array:
    """float32 [B, cells, V] of one branch: the whole canvas encoded, every cell decoded; those asked see each other."""
    encoded = model_lib.encode(params, config, modalities, encoder_tokens(canvas, modalities), canvas.dense)
    query = _query(modalities, name, jnp.zeros_like(canvas.ids[name]), asked)
    hidden = model_lib.decode(params, config, modalities, encoded, query)
    return model_lib.own_logits(params, config, modalities, name, hidden)


def roar(params, config, modalities, branches, scale: float, name: str, order: jax.Array, counts) -> Canvas:
    """Greedy random-order decoding; ``branches`` are (without, with) the conditions, ``order`` float32 [B, cells]."""
    for count in counts:
        known = branches[-1].seen[name]
        rank = jnp.argsort(jnp.argsort(jnp.where(known, jnp.inf, order), axis=1), axis=1)
        asked = (rank < count) & ~known
        programs = {"config": config, "modalities": modalities, "name": name}
        logits = [_grid_logits(params, branch, asked, **programs) for branch in branches]
        guided = logits[0] if len(logits) == 1 else logits[0] + scale * (logits[1] - logits[0])
        ids = jnp.where(asked, jnp.argmax(guided, -1).astype(jnp.int32), branches[-1].ids[name])
        branches = [branch.write(name, ids, known | asked) for branch in branches]
    return branches[-1]


@functools.partial(jax.jit, static_argnames=("config", "modalities", "name", "length"))
def sequence(params, canvas: Canvas, first: jax.Array, stop: jax.Array, *, config, modalities, name: str, length: int):
    """Greedy left-to-right decoding without a cache: int32 [B, length], as `fm4m.generate.engine.sequence` gives it."""
    encoded = model_lib.encode(params, config, modalities, encoder_tokens(canvas, modalities), canvas.dense)

    def step(carry):
        t, ids, done = carry
        valid = jnp.broadcast_to(jnp.arange(length) <= t, ids.shape)
        query = _query(modalities, name, ids + modalities.output_offset[name], valid)
        hidden = model_lib.decode(params, config, modalities, encoded, query)
        logits = model_lib.own_logits(params, config, modalities, name, hidden)
        token = jnp.argmax(logits, -1).astype(jnp.int32)[:, t]
        token = jnp.where(done, PAD_ID, token)
        return t + 1, ids.at[:, t + 1].set(token), done | (token == stop)

    ids = jnp.full((first.shape[0], length), PAD_ID, jnp.int32).at[:, 0].set(first)
    carry = jnp.zeros((), jnp.int32), ids, jnp.zeros(first.shape, bool)
    return jax.lax.while_loop(lambda c: (c[0] < length - 1) & ~c[2].all(), step, carry)[1]
