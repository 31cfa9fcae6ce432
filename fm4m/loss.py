"""Cross-entropy over many vocabularies, as sums and counts per modality; means are taken once, at the end.

    sums, counts = cross_entropy_sums(hidden, head, batch, modalities)
    loss = (modality_weights(counts, modalities) * sums).sum()

Sums and counts of micro-batches (or of evaluation batches) add up exactly; weights come from the added counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.batch import PackedBatch
from fm4m.modalities import ROW_MULTIPLE, ModalitySet, round_up, unknown_name

# Logits of more bytes are computed in parts, so that they stay in the 128 MiB of a TPU v4's CMEM: at 16,384 targets of
# 4M-7 the loss of a B model takes 6.05 ms instead of 6.28 (estimates of the compiler's schedule).
LOGITS_BYTES = 70 * 2**20


@jax.named_scope("loss")
def cross_entropy_sums(
    hidden: jax.Array,
    head: jax.Array,
    batch: PackedBatch,
    modalities: ModalitySet,
    method: str = "blocked",
    *,
    slots: Mapping[str, int] | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy (in nats) and number of targets of every modality, of one device's rows.

    Nothing is communicated: inside a `jax.shard_map`, sums and counts of the devices are to be added by the caller.

    Args:
      hidden: [B, M, D] decoder states; matrix multiplications run in its dtype, sums in float32.
      head: [output_rows, D], the whole output head, best in the dtype of ``hidden``. Its gradient comes back in its own
        dtype; it is the sum of at most four parts (slots, and blocks of each length), each accumulated in float32.
      batch: gives target, modality and validity of each decoder slot; only valid slots count.
      modalities: the modality set that the head's rows follow.
      method: ``"dense"`` multiplies every slot with every head and is the form to compare with. ``"blocked"``
        multiplies every slot with its own head only, so that the cost does not grow with the number of modalities, and
        computes the gradients along with the value, so that logits never outlive their modality. Both are exact for
        every mix of modalities; only the time of ``"blocked"`` follows it.
      slots: rows of static shape for each output modality by name, best from `target_slots`; a modality not named has
        none. Default: for half of an even share of the decoder's slots each, as padding costs more than a loop.
      block_size: rows that each pass of a loop over what is left takes; default: see `block_lengths`.

    Returns:
      (sums, counts), both float32 [num modalities], 0 for modalities without targets. Counts have no gradient.

    Raises:
      KeyError: for an unknown method or, in ``slots``, an unknown output modality.
    """
    methods = {"dense": _dense_sums, "blocked": functools.partial(_blocked_sums, slots=slots, block_size=block_size)}
    if method not in methods:
        raise KeyError(unknown_name(method, methods, "loss method"))
    tokens = batch.decoder
    sums = methods[method](modalities, hidden, head, batch.target, tokens.modality, tokens.valid)
    return sums, target_counts(batch, modalities)


def target_counts(batch: PackedBatch, modalities: ModalitySet) -> jax.Array:
    """float32 [num modalities]: valid decoder slots of each output modality (0 for the others)."""
    tokens, ranges = batch.decoder, modalities.output_ranges
    own = tokens.modality[..., None] == jnp.arange(len(modalities))
    own &= tokens.valid[..., None] & jnp.asarray(ranges[:, 1] > ranges[:, 0])
    return own.astype(jnp.float32).sum((0, 1))


def modality_weights(counts: jax.Array, modalities: ModalitySet, loss_type: str = "mod") -> jax.Array:
    """float32 [num modalities]: what each modality's sum is multiplied with so that the total is the loss.

    ``"mod"`` is the loss of all published 4M models (4M, section 3; the reference implementation): the mean over all
    output modalities, those without targets included, of the modality's mean; here over the global batch. ``"token"``
    is the mean over all targets. Raises KeyError for another ``loss_type``.
    """
    if loss_type == "mod":
        return jnp.where(counts > 0, 1 / jnp.maximum(counts, 1), 0) / len(modalities.outputs)
    if loss_type == "token":
        return jnp.where(counts > 0, 1 / jnp.maximum(counts.sum(), 1), 0)
    raise KeyError(unknown_name(loss_type, ("mod", "token"), "loss type"))


# ---- dense


def _dense_sums(modalities, hidden, head, target, modality, valid):
    sums = [jnp.zeros((), jnp.float32)] * len(modalities)
    for name, start in modalities.output_offset.items():
        index, stop = modalities.index(name), start + modalities[name].vocab_size
        own = valid & (modality == index)
        kernel = head[start:stop].astype(hidden.dtype)
        logits = jnp.einsum("bmd,vd->bmv", hidden, kernel, preferred_element_type=jnp.float32)
        hit = jnp.arange(start, stop) == target[..., None]
        loss = jax.nn.logsumexp(logits, -1) - jnp.where(hit, logits, 0).sum(-1)
        sums[index] = jnp.where(own, loss, 0).sum()
    return jnp.stack(sums)


