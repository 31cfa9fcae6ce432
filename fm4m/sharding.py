"""Where every array lives: one mesh, one table from the role of a parameter to its layout, one layout for batches.

Mesh axes: ``data`` (copies of the parameters; across slices), ``fsdp`` (parameters, optimizer state and batch are
split) and ``tensor`` (matrices are split along heads and hidden units; all its devices see the same samples). The mesh
is in JAX's Explicit mode: layouts are part of the arrays' types, and an operation with an unclear layout is an error.

Forward and backward pass run inside one `jax.shard_map`, as a program for one device (`local_rows` makes it): weights
come in as this device's parts, are gathered where they are used (`layer_weights`, `whole_weights`), and gradients leave
as the same parts (`reduce_gradients`). Left to the compiler, every layer's gradient is summed whole on all devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fm4m import collectives
from fm4m.batch import RawBatch
from fm4m.config_file import ConfigError
from fm4m.optim import path_name
from fm4m.stream import Stream

AXES = ("data", "fsdp", "tensor")

# The rows of a batch are split over both axes that hold different samples.
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)

# Role of a parameter (its whole path) -> layout; the first match counts. Layers are stacked along a leading axis that
# is never split. Matrices are (in, out). All are split by rows over fsdp: on TPU, gradients of weights that are split
# along their last dimension are summed whole instead of scattered, and so are those of fewer than 16 rows a device (of
# B's 768 rows, beyond 48 devices). Tables have multiples of 128 rows. What is not a matrix or a table is under 0.1 % of
# the parameters, and copied everywhere.
PARAMETERS: tuple[tuple[str, P], ...] = (
    (r"(encoder|decoder)/.*(query|key|value|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(encoder|decoder)/.*(query|key|value|gate|up)/bias", P(None, "tensor")),
    (r"(encoder|decoder)/.*(out|down)/kernel", P(None, ("tensor", "fsdp"), None)),
    (r"context_projection/kernel", P("fsdp", "tensor")),
    (r"encoder_embedding/projections/.*/kernel", P(None, "fsdp")),
    (r"(encoder_embedding|decoder_embedding|head)/tokens", P("fsdp", "tensor")),
    (r"(encoder_embedding|decoder_embedding)/(modality|positions|registers|mask_token)", P()),
    (r".*/(scale|bias)", P()),
)

# The fsdp axis that -1 stands for has at most so many devices: a plane of a TPU v4 cube of 64 chips. Over all 64 the
# compiler no longer scatters gradients but sums them whole, twice the bytes.
LARGEST_FSDP = 16


def make_mesh(data: int = -1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    One axis may be -1 and takes the devices that the others leave. If both ``data`` and ``fsdp`` are, fsdp takes the
    largest number of at most `LARGEST_FSDP` that divides the devices of a slice, and data the rest. Slices (groups of
    TPUs joined by a data-centre network instead of their own) always lie along ``data``.

    Raises ConfigError with the numbers if the axes do not multiply to the number of devices, or if a slice would have
    to be divided between copies.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if data == fsdp == -1 and tensor > 0 and len(devices) % (slices * tensor) == 0:
        sizes["fsdp"] = math.gcd(len(devices) // slices // tensor, LARGEST_FSDP)
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if fixed > 0 and len(devices) % fixed == 0:
        sizes = {k: len(devices) // fixed if s == -1 else s for k, s in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        shown = " x ".join(f"mesh.{k} {s}" for k, s in sizes.items())
        raise ConfigError(f"{shown} does not make the {len(devices)} devices that JAX sees; -1 stands for what is left")
    if sizes["data"] % slices:
        raise ConfigError(f"mesh.data = {sizes['data']} is not divisible by the {slices} slices, which lie along it")
    shape = tuple(sizes.values())
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 3)


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Layout of the parameter of that path, from `PARAMETERS`.

    Raises ConfigError naming the parameter if no role matches, or if a dimension is not divisible by its mesh axes.
    """
    spec = next((spec for pattern, spec in PARAMETERS if re.fullmatch(pattern, name)), None)
    if spec is None:
        raise ConfigError(f"parameter {name} {shape} has no role: add one to PARAMETERS in fm4m/sharding.py")
    if len(spec) > len(shape):
        raise ConfigError(f"parameter {name} {shape} has fewer dimensions than the layout {spec} of its role")
    for size, axes in zip(shape, spec):
        parts = math.prod(mesh.shape[axis] for axis in _axes(axes))
        if size % parts:
            shown = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in _axes(axes))
            raise ConfigError(
                f"parameter {name} {shape}: {size} is not divisible by {shown} = {parts}; choose smaller ones, or put "
                "devices on mesh.data"
            )
    return spec


