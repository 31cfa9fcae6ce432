"""Cross-entropy over many vocabularies, as sums and counts per modality; means are taken once, at the end.

    sums, counts = cross_entropy_sums(hidden, head, batch, modalities)
    loss = (modality_weights(counts, modalities) * sums).sum()

Sums and counts of micro-batches (or of evaluation batches) add up exactly; weights come from the added counts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from fm4m.batch import PackedBatch
from fm4m.modalities import ModalitySet, round_up, unknown_name


def cross_entropy_sums(
    hidden: jax.Array,
    head: jax.Array,
    batch: PackedBatch,
    modalities: ModalitySet,
    method: str = "blocked",
    *,
    block_size: int | None = None,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy (in nats) and number of targets of every modality.

    Args:
      hidden: [B, M, D] decoder states; matrix multiplications run in its dtype, sums in float32.
      head: [output_rows, D], the output head; its gradient comes back in its dtype.
      batch: gives target, modality and validity of each decoder slot; only valid slots count.
      modalities: the modality set that the head's rows follow.
      method: ``"dense"`` multiplies every slot with every head and is the form to compare with. ``"blocked"``
        multiplies every slot with its own head only, so that the cost does not grow with the number of modalities, and
        computes the gradients along with the value, so that logits never outlive a block.
      block_size: slots a block of ``"blocked"``; default 1/32 of the slots of a device (a power of 2), 64 to 1024.
        Half a block per modality is wasted on average.
      mesh: devices over which the batch is spread; needed by ``"blocked"`` when there is more than one.
      batch_axes: the axes of ``mesh`` that divide the batch. Sums and counts are of the whole batch; the head is used
        whole by every device.

    Returns:
      (sums, counts), both float32 [num modalities], 0 for modalities without targets. Counts have no gradient.

    Raises:
      KeyError: for an unknown method.
      ValueError: if ``mesh`` and ``batch_axes`` do not go together.
    """
    methods = {"dense": _dense_sums, "blocked": functools.partial(_blocked_sums, block_size=block_size)}
    if method not in methods:
        raise KeyError(unknown_name(method, methods, "loss method"))
    if (mesh is None) != (not batch_axes):
        raise ValueError(f"mesh and batch_axes go together, got mesh={mesh} and batch_axes={batch_axes}")
    sums_of, tokens = functools.partial(methods[method], modalities), batch.decoder
    args = (hidden, head, batch.target, tokens.modality, tokens.valid)
    if mesh is None:
        sums = sums_of(*args)
    else:
        split, whole = PartitionSpec(batch_axes), PartitionSpec()
        specs = (split, whole, split, split, split)
        if AxisType.Explicit in mesh.axis_types:  # where shardings are types they must match, not just be convertible
            args = tuple(jax.sharding.reshard(arg, spec) for arg, spec in zip(args, specs, strict=True))
        sums = jax.shard_map(
            lambda *local: jax.lax.psum(sums_of(*local), batch_axes),
            mesh=mesh,
            in_specs=specs,
            out_specs=whole,
            check_vma=False,  # the loops of the blocked form start from constants, which the check calls invariant
        )(*args)
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
# Slots are laid out anew so that each modality starts at a block boundary; then a loop per modality, with a trip count
# that follows the batch, takes one block of slots at a time through that modality's head.


