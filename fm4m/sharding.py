"""Where every array lives: one mesh, one table from the role of a parameter to its layout, one layout for batches.

Mesh axes: ``data`` (copies of the parameters; across slices), ``fsdp`` (parameters, optimizer state and batch are
split) and ``tensor`` (matrices are split along heads and hidden units; all its devices see the same samples).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fm4m.batch import RawBatch
from fm4m.config import ConfigError
from fm4m.optim import path_name
from fm4m.stream import Stream

AXES = ("data", "fsdp", "tensor")

# The rows of a batch are split over both axes that hold different samples.
BATCH = P(("data", "fsdp"))

# Role of a parameter (its whole path) -> layout; the first match counts. Layers are stacked along a leading axis that
# is never split. Matrices are (in, out). Tables are split along the width: their rows are only multiples of 128, which
# 256 devices do not divide. What is not a matrix or a table is under 0.1 % of the parameters, and copied everywhere.
PARAMETERS: tuple[tuple[str, P], ...] = (
    (r"(encoder|decoder)/.*(query|key|value|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(encoder|decoder)/.*(out|down)/kernel", P(None, "tensor", "fsdp")),
    (r"context_projection/kernel", P("fsdp", "tensor")),
    (r"encoder_embedding/projections/.*/kernel", P(None, "fsdp")),
    (r"(encoder_embedding|decoder_embedding|head)/tokens", P("tensor", "fsdp")),
    (r"(encoder_embedding|decoder_embedding)/(modality|positions|registers|mask_token)", P()),
    (r".*/(scale|bias)", P()),
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run; one axis may be -1 and takes the devices that the others leave.

    Raises ConfigError with the numbers if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([s for s in sizes.values() if s != -1]))
    if len(devices) % fixed == 0:
        sizes = {k: len(devices) // fixed if s == -1 else s for k, s in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        shown = " x ".join(f"mesh.{k} {s}" for k, s in sizes.items())
        raise ConfigError(f"{shown} does not make the {len(devices)} devices that JAX sees; -1 stands for what is left")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Layout of the parameter of that path, from `PARAMETERS`.

    Raises ConfigError naming the parameter if no role matches, or if a dimension is not divisible by its mesh axis.
    """
    spec = next((spec for pattern, spec in PARAMETERS if re.fullmatch(pattern, name)), None)
    if spec is None:
        raise ConfigError(f"parameter {name} {shape} has no role: add one to PARAMETERS in fm4m/sharding.py")
    if len(spec) > len(shape):
        raise ConfigError(f"parameter {name} {shape} has fewer dimensions than the layout {spec} of its role")
    for size, axis in zip(shape, spec):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"parameter {name} {shape}: {size} is not divisible by mesh.{axis} = {mesh.shape[axis]}; "
                f"choose a smaller mesh.{axis}, or put devices on mesh.data"
            )
    return spec


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings for a train state {"step", "params", "opt_state": {"mu", "nu"}, ["ema"]} of arrays or their shapes.

    Everything that is shaped like the parameters has their layout.
    """

    def parameter(path: tuple, x: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), tuple(x.shape), mesh))

    def like_params(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(parameter, tree)

    out = {"step": replicated(mesh), "params": like_params(state["params"])}
    if "opt_state" in state:
        out["opt_state"] = {name: like_params(tree) for name, tree in state["opt_state"].items()}
    if "ema" in state:
        out["ema"] = like_params(state["ema"])
    return out


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, BATCH)


def check_batch(mesh: Mesh, global_batch: int, accumulation: int = 1, key: str = "train.global_batch") -> None:
    """Raises ConfigError with all numbers if the rows of a pass cannot be split evenly over the devices."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
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


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array in every process, wherever its parts live."""
    if jax.process_count() == 1:
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
