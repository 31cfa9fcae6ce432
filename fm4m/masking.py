"""Turns raw batches into the model's inputs and targets, on the device, inside the jitted step.

The scheme is 4M's multimodal masking (4M, section 3; budgets and spans as in the reference implementation): Dirichlet
budgets over modalities, random cells of grids, spans of sequences. The masks of a sample are a pure function of the
key, the sample's position in the stream and the sample: neither the batch it is in nor the number of devices matters.

`draw` makes all random numbers and `select` does the rest, deterministically. Shapes are fixed and there is no
data-dependent loop: over a sharded batch, such a loop would have every device wait for the slowest sample of all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.batch import PackedBatch, RawBatch, Tokens, patchify
from fm4m.masking_recipe import KEEP_SCHEMES, Masking, MaskingComponent
from fm4m.modalities import Modality, ModalitySet
from fm4m.spans import mask_spans, num_tries

__all__ = ["Draws", "Masking", "MaskingComponent", "draw", "log_gamma", "mask_batch", "select"]

GAMMA_TRIES = 6  # each is accepted with a probability over 0.95, so all fail in 1.6e-8 of the draws


def mask_batch(
    raw: RawBatch,
    masking: Masking,
    modalities: ModalitySet,
    tasks: tuple[str, ...],
    key: jax.Array,
    position: jax.Array,
) -> PackedBatch:
    """Masks a batch; to be called under `jax.jit` with ``masking``, ``modalities`` and ``tasks`` static.

    Two deliberate differences from the reference implementation. A modality that a sample lacks (length 0) counts as
    concentration 0 there, so that no budget is wasted on it; if nothing else is left, the budget is 0. And a list of
    strings (4M-21's metadata) is masked token by token like any other sequence: raw batches do not mark its parts.

    Cells of a grid stand in random order on both sides. A sequence stands in order, with positions counted over its
    visible (encoder) or target (decoder) tokens. A target of L tokens of a sequence gives L - 1 predictions.

    Args:
      raw: B samples.
      masking: the recipe.
      modalities: the layout of ``raw`` and of the model's tables.
      tasks: names of the mixture's tasks, which ``raw.task`` indexes.
      key: PRNG key of the run, one for all batches.
      position: [B] integers, the index of each sample in the stream (modulo 2^32).

    Returns:
      N = ``masking.input_range[1]`` encoder and M = ``masking.target_range[1]`` decoder slots a sample.

    Raises:
      ValueError: if the recipe does not fit the modalities or the tasks, or the raw batch has another layout.
    """
    if raw.tokens.shape[1] != modalities.num_slots or raw.length.shape[1] != len(modalities):
        raise ValueError(
            f"raw batch has {raw.tokens.shape[1]} slots and {raw.length.shape[1]} lengths, but the modality set has "
            f"{modalities.num_slots} and {len(modalities)}: batch and recipe were built from different modality sets"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position.astype(jnp.uint32))
    return select(raw, draw(keys, raw, masking, modalities, tasks), masking, modalities, tasks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """All random numbers of a batch. K modalities; C grid cells, Q sequences and embeddings in `plan`'s order.

    Attributes:
      component: int32 [B], index among the components of the sample's task.
      budget: int32 [B, 2], tokens to give out on the input side and on the target side.
      share: float32 [B, 2, K], one Dirichlet sample a side; all 0 where no modality can be chosen.
      extra: int32 [B, 2, R], the modality that gets the first, second, ... token left over by rounding down.
      cells: uint32 [B, C]; cells of a grid are taken in increasing order (of all but the low bits, see `select`).
      keep_prob: float32 [B, Q] in [0, 1), what the keep scheme turns into the probability of keeping a token.
      keep: float32 [B, Q, tries, L] in (0, 1]; a token is kept at a try where it is at most the keep probability.
      window: float32 [B, Q] in [0, 1), chooses the sentinel at which a target over budget starts.
    """

    component: jax.Array
    budget: jax.Array
    share: jax.Array
    extra: jax.Array
    cells: jax.Array
    keep_prob: jax.Array
    keep: jax.Array
    window: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Static tables of one (recipe, modalities, tasks); components of task t are rows ``t * num_components + i``."""

    grids: tuple[int, ...]  # modality indices, equal grids side by side so that they are sorted together
    sequences: tuple[int, ...]
    num_components: int
    cumulative: np.ndarray  # float32 [tasks, components], cumulative probability
    alpha: np.ndarray  # float32 [rows, 2, K]
    keep_scheme: np.ndarray  # int [rows, Q], index into KEEP_SCHEMES
    max_len: int
    num_extra: int


@functools.lru_cache(maxsize=64)
def plan(masking: Masking, modalities: ModalitySet, tasks: tuple[str, ...]) -> Plan:
    """Checks the recipe and lays out its tables. Raises ValueError as `Masking.validate` does."""
    masking.validate(modalities, tasks)
    ms = modalities.modalities
    used = [i for i, m in enumerate(ms) if m.name in modalities.inputs or m.name in modalities.outputs]
    grids = sorted((i for i in used if ms[i].grid), key=lambda i: ms[i].max_tokens)
    sequences = tuple(i for i in used if not ms[i].grid)
    parts = [masking.components(t) for t in tasks]
    width = max(len(p) for p in parts)
    cumulative = np.full((len(tasks), width), 2.0, np.float32)  # 2: beyond any uniform number
    alpha = np.zeros((len(tasks), width, 2, len(ms)), np.float32)
    keep = np.zeros((len(tasks), width, len(sequences)), np.int32)
    for t, components in enumerate(parts):
        weights = np.cumsum([c.weight for c in components])
        cumulative[t, : len(components)] = weights / weights[-1]
        for i, c in enumerate(components):
            alpha[t, i] = [list(c.concentration(side, modalities).values()) for side in ("inputs", "targets")]
            keep[t, i] = [KEEP_SCHEMES.index(c.keep_scheme(ms[q].name)) for q in sequences]
    return Plan(
        grids=tuple(grids),
        sequences=sequences,
        num_components=width,
        cumulative=cumulative,
        alpha=alpha.reshape(len(tasks) * width, 2, len(ms)),
        keep_scheme=keep.reshape(len(tasks) * width, len(sequences)),
        max_len=max((ms[q].max_tokens for q in sequences), default=0),
        num_extra=max(int((alpha > 0).sum(-1).max()) - 1, 0),  # rounding down k shares leaves at most k - 1 tokens
    )


def _pick_row(table: np.ndarray, row: jax.Array) -> jax.Array:
    """``table[row]`` of a small constant table, without a gather."""
    hit = (jnp.arange(table.shape[0]) == row).reshape((-1,) + (1,) * (table.ndim - 1))
    return jnp.where(hit, table, 0).sum(0, dtype=table.dtype)


def _uniform(bits: jax.Array) -> jax.Array:
    """uint32 bits to float32 in [0, 1), multiples of 2^-24."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _open_uniform(bits: jax.Array) -> jax.Array:
    """uint32 bits to float32 in (0, 1]: it has a logarithm, and is at most p with probability p, also for p = 0."""
    return ((bits >> 8) + 1).astype(jnp.float32) * np.float32(2.0**-24)


def log_gamma(bits: jax.Array, alpha: jax.Array) -> jax.Array:
    """Logarithms of Gamma(alpha, 1) variates, float32 [...].

    Marsaglia and Tsang (2000), with the first accepted of a fixed number of tries; `jax.random.gamma` loops until all
    elements are accepted. Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha) reaches small concentrations, where only the
    logarithm can be represented.

    Args:
      bits: uint32 [2 * GAMMA_TRIES + 1, ...], random.
      alpha: float32, > 0, broadcasts to [...].
    """
    # 23 bits, so that the argument is exact and never +-1; the normal variates end at 5.3 standard deviations.
    centred = ((bits[:GAMMA_TRIES] >> 9).astype(jnp.float32) + 0.5) * np.float32(2.0**-22) - 1
    x = np.float32(np.sqrt(2)) * jax.lax.erf_inv(centred)
    log_u = jnp.log(_open_uniform(bits[GAMMA_TRIES:]))
    d = alpha + np.float32(2 / 3)
    v = (1 + x / jnp.sqrt(9 * d)) ** 3
    log_v = jnp.log(jnp.maximum(v, np.float32(1e-30)))
    accepted = (v > 0) & (log_u[1:] < 0.5 * x * x + d - d * v + d * log_v)
    tries = jnp.arange(GAMMA_TRIES).reshape(-1, *[1] * (x.ndim - 1))
    chosen = accepted & (tries == jnp.argmax(accepted, 0))  # none if all fail: v = 1, which is near the mode
    return jnp.log(d) + jnp.where(chosen, log_v, 0).sum(0) + log_u[0] / alpha


def draw(keys: jax.Array, raw: RawBatch, masking: Masking, modalities: ModalitySet, tasks: tuple[str, ...]) -> Draws:
    """Makes the random numbers of a batch; ``keys`` [B], one PRNG key a sample. Of ``raw``, task and length matter."""
    p, ms = plan(masking, modalities, tasks), modalities.modalities
    low = np.array([masking.input_range[0], masking.target_range[0]])
    choices = np.array([masking.input_range[1], masking.target_range[1]]) - low + 1
    num_seq = len(p.sequences)
    shapes = {
        "gamma": (2 * GAMMA_TRIES + 1, 1 + p.num_extra, 2, len(ms)),
        "cells": (sum(ms[g].max_tokens for g in p.grids),),
        "keep": (num_seq, num_tries(p.max_len), p.max_len),
        "rest": (3 + 2 * num_seq,),
    }
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()

    def one(key: jax.Array, task: jax.Array, length: jax.Array) -> Draws:
        # One flat draw, computed once: as several shaped ones it would be fused into, and repeated by, all its uses.
        flat = jax.lax.optimization_barrier(jax.random.bits(key, (ends[-1],), jnp.uint32))
        bits = {k: flat[e - math.prod(n) : e].reshape(n) for (k, n), e in zip(shapes.items(), ends)}
        uniform = _uniform(bits["rest"])
        component = (uniform[0] >= _pick_row(p.cumulative, task)[:-1]).sum(dtype=jnp.int32)
        alpha = _pick_row(p.alpha, task * p.num_components + component)
        active = (alpha > 0) & (length > 0)
        # Row 0 is the Dirichlet sample of the budgets, the others are those of the left over tokens, as logarithms.
        logs = log_gamma(bits["gamma"], jnp.where(active, alpha, 1.0))
        logs = jnp.where(active, logs, -jnp.inf)
        top = jnp.where(active.any(-1), logs[0].max(-1), 0.0)
        weight = jnp.exp(logs[0] - top[:, None])
        return Draws(
            component=component,
            budget=jnp.floor(uniform[1:3] * choices).astype(jnp.int32) + low,
            share=weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-30),
            extra=jnp.argmax(logs[1:], -1).astype(jnp.int32).T,
            cells=bits["cells"],
            keep_prob=uniform[3 : 3 + num_seq],
            keep=_open_uniform(bits["keep"]),
            window=uniform[3 + num_seq :],
        )

    return jax.vmap(one)(keys, raw.task.astype(jnp.int32), raw.length.astype(jnp.int32))


def select(
    raw: RawBatch, draws: Draws, masking: Masking, modalities: ModalitySet, tasks: tuple[str, ...]
) -> PackedBatch:
    """The deterministic part of `mask_batch`.

    The cells of a grid with n cells are ordered by ``draws.cells``, whose lowest ``ceil(log2(n))`` bits are replaced by
    the cell's number; the first are inputs, the next are targets. With ``masking.refill``, the tokens that a side's
    budget has left (counted in slots of the packed batch) go to the grids with a positive concentration on that side,
    in proportion to their free cells; inputs are refilled before the targets' budgets are cut.
    """
    one = functools.partial(_select_one, plan(masking, modalities, tasks), masking, modalities)
    length, task = raw.length.astype(jnp.int32), raw.task.astype(jnp.int32)
    encoder, decoder, target = jax.vmap(one)(raw.tokens, length, task, draws)
    return PackedBatch(Tokens(*encoder), Tokens(*decoder), target, _dense(raw, modalities))


def _select_one(
    p: Plan, masking: Masking, modalities: ModalitySet, tokens: jax.Array, length: jax.Array, task: jax.Array, d: Draws
) -> tuple[tuple, tuple, jax.Array]:
    ms, num = modalities.modalities, len(modalities)
    max_tokens = np.array([m.max_tokens for m in ms], np.int32)
    is_grid = np.array([m.grid is not None for m in ms])
    row = task * p.num_components + d.component
    active = (_pick_row((p.alpha > 0).astype(np.int32), row) > 0) & (length > 0)
    wanted = jnp.minimum(_budgets(d, active), max_tokens)

    # Sequences. What they cannot use of their budgets, the grids may.
    seq_in = seq_out = jnp.zeros(num, jnp.int32)
    if p.sequences:
        scheme = _pick_row(p.keep_scheme, row)
        binary = jnp.where(d.keep_prob < 0.5, 0.0, 1.0)
        keep_prob = jnp.where(scheme == KEEP_SCHEMES.index("binary"), binary, d.keep_prob)
        keep_prob = jnp.where(scheme == KEEP_SCHEMES.index("all"), 1.0, keep_prob)
        spans = mask_spans(
            codes=jnp.stack([_codes(ms[q], modalities, tokens, length[q], p.max_len) for q in p.sequences]),
            length=_take(length, p.sequences),
            gap_code=np.array([ms[q].max_tokens if ms[q].kind == "embedding" else -1 for q in p.sequences]),
            input_budget=_take(wanted[0], p.sequences),
            target_budget=_take(wanted[1], p.sequences),
            keep_prob=keep_prob,
            uniforms=d.keep,
            window=d.window,
        )
        seq_in = _put(spans.num_visible, p.sequences, num)
        seq_out = _put(jnp.maximum(spans.num_masked - 1, 0), p.sequences, num)

    # Grids: a random order of the cells, the first are inputs, the next are targets.
    grid_in = jnp.where(is_grid, wanted[0], 0)
    if masking.refill:
        free = jnp.where(is_grid & active[0], max_tokens - grid_in, 0)
        grid_in += _refill(d.budget[0] - (grid_in + seq_in).sum(), free)
    grid_out = jnp.where(is_grid, jnp.minimum(wanted[1], max_tokens - grid_in), 0)
    if masking.refill:
        free = jnp.where(is_grid & active[1], max_tokens - grid_in - grid_out, 0)
        grid_out += _refill(d.budget[1] - (grid_out + seq_out).sum(), free)

    # All candidates side by side, [cells of the grids | visible of the sequences | masked of the sequences], and where
    # each modality's begin. A slot then needs one gather to know its cell, code or vector.
    words = _cell_orders(p, ms, d.cells)
    first_in, at = {}, 0
    for i in (*p.grids, *p.sequences):
        first_in[i] = at
        at += ms[i].max_tokens if is_grid[i] else p.max_len
    first_in = np.array([first_in.get(i, 0) for i in range(num)], np.int32)
    first_out = first_in + grid_in
    if p.sequences:
        words += [spans.visible.reshape(-1), spans.masked.reshape(-1)]
        begin = at + np.arange(len(p.sequences), dtype=np.int32) * spans.masked.shape[1]
        first_out = jnp.where(is_grid, first_out, _put(begin + spans.start, p.sequences, num))
    words = jnp.concatenate(words)

    def pick(values: jax.Array, index: jax.Array, where: jax.Array) -> jax.Array:
        return values.at[jnp.where(where, index, 0)].get(mode="promise_in_bounds").astype(jnp.int32)

    def table(by_name: dict[str, int]) -> np.ndarray:
        return np.array([by_name.get(name, 0) for name in modalities.names], np.int32)

    offsets = np.arange(num), is_grid, table(modalities.slot_offset), table(modalities.position_offset)

    # Encoder. A cell of a grid of codes shows its code; a sequence's word is its code, a vector's its index.
    rank, valid, spread = _slots(grid_in + seq_in, masking.input_range[1])
    modality, on_grid, slot_offset, position = map(spread, offsets)
    word = pick(words, rank + spread(first_in), valid)
    coded = spread(np.array([m.kind == "tokens" for m in ms])) > 0
    code = jnp.where(coded, pick(tokens, slot_offset + word, coded), word)
    row = spread(table({**modalities.input_offset, **modalities.continuous_offset})) + code
    position += jnp.where(on_grid > 0, word, rank)
    encoder = (jnp.where(valid, row, 0), modality, jnp.where(valid, position, 0), valid)

    # Decoder. A slot of a grid shows the mask token; a slot of a sequence shows a token and predicts the next.
    rank, valid, spread = _slots(grid_out + seq_out, masking.target_range[1])
    modality, on_grid, slot_offset, position = map(spread, offsets)
    on_grid = on_grid > 0
    index = rank + spread(first_out)
    word = pick(words, index, valid)
    following = jnp.where(on_grid, pick(tokens, slot_offset + word, on_grid), pick(words, index + 1, valid & ~on_grid))
    row = spread(table(modalities.output_offset))
    rank = jnp.where(rank >= spread(np.array([m.max_positions or 2**30 for m in ms])), 0, rank)
    position += jnp.where(on_grid, word, rank)
    decoder = (jnp.where(valid & ~on_grid, row + word, 0), modality, jnp.where(valid, position, 0), valid)
    return encoder, decoder, jnp.where(valid, row + following, 0)


def _budgets(d: Draws, active: jax.Array) -> jax.Array:
    """int32 [2, K]: ``floor(share * budget)``, and one more for each left over (the reference implementation)."""
    budget = jnp.where(active.any(-1), d.budget, 0)
    whole = jnp.floor(d.share * budget[:, None].astype(jnp.float32)).astype(jnp.int32)
    left = budget - whole.sum(-1)
    nth = jnp.arange(d.extra.shape[-1])
    given = (d.extra[:, :, None] == jnp.arange(active.shape[-1])) & (nth < left[:, None])[:, :, None]
    return whole + given.sum(1, dtype=jnp.int32)


def _refill(tokens: jax.Array, free: jax.Array) -> jax.Array:
    """Gives at most ``tokens`` to modalities in proportion to their ``free`` cells, none more than it has."""
    upto = jnp.cumsum(free, dtype=jnp.int32)
    total = upto[-1]
    given = jnp.clip(tokens, 0, total) * upto // jnp.maximum(total, 1)
    return given - jnp.pad(given[:-1], (1, 0))


def _take(values: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """``values[index]`` for a few static indices: slices, which fuse, rather than a gather."""
    return jnp.stack([values[i] for i in index])


def _put(values: jax.Array, index: tuple[int, ...], num: int) -> jax.Array:
    """The inverse of `_take`: [num], zero where no index points."""
    return jnp.where(np.array(index)[:, None] == np.arange(num), values[:, None], 0).sum(0, dtype=values.dtype)


def _codes(m: Modality, modalities: ModalitySet, tokens: jax.Array, length: jax.Array, max_len: int) -> jax.Array:
    """int32 [max_len]: a sequence's codes; for an embedding the index of each vector."""
    if m.kind == "embedding":
        # What is stacked must be sharded alike over the batch on an explicit mesh, and a constant would not be.
        return jnp.arange(max_len, dtype=jnp.int32) + 0 * length
    start = modalities.slot_offset[m.name]
    return jnp.pad(tokens[start : start + m.max_tokens].astype(jnp.int32), (0, max_len - m.max_tokens))