def param_specs(params: Any, mesh: Mesh) -> Any:
    """The layouts of a tree of parameters (or their shapes)."""
    return jax.tree_util.tree_map_with_path(lambda path, x: param_spec(path_name(path), tuple(x.shape), mesh), params)


def check_parameters_are_split(params: Any, mesh: Mesh, most: float = 0.02) -> None:
    """Refuses to start when too much of the model is on every device, which costs its memory many times.

    A parameter counts if none of the axes that can split it (``fsdp`` and ``tensor``) does. With one device along both,
    copies are what was asked for.

    Args:
      params: a tree of arrays (or their shapes) with shardings.
      mesh: their mesh.
      most: largest share of the parameters that may be copied.

    Raises ConfigError naming the five largest copied parameters.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    total, copied = 0, []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        size = math.prod(x.shape)
        total += size
        if size == math.prod(x.sharding.shard_shape(tuple(x.shape))):
            copied.append((size, path_name(path), tuple(x.shape)))
    share = sum(size for size, _, _ in copied) / total
    if share > most:
        largest = ", ".join(f"{name} {shape}" for _, name, shape in sorted(copied, reverse=True)[:5])
        raise ConfigError(
            f"{share:.1%} of the parameters would be copied to each of the {mesh.size} devices, more than {most:.0%}; "
            f"the largest: {largest}. Give them a layout in PARAMETERS in fm4m/sharding.py, or use mesh.data alone"
        )


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings for a train state {"step", "params", "opt_state": {"mu", "nu"}, ["ema"]} of arrays or their shapes.

    Everything that is shaped like the parameters has their layout.
    """

    def like_params(tree: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(tree, mesh))

    out = {"step": replicated(mesh), "params": like_params(state["params"])}
    if "opt_state" in state:
        out["opt_state"] = {name: like_params(tree) for name, tree in state["opt_state"].items()}
    if "ema" in state:
        out["ema"] = like_params(state["ema"])
    return out


# ---- the program of one device