def _blocked_sums(modalities, hidden, head, target, modality, valid, *, block_size=None):
    dim, slots = hidden.shape[-1], target.size
    if block_size is None:
        block_size = min(1024, max(64, 1 << (max(slots // 32, 1).bit_length() - 1)))
    outputs = np.array([modalities.index(name) for name in modalities.output_offset])
    # Slots without a target (padding, or a modality that is no output) form one more group, which is dropped.
    group_of = np.full(len(modalities), len(outputs), np.int32)
    group_of[outputs] = np.arange(len(outputs))
    group = jnp.where(valid, jnp.asarray(group_of)[modality], len(outputs)).reshape(slots)
    sums = _blocked(modalities, block_size, hidden.reshape(slots, dim), head, target.reshape(slots), group)
    return jnp.zeros(len(modalities), jnp.float32).at[outputs].set(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(modalities, block_size, hidden, head, target, group):
    return _blocked_pass(modalities, block_size, hidden, head, target, group, gradients=False)[0]


def _blocked_forward(modalities, block_size, hidden, head, target, group):
    sums, d_hidden, d_head = _blocked_pass(modalities, block_size, hidden, head, target, group, gradients=True)
    return sums, (d_hidden, d_head, group)


def _blocked_backward(modalities, block_size, residuals, cotangent):
    # A slot's loss enters one sum only, so both gradients are those of the plain sum, scaled by its cotangent.
    d_hidden, d_head, group = residuals
    per_slot = jnp.append(cotangent, 0)[group]
    d_hidden = (d_hidden * per_slot[:, None]).astype(d_hidden.dtype)
    parts = [(g * part).astype(part.dtype) for g, part in zip(cotangent, d_head, strict=True)]
    return d_hidden, jnp.concatenate(parts), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocked_pass(modalities, block_size, hidden, head, target, group, *, gradients):
    """Sums [num outputs]; with ``gradients`` also those of hidden [T, D] and of the head's part of each output."""
    slots = hidden.shape[0]
    outputs = modalities.output_offset
    own = group == jnp.arange(len(outputs))[:, None]
    rank = jnp.cumsum(own.astype(jnp.int32), axis=1)  # 1-based, among the slots of the same group
    blocks = -(-rank[:, -1] // block_size)
    first = jnp.cumsum(blocks) - blocks
    # [T]: where a slot goes, past the end if it has no target.
    room = round_up(slots, block_size) + len(outputs) * block_size
    place = jnp.where(own, (first * block_size)[:, None] + rank - 1, 0).sum(0)
    place = jnp.where(group < len(outputs), place, room)
    source = jnp.full(room, -1, jnp.int32).at[place].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")
    weight = (source >= 0).astype(jnp.float32)
    laid_hidden, laid_target = hidden[jnp.maximum(source, 0)], target[jnp.maximum(source, 0)]

    d_laid = jnp.zeros_like(laid_hidden) if gradients else None
    sums, d_head = [], []
    for k, (name, start) in enumerate(outputs.items()):
        vocab = modalities[name].vocab_size
        part = head[start : start + round_up(vocab)]
        kernel = part.astype(hidden.dtype)

        def body(i, carry, k=k, start=start, vocab=vocab, kernel=kernel):
            loss, d_part, d_laid = carry
            row = (first[k] + i) * block_size
            x, t, w = (jax.lax.dynamic_slice_in_dim(a, row, block_size) for a in (laid_hidden, laid_target, weight))
            block_loss, d_logits = _block(x, kernel, t - start, w, vocab)
            if gradients:
                d_logits = d_logits.astype(x.dtype)
                d_part += jnp.einsum("tv,td->vd", d_logits, x, preferred_element_type=jnp.float32)
                d_laid = jax.lax.dynamic_update_slice_in_dim(d_laid, d_logits @ kernel, row, 0)
            return loss + block_loss, d_part, d_laid

        d_part = jnp.zeros(kernel.shape, jnp.float32) if gradients else None
        loss, d_part, d_laid = jax.lax.fori_loop(0, blocks[k], body, (jnp.zeros((), jnp.float32), d_part, d_laid))
        sums.append(loss)
        if gradients:
            d_head.append(d_part.astype(head.dtype))
    d_hidden = d_laid.at[place].get(mode="fill", fill_value=0) if gradients else None
    return jnp.stack(sums), d_hidden, d_head


def _block(x, kernel, target, weight, vocab):
    """Weighted loss of one block [T, D] with one head [V, D] (``vocab`` true rows), and d loss / d logits [T, V]."""
    logits = jnp.einsum("td,vd->tv", x, kernel, preferred_element_type=jnp.float32)
    column = jnp.arange(kernel.shape[0])
    if vocab < kernel.shape[0]:
        logits = jnp.where(column < vocab, logits, jnp.finfo(jnp.float32).min)
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    normaliser = exp.sum(-1, keepdims=True)
    # A comparison instead of a gather: it fuses with its neighbours.
    hit = column == target[:, None]
    of_target = jnp.where(hit, logits, 0).sum(-1)
    loss = (weight * (top[:, 0] + jnp.log(normaliser[:, 0]) - of_target)).sum()
    return loss, exp * (weight[:, None] / normaliser) - jnp.where(hit, weight[:, None], 0)
