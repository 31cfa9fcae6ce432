"""Fingerprints of a train state: 64 bits for each array, which say after a restore that not a bit of it has changed.

Each word of an array is mixed with its index in the whole array, and the results are added modulo 2^32, twice in
different ways. Addition does not depend on the order, so the fingerprint is the same for every mesh, layout and number
of processes. It costs one pass over memory, where the arrays are. It detects damage, not forgery.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fm4m.optim import path_name

# Odd, so that products with them are one-to-one modulo 2^32: 2^32 divided by the golden ratio, and primes of xxHash.
INDEX_FACTOR, WORD_FACTOR, SECOND_INDEX_FACTOR = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
# Words that NumPy takes at a time: its few temporary arrays then stay in the processor's cache (256 KiB each).
BLOCK = 2**16


def fingerprints(tree: Any) -> tuple[dict[str, str], list[str]]:
    """The fingerprint of every array of a tree, by path; all processes of a run must call it for the same tree.

    Args:
      tree: arrays of 8, 16 or 32-bit types, each on one device or on a mesh whose axes divide its dimensions.

    Returns:
      ({"head/tokens": 16 hexadecimal digits, ...}, paths of the arrays whose copies on several devices differ). The
      fingerprint is that of the first copy.

    Raises TypeError for an array of another type or layout.
    """
    arrays = {path_name(p): jnp.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    on_mesh: dict[Mesh | None, list[str]] = {}
    for name, x in arrays.items():
        if x.dtype.itemsize > 4 or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is {x.dtype}: fingerprints are for types of at most 32 bits")
        if not isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1:
            raise TypeError(f"{name} has the layout {x.sharding}: fingerprints are for arrays on a mesh or one device")
        on_mesh.setdefault(x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None, []).append(name)
    # [arrays, 2, 2]: sums over the first copy, and over all copies.
    sums = dict.fromkeys(arrays, np.zeros((2, 2), np.uint32))
    for mesh, names in on_mesh.items():
        group = [arrays[name] for name in names]
        on_cpu = next(iter(group[0].sharding.device_set)).platform == "cpu"
        by_device = _host_sums(group) if on_cpu else _device_sums(mesh, group)
        for i, name in enumerate(names):
            for shard in arrays[name].addressable_shards:
                one = by_device[shard.device][i]
                sums[name] = sums[name] + np.stack([one if shard.replica_id == 0 else np.zeros_like(one), one])
    total = np.stack([*sums.values()]) if sums else np.zeros((0, 2, 2), np.uint32)
    # Arrays that a process has for itself, as those of a model that each reads whole, are its own affair.
    shared = [not x.is_fully_addressable for x in arrays.values()]
    if any(shared):
        total[shared] = multihost_utils.process_allgather(total[shared]).sum(0, dtype=np.uint32)
    found, unequal = {}, []
    for (name, x), (first, every) in zip(arrays.items(), total, strict=True):
        found[name] = f"{first[0]:08x}{first[1]:08x}"
        parts = math.prod(n // part for n, part in zip(x.shape, x.sharding.shard_shape(x.shape)) if n)
        if (every != first * np.uint32(x.sharding.num_devices // parts)).any():
            unequal.append(name)
    return found, unequal


def _host_sums(arrays: Sequence[jax.Array]) -> dict[jax.Device, np.ndarray]:
    """uint32 [arrays, 2] of the parts on each device, by NumPy: on CPUs it is as fast as XLA's program, which takes
    seconds to compile."""
    out: dict[jax.Device, np.ndarray] = {}
    for i, x in enumerate(arrays):
        for shard in x.addressable_shards:
            sums = out.setdefault(shard.device, np.zeros((len(arrays), 2), np.uint32))
            sums[i] = host_sums(np.asarray(shard.data), [index.start or 0 for index in shard.index], x.shape)
    return out


def host_sums(part: np.ndarray, offsets: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """uint32 [2]: the two sums over a part, at ``offsets``, of an array of that shape."""
    if not part.size:
        return np.zeros(2, np.uint32)
    words = np.ascontiguousarray(part).reshape(-1, part.shape[-1] if part.ndim else 1)
    words = words.view(f"uint{8 * part.dtype.itemsize}")
    rows = np.zeros((1,), np.uint32)
    for dim in range(part.ndim - 1):
        stride = math.prod(shape[dim + 1 :])
        start = ((offsets[dim] + np.arange(part.shape[dim], dtype=np.uint64)) * stride).astype(np.uint32)
        rows = (rows[:, None] + start).reshape(-1)
    columns = np.arange(words.shape[1], dtype=np.uint32) + np.uint32(offsets[-1] if part.ndim else 0)
    total, step = [0, 0], max(BLOCK // max(words.shape[1], 1), 1)
    for begin in range(0, len(words), step):
        word = words[begin : begin + step].astype(np.uint32)
        index = rows[begin : begin + step, None] + columns
        for i, mixed in enumerate(_before_mixing(word, index, np.uint32)):
            total[i] += int(_mix(mixed, np.uint32).sum(dtype=np.uint32))
    return np.array([x % 2**32 for x in total], np.uint32)


def _device_sums(mesh: Mesh | None, arrays: Sequence[jax.Array]) -> dict[jax.Device, np.ndarray]:
    """uint32 [arrays, 2] of the parts on each device, by one program on all of them."""
    specs = tuple(P() if mesh is None else x.sharding.spec for x in arrays)
    out = _program(mesh, specs)(list(arrays))
    return {shard.device: np.asarray(shard.data)[0] for shard in out.addressable_shards}


@functools.lru_cache(maxsize=16)
def _program(mesh: Mesh | None, specs: tuple[P, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    """Jitted: arrays with these layouts -> uint32 [devices, arrays, 2], each device's row on that device."""
    if mesh is None:
        return jax.jit(lambda arrays: jnp.stack([_sums(x, (0,) * x.ndim, x.shape) for x in arrays])[None])

    def local(parts: list[jax.Array]) -> jax.Array:
        rows = []
        for x, spec in zip(parts, specs, strict=True):
            offsets, shape = [], []
            for n, axes in zip(x.shape, (*spec, *(None,) * (x.ndim - len(spec))), strict=True):
                place, count = 0, 1
                # The last axis of a dimension is the innermost.
                for axis in () if axes is None else (axes,) if isinstance(axes, str) else axes:
                    place = place * mesh.shape[axis] + jax.lax.axis_index(axis)
                    count *= mesh.shape[axis]
                offsets.append(place * n)
                shape.append(n * count)
            rows.append(_sums(x, offsets, shape))
        return jnp.stack(rows)[None]

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=P(mesh.axis_names), check_vma=False)
    )


