"""What devices say to each other inside the per-device program of a step (`jax.shard_map`), and table lookups.

The model is written for one device: it calls these functions where the split over the ``tensor`` axis begins and ends,
and they do nothing where there is no such axis (one device, or outside `jax.shard_map`).

The split is that of Megatron-LM (Shoeybi et al. 2019, section 3): the first matrices of a block (query, key, value,
gate, up) are split by columns, the last (out, down) by rows, and only the block's output is summed over the devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

FSDP, TENSOR = "fsdp", "tensor"

# Tables of at most so many rows get their gradient from a product with one-hot vectors.
FEW_ROWS = 64


def axis_size(axis: str) -> int:
    """Devices along a mesh axis inside `jax.shard_map`; 1 where there is no such axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if not mesh.empty and axis in mesh.manual_axes else 1


def enter_split(x: jax.Array) -> jax.Array:
    """Where the split part of a block begins: the same array, whose gradient is the sum over the split parts."""
    return _enter(x) if axis_size(TENSOR) > 1 else x


def leave_split(x: jax.Array) -> jax.Array:
    """Where it ends: the sum over the split parts, whose gradient every part gets whole."""
    return _leave(x) if axis_size(TENSOR) > 1 else x


@jax.custom_vjp
def _enter(x):
    return x


_enter.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, TENSOR),))


@jax.custom_vjp
def _leave(x):
    return jax.lax.psum(x, TENSOR)


_leave.defvjp(lambda x: (jax.lax.psum(x, TENSOR), None), lambda _, g: (g,))


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The whole of an array whose dimension ``dim`` is split over a mesh axis.

    Over ``fsdp``, whose devices see different samples, the gradient is summed and split again (a reduce-scatter). Over
    ``tensor``, whose devices compute the same gradient, each takes its part of it.
    """
    if axis_size(axis) == 1:
        return x
    if axis == TENSOR:
        return _gather_same(x, dim)
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_same(x, dim):
    return jax.lax.all_gather(x, TENSOR, axis=dim, tiled=True)


def _own_part(dim, _, g):
    size = g.shape[dim] // axis_size(TENSOR)
    return (jax.lax.dynamic_slice_in_dim(g, jax.lax.axis_index(TENSOR) * size, size, dim),)


_gather_same.defvjp(lambda x, dim: (_gather_same(x, dim), None), _own_part)



@jax.named_scope("embeddings")
def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """``table[index]``: rows [..., D] of a table [V, D], indices beyond it clipped.

    The gradient is added up in float32 and rounded once to the table's dtype: a common word is looked up hundreds of
    times in a batch, and a bfloat16 sum stops growing at 256 equal terms. For tables of a few rows, which every token
    looks up, it is a matrix product, because additions to one row wait for each other.
    """
    return _take_rows(jnp.asarray(table), jnp.clip(index, 0, table.shape[0] - 1))


@jax.custom_vjp
def _take_rows(table, index):
    return table.at[index].get(mode="promise_in_bounds")


def _take_rows_forward(table, index):
    return _take_rows(table, index), (index, jnp.zeros((0, table.shape[0]), table.dtype))


def _take_rows_backward(residuals, g):
    index, like = residuals
    rows, g = like.shape[1], g.astype(jnp.float32)
    if rows <= FEW_ROWS:
        total = jnp.einsum("...v,...d->vd", jax.nn.one_hot(index, rows, dtype=jnp.float32), g)
    else:
        total = jnp.zeros((rows, g.shape[-1]), jnp.float32).at[index].add(g)
    return total.astype(like.dtype), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
