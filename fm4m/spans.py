"""Span masking of sequences with a fixed shape and a fixed number of tries (T5-style, as 4M uses it).

Everything here is about one sample with Q sequences, padded to the same L slots; `jax.vmap` adds the batch.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.modalities import FIRST_SENTINEL_ID, NUM_SENTINELS

DECAY = 0.9  # of the keep probability when the visible part is over budget (the reference implementation)
_CODE_BITS = 16  # codes and row indices share a sort key with their place in the sequence
_LAST = np.uint32(0xFFFFFFFF)


def num_tries(max_tokens: int) -> int:
    """How often a masking that is over budget is redrawn before everything is masked.

    The reference implementation redraws until it fits. Here the number of tries is the first at which at most half a
    token of the longest sequence is expected to be kept even if the first keep probability was 1: 60 for 256 tokens.
    By then all tries have failed with a probability of at most 4e-9 for budgets of three tokens and more, by exact
    calculation. For one or two tokens it is below 2e-3, but there a try that fits masks (nearly always) everything too.
    """
    return max(1, math.ceil(math.log(max(max_tokens, 1) / 0.5) / -math.log(DECAY)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """The two sides of masked sequences.

    Attributes:
      visible: int32 [Q, L], the encoder's tokens: kept codes, and one gap code for each masked run; in order, the first
        ``num_visible`` hold.
      num_visible: int32 [Q].
      masked: int32 [Q, 2 L + 1], the decoder's tokens: a sentinel before each masked run, the run, a closing sentinel.
      start: int32 [Q], where the window of ``masked`` that fits the budget begins; always at a sentinel.
      num_masked: int32 [Q], tokens in the window.
    """

    visible: jax.Array
    num_visible: jax.Array
    masked: jax.Array
    start: jax.Array
    num_masked: jax.Array


def mask_spans(
    codes: jax.Array,
    length: jax.Array,
    gap_code: np.ndarray,
    input_budget: jax.Array,
    target_budget: jax.Array,
    keep_prob: jax.Array,
    uniforms: jax.Array,
    window: jax.Array,
) -> Spans:
    """Masks spans of Q sequences (the reference implementation's masking of text, steps 2 to 6).

    Args:
      codes: int32 [Q, L] in 0..65535, anything beyond the length.
      length: int32 [Q].
      gap_code: int [Q]; the code that stands for a masked run on the visible side, or -1: numbered sentinels, of which
        there are ``NUM_SENTINELS``; later runs share the last one (for 512 tokens it would take 198 runs).
      input_budget: int32 [Q], most visible tokens; with 0 nothing is visible, not even a sentinel.
      target_budget: int32 [Q], most decoder tokens, sentinels included.
      keep_prob: float32 [Q], probability of keeping a token at the first try; 0.9 times the last at every other.
      uniforms: float32 [Q, tries, L] in (0, 1]; a token is kept where it is at most the keep probability.
      window: float32 [Q] in [0, 1), chooses the sentinel at which a target that is over budget starts.
    """
    max_len, tries = codes.shape[1], uniforms.shape[1]
    slot = jnp.arange(max_len, dtype=jnp.int32)
    inside = slot < length[:, None]

    def starts_of(masked: jax.Array) -> jax.Array:
        before = jnp.pad(masked[..., :-1], [(0, 0)] * (masked.ndim - 1) + [(1, 0)])
        return masked & ~before

    # The length of every try at once, then the first one that fits.
    threshold = keep_prob[:, None] * (np.float32(DECAY) ** np.arange(tries, dtype=np.float32))
    masked = inside[:, None] & (uniforms > threshold[..., None])
    count = lambda x: x.sum(-1, dtype=jnp.int32)  # noqa: E731
    size = length[:, None] - count(masked) + count(starts_of(masked))
    fits = size <= input_budget[:, None]
    first = jnp.argmax(fits, -1)
    threshold = jnp.where(jnp.arange(tries) == first[:, None], threshold, 0).sum(-1)
    threshold = jnp.where(fits.any(-1), threshold, -1.0)
    chosen = jnp.take_along_axis(uniforms, first[:, None, None], axis=1, mode="clip")[:, 0]

    masked = inside & (chosen > threshold[:, None])
    starts = starts_of(masked)
    shown = inside & (~masked | starts)
    run = jnp.cumsum(starts, -1, dtype=jnp.int32)
    num_runs = run[:, -1]
    sentinel = FIRST_SENTINEL_ID - 1 + jnp.minimum(run, NUM_SENTINELS)
    closing = FIRST_SENTINEL_ID - 1 + jnp.minimum(num_runs + 1, NUM_SENTINELS)
    gap = jnp.where(gap_code[:, None] < 0, sentinel, gap_code[:, None])
    visible = _compact(slot, jnp.where(starts, gap, codes), shown)

    # The target's order: slot 2j is the sentinel of a run that starts at token j, slot 2j + 1 is token j itself.
    place = jnp.concatenate([2 * slot, 2 * slot + 1, jnp.array([2 * max_len])])
    value = jnp.concatenate([sentinel, codes, closing[:, None]], -1)
    present = jnp.concatenate([starts, masked, (num_runs >= 0)[:, None]], -1)
    target = _compact(place, value, present)

    # A target over budget becomes a window from a random sentinel, or the longest suffix that fits and starts at one.
    num = count(masked) + num_runs + 1
    rank = jnp.cumsum(masked, -1, dtype=jnp.int32) + run - 2  # of the sentinel, where a run starts
    pick = jnp.minimum(jnp.floor(window * num_runs.astype(jnp.float32)).astype(jnp.int32), num_runs - 1)
    picked = jnp.where(starts & (run - 1 == pick[:, None]), rank, 0).sum(-1)
    over = num[:, None] - rank > target_budget[:, None]
    suffix = jnp.where(starts & ~over, rank, (num - 1)[:, None]).min(-1)
    start = jnp.where(num - picked >= target_budget, picked, suffix)
    start = jnp.where(num <= target_budget, 0, start)
    return Spans(
        visible=visible,
        num_visible=jnp.where(input_budget > 0, count(shown), 0),
        masked=target,
        start=start,
        num_masked=jnp.minimum(num - start, target_budget),
    )


def _compact(place: jax.Array, value: jax.Array, present: jax.Array) -> jax.Array:
    """The values present, in the order of their places; one single-operand sort and no gather."""
    key = (place.astype(jnp.uint32) << _CODE_BITS) | value.astype(jnp.uint32)
    key = jax.lax.sort(jnp.where(present, key, _LAST), dimension=-1, is_stable=False)
    return (key & np.uint32((1 << _CODE_BITS) - 1)).astype(jnp.int32)