def _sums(x: jax.Array, offsets: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    """`host_sums` as a part of a program."""
    index = jnp.zeros(x.shape, jnp.uint32)
    for dim, offset in enumerate(offsets):
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) + jnp.asarray(offset, jnp.uint32)
        index += coordinate * jnp.uint32(math.prod(shape[dim + 1 :]) % 2**32)
    if x.dtype == jnp.bool_:
        word = x.astype(jnp.uint32)
    else:
        word = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    return jnp.stack([_mix(y, jnp.uint32).sum(dtype=jnp.uint32) for y in _before_mixing(word, index, jnp.uint32)])


def _before_mixing(word: Any, index: Any, uint32: Callable) -> tuple[Any, Any]:
    """Two ways to join a word and its index, which is taken modulo 2^32: it repeats in arrays of over 16 GiB."""
    return (
        word ^ (index * uint32(INDEX_FACTOR)),
        word * uint32(WORD_FACTOR) + index * uint32(SECOND_INDEX_FACTOR),
    )


def _mix(x: Any, uint32: Callable) -> Any:
    """A one-to-one map of 32 bits in which every bit depends on all others: the finalizer of MurmurHash3.

    With sums of products instead, two values that differ in their sign alone could change places unseen.
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> uint32(shift))) * uint32(factor)
    return x ^ (x >> uint32(16))