def _cell_orders(p: Plan, ms: tuple[Modality, ...], bits: jax.Array) -> list[jax.Array]:
    """A random order of each grid's cells, in the plan's order: int32, C in all. One sort for each size of grid."""
    orders, start = [], 0
    for cells in dict.fromkeys(ms[g].max_tokens for g in p.grids):
        count = sum(ms[g].max_tokens == cells for g in p.grids)
        low = np.uint32((1 << (cells - 1).bit_length()) - 1)
        keys = bits[start : start + count * cells].reshape(count, cells) & ~low | jnp.arange(cells, dtype=jnp.uint32)
        orders.append((jax.lax.sort(keys, dimension=-1, is_stable=False) & low).astype(jnp.int32).reshape(-1))
        start += count * cells
    return orders


def _slots(counts: jax.Array, width: int) -> tuple[jax.Array, jax.Array, Callable]:
    """Lays ``counts`` [K] tokens side by side in ``width`` slots.

    Returns each slot's number within its modality, whether it is valid, and a function that spreads a value of every
    modality over the modality's slots; all 0 or False in the slots left over.
    """
    slot = jnp.arange(width, dtype=jnp.int32)
    end = jnp.cumsum(counts, dtype=jnp.int32)
    begin = end - counts
    hit = (slot >= begin[:, None]) & (slot < end[:, None])

    def spread(values: jax.Array | np.ndarray) -> jax.Array:
        return jnp.where(hit, values.astype(np.int32)[:, None], 0).sum(0, dtype=jnp.int32)

    valid = slot < end[-1]
    return jnp.where(valid, slot - spread(begin), 0), valid, spread


def _dense(raw: RawBatch, modalities: ModalitySet) -> dict[str, jax.Array]:
    """The continuous inputs, float32 [B, vectors, width]; an embedding is 0 beyond its length and has a zero row."""
    out = {}
    for name in modalities.continuous:
        m, values = modalities[name], raw.dense[name]
        if m.kind == "pixels":
            out[name] = patchify(values, m.patch_size)
            continue
        inside = jnp.arange(m.max_tokens) < raw.length[:, modalities.index(name), None]
        values = jnp.where(inside[..., None], values.astype(jnp.float32), 0.0)
        out[name] = jnp.pad(values, ((0, 0), (0, 1), (0, 0)))
    return out