def local_rows(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """``function`` as a program for one device, which sees its part of every argument; layouts as `jax.shard_map`'s.

    What comes out with the layout ``P()`` must have been made equal on all devices.
    """
    # check_vma: loops that start from constants, and kernels, would each have to say over which axes they vary.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def run(*args: Any) -> Any:
        # In Explicit mode layouts are types, which must match.
        return mapped(*(reshard(a, mesh, spec) for a, spec in zip(args, in_specs, strict=True)))

    return run


def reshard(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Brings arrays to layouts: one for all leaves, or a tree of them."""
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), tree, specs)


def cast_matrices(params: Any, dtype: Any) -> Any:
    """Parameters with matrices and token tables in the compute dtype: what is gathered then has half the bytes."""

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if re.search(r"(kernel|tokens)$", path_name(path)) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def layer_weights(name: str, params: Any, mesh: Mesh) -> Any:
    """One layer's weights of a stack, gathered over ``fsdp``; what is split over ``tensor`` stays so."""
    return _gather(params, mesh, name, ("fsdp",), layers=1)


def whole_weights(name: str, params: Any, mesh: Mesh) -> Any:
    """The weights of a group that is no stack of layers, gathered over all axes."""
    return _gather(params, mesh, name, ("fsdp", "tensor"), layers=0)


def _gather(params: Any, mesh: Mesh, name: str, axes: tuple[str, ...], layers: int) -> Any:
    def whole(path: tuple, x: jax.Array) -> jax.Array:
        spec = next(spec for pattern, spec in PARAMETERS if re.fullmatch(pattern, f"{name}/{path_name(path)}"))
        for dim, split in enumerate(spec[layers:]):
            # The last axis of a dimension is the innermost.
            for axis in reversed(_axes(split)):
                if axis in axes:
                    x = collectives.gather(x, axis, dim)
        return x

    return jax.tree_util.tree_map_with_path(whole, params)


def reduce_gradients(grads: Any, specs: Any) -> Any:
    """Sums over the devices that saw other samples, as far as gathering has not done it: once, after all passes."""

    def reduce(g: jax.Array, spec: P) -> jax.Array:
        split = {axis for axes in spec for axis in _axes(axes)}
        return jax.lax.psum(g, tuple(axis for axis in BATCH_AXES if axis not in split))

    return jax.tree.map(reduce, grads, specs)


# ---- arrays on the mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, BATCH)


def batch_parts(mesh: Mesh) -> int:
    """Devices that see different rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, global_batch: int, accumulation: int = 1, key: str = "train.global_batch") -> None:
    """Raises ConfigError with all numbers if the rows of a pass cannot be split evenly over the devices."""
    groups = batch_parts(mesh)
    if global_batch % (groups * accumulation):
        step = groups * accumulation
        below = global_batch // step * step
        raise ConfigError(
            f"{key} = {global_batch} is not divisible by mesh.data {mesh.shape['data']} x "
            f"mesh.fsdp {mesh.shape['fsdp']} x train.accumulation {accumulation} = {step}; "
            f"the nearest that are: {below or step} and {below + step}"
        )


def loader_shard(mesh: Mesh, global_batch: int) -> tuple[int, int]:
    """(shard, shards): which rows of every global batch this process must read.

    They follow from the layout and not from the process's number, since processes that share samples (a ``tensor`` axis
    across hosts) must read the same rows.

    Raises ConfigError if this process's rows are not one aligned block.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((global_batch,))
    spans = sorted({index[0].indices(global_batch)[:2] for index in indices.values()})
    low, high = spans[0][0], spans[-1][1]
    together = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    if not together or low % (high - low) or global_batch % (high - low):
        raise ConfigError(
            f"process {jax.process_index()} would need rows {spans} of {global_batch}, which is not one aligned block; "
            "give every process the same number of devices"
        )
    return low // (high - low), global_batch // (high - low)


def wait_for_all(event: str, seconds: int = 3600) -> None:
    """Returns when every process of the run has come here with the same ``event``; at once for a single process.

    To be called between compiling a program and running it: processes compile at different speeds, and one that is half
    a minute late makes the first collective operation of the others time out.
    """
    if jax.process_count() > 1:
        orbax.checkpoint.multihost.get_barrier_sync_fn()(key=event, timeout_ms=seconds * 1000)


def on_one_device(tree: Any) -> Any:
    """Whole arrays on this process's first device, for programs that know nothing of the mesh."""
    device = jax.local_devices()[0]
    return jax.tree.map(lambda x: jax.device_put(to_host(x), device), tree)


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array in every process, wherever its parts live."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(array, tiled=True)


def to_devices(mesh: Mesh, local: Any, global_batch: int) -> Any:
    """Makes global arrays [global_batch, ...] of this process's rows (a pytree of numpy arrays), without copies between
    processes."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (global_batch, *x.shape[1:]))

    return jax.tree.map(put, local)


def device_batches(
    stream: Stream, mesh: Mesh, *, position: int, global_batch: int, limit: int | None = None
) -> Iterator[tuple[RawBatch, jax.Array]]:
    """Batches of a stream on the devices, each with the stream position of every row.

    Args:
      stream: where they come from.
      mesh: the devices; every process reads and sends its own rows.
      position: first sample.
      global_batch: rows of a batch, over all processes.
      limit: samples at this position and later are emptied, and batches of nothing else not yielded.

    Yields:
      (raw batch of global arrays, uint32 [global_batch]).
    """
    shard, shards = loader_shard(mesh, global_batch)
    rows = np.arange(global_batch // shards) + shard * (global_batch // shards)
    batches = stream.batches(position=position, global_batch=global_batch, shard=shard, shards=shards)
    for raw in batches:
        if limit is not None:
            if position >= limit:
                return
            keep = (rows + position < limit)[:, None]
            raw = dataclasses.replace(raw, length=np.where(keep, raw.length, 0).astype(np.int16))
        yield to_devices(mesh, (raw, (rows + position).astype(np.uint32)), global_batch)
        position += global_batch