# ---- blocked
#
# Targets are sorted by modality. Every modality has a fixed number of slots, a little under what the masking recipe is
# expected to give it, and the first targets of a modality fill them: one product per modality for the logits, one for
# each gradient, of shapes that are known when compiling. What does not fit goes through loops that run as often as the
# batch needs: most often once a modality. Modalities with vocabularies of one size share their loops, so that 4M-21 has
# as many of them as 4M-7.


def target_slots(expected: Mapping[str, float], samples: int) -> dict[str, int]:
    """Rows to reserve for every modality: what is expected of ``samples`` samples, rounded down to a multiple of 128.

    ``expected`` holds the targets that the masking recipe gives a modality in a sample, on average, counting what a
    modality is too short to use as lost: an expectation that is too high costs rows of padding in every batch, one that
    is too low costs passes through the loop. Of one recipe, pass the same for every batch size.

    Rounding down keeps the rows multiplied, static and in loops, at 1.05 to 1.13 times the targets' own for the recipes
    of 4M-7 and 4M-21 and 64 to 128 samples a device; see `multiplied_rows`. The time is flat around it: for a B model
    on 64 x 256 targets of 4M-7, estimated from the schedule for a TPU v4, it is 7.6 ms (6.1 static, 1.5 in loops), with
    15 % more slots 7.4 ms (6.9 and 0.5), with loops only and blocks of 512 rows 9.0 ms, and "dense" 44 ms.
    """
    return {name: int(mean * samples) // ROW_MULTIPLE * ROW_MULTIPLE for name, mean in expected.items()}


def block_lengths(num_slots: int, block_size: int | None = None) -> tuple[int, ...]:
    """Rows that the passes of the loops over what is left take, increasing, for ``num_slots`` decoder slots a device.

    From 8,192 slots on they are 1/128, 1/64 and 1/32 of the slots: a rest of up to 3 of the shortest takes at most two
    passes. A pass reads and writes a whole head, which on a TPU v4 takes as long as the products of about 300 rows.
    Fewer slots, or a ``block_size``, have one length, 1/32 of the slots: a third of the code to compile.
    """
    if block_size is not None:
        return (block_size,)
    unit = 1 << (max(num_slots // 128, 1).bit_length() - 1)
    return (unit, 2 * unit, 4 * unit) if num_slots >= 8192 else (max(64, 4 * unit),)


def multiplied_rows(counts: np.ndarray, slots: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Rows that the blocked form takes through each head; the three products of a row cost 6 D V FLOPs.

    Args:
      counts: integers [..., outputs], the targets of each output modality on one device.
      slots: integers [outputs], as `target_slots` gives them.
      lengths: as `block_lengths` gives them.

    Returns:
      Integers [..., outputs]. With the recipes of 4M-7 and 4M-21, the matrix products cost this many times those of
      the targets alone (mean over drawn batches; lengths of texts uniform up to their maximum):

                 64 x 256   64 x 128   128 x 128   samples x targets a device
          4M-7     1.06       1.05       1.05
          4M-21    1.13       1.10       1.10
    """
    left = np.maximum(np.asarray(counts) - slots, 0)
    return slots + -(-left // lengths[0]) * lengths[0]


@dataclasses.dataclass(frozen=True)
class _Output:
    """One output modality: its vocabulary, its first row of the head, and its static slots."""

    vocab: int
    start: int
    slots: int

    @property
    def rows(self) -> int:
        return round_up(self.vocab)


def _blocked_sums(modalities, hidden, head, target, modality, valid, *, slots, block_size):
    outputs, num = modalities.outputs, len(modalities.outputs)
    if slots is None:
        slots = target_slots(dict.fromkeys(outputs, target.shape[1] / num / 2), target.shape[0])
    for name in slots:
        if name not in outputs:
            raise KeyError(unknown_name(name, outputs, "output modality (slots of the loss name one)"))
    if target.size * (num + 1) >= 2**31:
        raise ValueError(f"{target.size} decoder slots a device are too many to be sorted by {num} modalities")
    lengths = block_lengths(target.size, block_size)
    plan = tuple(_Output(modalities[n].vocab_size, modalities.output_offset[n], slots.get(n, 0)) for n in outputs)
    indices = np.array([modalities.index(name) for name in outputs])
    # Slots without a target (padding, or a modality that is no output) form one more group, which is dropped.
    group_of = np.full(len(modalities), num, np.int32)
    group_of[indices] = np.arange(num)
    group = jnp.where(valid, jnp.asarray(group_of)[modality], num)
    sums = _blocked(plan, lengths, hidden.reshape(-1, hidden.shape[-1]), head, target.reshape(-1), group)
    return jnp.zeros(len(modalities), jnp.float32).at[indices].set(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(plan, lengths, hidden, head, target, group):
    return _blocked_pass(plan, lengths, hidden, head, target, group, gradients=False)[0]


def _blocked_forward(plan, lengths, hidden, head, target, group):
    sums, d_hidden, d_head = _blocked_pass(plan, lengths, hidden, head, target, group, gradients=True)
    return sums, (d_hidden, d_head, group)


def _blocked_backward(plan, lengths, residuals, cotangent):
    # A slot's loss enters one sum only, so both gradients are those of the plain sum, scaled by its cotangent.
    d_hidden, d_head, group = residuals
    per_slot = jnp.append(cotangent, 0)[group.reshape(-1)]
    per_row = jnp.concatenate([jnp.broadcast_to(g, output.rows) for g, output in zip(cotangent, plan, strict=True)])
    d_hidden = (d_hidden * per_slot[:, None]).astype(d_hidden.dtype)
    return d_hidden, (d_head * per_row[:, None]).astype(d_head.dtype), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocked_pass(plan, lengths, hidden, head, target, group, *, gradients):
    """Sums [outputs]; with ``gradients`` also those of hidden [T, D] and head [rows, D], each in its own dtype."""
    size, num = hidden.shape[0], len(plan)
    slots = np.array([output.slots for output in plan])
    own = (group[..., None] == jnp.arange(num)).astype(jnp.float32)  # [B, M, outputs]
    counts = own.sum((0, 1)).astype(jnp.int32)
    first = jnp.cumsum(counts) - counts
    # One sort, of numbers that are all different, gives the order and moves the targets along.
    order, target = jax.lax.sort((group.reshape(size) * size + jnp.arange(size), target), num_keys=1)
    room = max(lengths[-1], slots.max()) + 1
    order, target = jnp.pad(order % size, (0, room)), jnp.pad(target, (0, room))

    sums, d_laid, d_head, after = [], [], [], jnp.zeros((), jnp.int32)
    for k, output in enumerate(plan):
        kernel, loss, parts = head[output.start : output.start + output.rows].astype(hidden.dtype), 0.0, []
        logits_bytes = output.slots * output.rows * hidden.dtype.itemsize
        for begin, length in _parts(output.slots, -(-logits_bytes // LOGITS_BYTES)):
            place, t = (jax.lax.dynamic_slice_in_dim(a, first[k] + begin + after, length) for a in (order, target))
            x, valid = hidden[place], begin + jnp.arange(length) < counts[k]
            part, d_logits = _cross_entropy(x, kernel, t - output.start, valid, output.vocab)
            loss += part
            if gradients:
                d_laid.append(d_logits @ kernel)
                parts.append((d_logits, x))
            # One part after the other: the compiler would merge their sums, and the logits of all would leave CMEM.
            # It drops barriers before that, and cannot know that this is 0 (with a NaN all is lost anyhow).
            after = jnp.isnan(d_laid[-1][0, 0] if gradients else part).astype(jnp.int32)
        sums.append(jnp.asarray(loss, jnp.float32))
        if parts:
            d_logits, x = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
            d_head.append(_d_kernel(d_logits, x).astype(head.dtype))
        else:
            d_head.append(jnp.zeros((output.rows, head.shape[1]), head.dtype))
    carry = jnp.stack(sums), None, None
    if gradients:
        d_hidden = jnp.zeros_like(hidden)
        if d_laid:
            place = _static_place(own, slots).reshape(size)
            rows = jnp.concatenate(d_laid)[jnp.maximum(place, 0)]
            d_hidden = jnp.where((place >= 0)[:, None], rows, 0)
        carry = jnp.stack(sums), d_hidden, jnp.concatenate(d_head)
    left = jnp.maximum(counts - slots, 0)
    for vocab in dict.fromkeys(output.vocab for output in plan):
        carry = _left_over(plan, vocab, lengths, hidden, head, order, target, first + slots, left, carry)
    return carry


def _parts(length, num):
    """(begin, length) of ``num`` parts, all but the last equal and a multiple of 16 rows (a tile of bfloat16)."""
    step = round_up(-(-length // max(num, 1)), 16)
    return [(begin, min(step, length - begin)) for begin in range(0, length, step)] if length else []


def _static_place(own, slots):
    """int32 [B, M]: the row among the static slots of each decoder slot, -1 if it has none; ``own`` [B, M, outputs]."""
    # A product with a triangle counts exactly, and faster than a cumulative sum over thousands of slots.
    length = own.shape[1]
    within = jnp.einsum("mn,bnk->bmk", jnp.tri(length, k=-1), own)
    per_sample = own.sum(1)
    rank = within + (jnp.cumsum(per_sample, 0) - per_sample)[:, None]
    static = own * (rank < slots)
    return (static * (rank + (np.cumsum(slots) - slots) + 1)).sum(-1).astype(jnp.int32) - 1


def _left_over(plan, vocab, lengths, hidden, head, order, target, begin, left, carry):
    """Adds to ``carry`` (sums, d_hidden, d_head) what did not fit the slots, for the outputs with that vocabulary.

    The targets at ``begin`` ... ``begin + left`` of the sorted ones are left of each output.
    """
    size, dim = hidden.shape
    members = [k for k, output in enumerate(plan) if output.vocab == vocab]
    starts = jnp.asarray([plan[k].start for k in members], jnp.int32)
    rows, numbers = plan[members[0]].rows, jnp.asarray(members, jnp.int32)
    begin, left = begin[numbers], left[numbers]
    gradients = carry[2] is not None

    def block(length, j, row, num, sums, d_hidden):
        kernel = jax.lax.dynamic_slice_in_dim(head, starts[j], rows).astype(hidden.dtype)
        place, t = (jax.lax.dynamic_slice_in_dim(a, row, length) for a in (order, target))
        valid = jnp.arange(length) < num
        x = hidden[place]
        loss, d_logits = _cross_entropy(x, kernel, t - starts[j], valid, vocab)
        sums += loss * (jnp.arange(len(plan)) == numbers[j])
        if gradients:
            nowhere = size + jnp.arange(length)
            place = jnp.where(valid, place, nowhere)
            d_hidden = d_hidden.at[place].set(d_logits @ kernel, mode="drop", unique_indices=True)
        return sums, d_hidden, d_logits, x

    def add(d_head, j, product):
        old = jax.lax.dynamic_slice_in_dim(d_head, starts[j], rows)
        return jax.lax.dynamic_update_slice_in_dim(d_head, (old + product).astype(d_head.dtype), starts[j], 0)

    def many(j, carry):
        def body(i, carry):
            sums, d_hidden, d_kernel = carry
            done = i * longest
            sums, d_hidden, d_logits, x = block(longest, j, begin[j] + done, left[j] - done, sums, d_hidden)
            return sums, d_hidden, d_kernel + _d_kernel(d_logits, x) if gradients else None

        sums, d_hidden, d_head = carry
        zeros = jnp.zeros((rows, dim), jnp.float32) if gradients else None
        sums, d_hidden, d_kernel = jax.lax.fori_loop(0, blocks[j], body, (sums, d_hidden, zeros))
        return sums, d_hidden, add(d_head, j, d_kernel) if gradients else None

    def one(length, j, carry):
        sums, d_hidden, d_head = carry
        # Shorter blocks come after longer ones.
        done = units[j] // (2 * length // lengths[0]) * (2 * length)
        sums, d_hidden, d_logits, x = block(length, j, begin[j] + done, left[j] - done, sums, d_hidden)
        return sums, d_hidden, add(d_head, j, _d_kernel(d_logits, x)) if gradients else None

    units, longest = -(-left // lengths[0]), lengths[-1]
    blocks = units // (longest // lengths[0])
    loops = [(blocks, many)]
    loops += [(units // (n // lengths[0]) % 2, functools.partial(one, n)) for n in reversed(lengths[:-1])]
    for some, body in loops:
        those = jnp.argsort(some == 0, stable=True)
        step = lambda i, carry, those=those, body=body: body(those[i], carry)  # noqa: E731
        carry = jax.lax.fori_loop(0, (some > 0).sum(), step, carry)
    return carry


def _cross_entropy(x, kernel, target, valid, vocab):
    """Summed loss of rows [T, D] with one head [V, D] (``vocab`` true rows), and d loss / d logits [T, V] like ``x``.

    Logits are kept in the dtype of ``x`` and reduced in float32: in bfloat16 they are half as large (140 MB for 2,300
    rows and 30,000 words), and the errors of rounding are those of the released models' training under autocast.
    """
    logits = jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ()))).astype(jnp.float32)
    column = jnp.arange(kernel.shape[0])
    if vocab < kernel.shape[0]:
        logits = jnp.where(column < vocab, logits, jnp.finfo(jnp.float32).min)
    top = logits.max(-1)
    normaliser = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
    # A comparison instead of a gather: it fuses with its neighbours.
    hit = column == target[:, None]
    loss = jnp.where(valid, normaliser - jnp.where(hit, logits, 0).sum(-1), 0).sum()
    d_logits = (jnp.exp(logits - normaliser[:, None]) - hit) * valid[:, None]
    return loss, d_logits.astype(x.dtype)


def _d_kernel(d_logits, x):
    """float32 [V, D]: the gradient of one head from its rows."""
    return jax.lax.dot_general(d_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
