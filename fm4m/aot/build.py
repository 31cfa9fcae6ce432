"""The real train step of a configuration on the devices of a topology, with abstract arguments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from fm4m import configured, expected, flops, loss, optim, sharding
from fm4m import model as model_lib
from fm4m import plan as plans
from fm4m import step as step_lib
from fm4m.aot import topology as topology_lib
from fm4m.batch import RawBatch, abstract_batch
from fm4m.modalities import round_up


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that can be lowered.

    Attributes:
      step: the jitted step.
      arguments: its abstract arguments, with shardings: state, raw batch, stream positions.
      mesh: of the topology's devices.
      facts: everything about it that a report needs, as plain JSON.
    """

    step: Any
    arguments: tuple[Any, RawBatch, jax.ShapeDtypeStruct]
    mesh: Mesh
    facts: dict[str, Any]


def build(config: Any, topology: topology_lib.Topology) -> Program:
    """Makes the step as `fm4m.train` does. Raises ConfigError for a configuration that cannot run there."""
    modalities, masking, tasks = configured.mixture(config)
    mesh = sharding.make_mesh(**config.mesh, devices=topology_lib.devices(topology))
    sharding.check_batch(mesh, config.train.global_batch, config.train.accumulation)
    model = plans.make_model_config(config, "tpu", masking.most_tokens)
    steps, warmup, cooldown = plans.lengths(config, masking)
    optimizer = optim.from_config(config, steps, warmup, cooldown)
    state = step_lib.abstract_state(config, model, modalities, optimizer, mesh)
    sharding.check_parameters_are_split(state["params"], mesh)
    raw, positions = abstract_batch(modalities, config.train.global_batch, sharding.batch_sharding(mesh))
    step = step_lib.make_step(config, model, modalities, masking, tasks, optimizer, mesh)
    targets, deviations = expected.expected_targets(modalities, masking, tasks)
    targets = expected.corrected(targets, config.train.expected_targets)
    n, m = masking.input_range[1], masking.target_range[1]
    rows = config.train.global_batch // sharding.batch_parts(mesh) // config.train.accumulation
    outputs = modalities.outputs
    facts = {
        "topology": {"name": topology.name, "slices": topology.slices, "description": topology.describe()},
        "chips": topology.chips,
        "hosts": topology.hosts,
        "places": [_place(d) for d in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "model": {"name": config.model.name, **dataclasses.asdict(model)},
        "parameters": model_lib.param_counts(model, modalities),
        "global_batch": config.train.global_batch,
        "accumulation": config.train.accumulation,
        "batch_per_chip": config.train.global_batch / topology.chips,
        "rows_per_pass": rows,
        "inputs": n,
        "targets": m,
        "steps": steps,
        "bytes": {
            "parameters": bytes_per_device(state["params"]),
            "optimizer state": bytes_per_device(state["opt_state"]),
            "EMA": bytes_per_device(state.get("ema", {})),
            "batch": bytes_per_device((raw, positions)),
        },
        "flops_per_sample": {
            "trunk": flops.trunk_flops(model, modalities, n, m),
            "heads": flops.head_flops(model, modalities, targets),
        },
        "expected_targets": targets,
        "target_deviations": deviations,
        "loss": {
            "slots": expected.loss_slots(modalities, masking, tasks, rows, config.train.expected_targets),
            "lengths": loss.block_lengths(rows * m),
        },
        "vocabularies": {name: round_up(modalities[name].vocab_size) for name in outputs},
    }
    return Program(step, (state, raw, positions), mesh, facts)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _place(device: Any) -> tuple[int, list[int]]:
    return int(getattr(device, "slice_index", 0) or 0), [int(c) for c in device.coords]
