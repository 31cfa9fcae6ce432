"""The training step on meshes of one to eight devices; test_step.py runs this in a process of its own."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import PartitionSpec
from spoiled_stream import SpoiledStream
from tiny_run import tiny_config

from fm4m import optim, plan, sharding, step

STEPS = 3
PLAIN = {"model__mlp_ratio": 3.0}
# Everything that has parameters of its own, so that each is split, gathered and summed as it must be.
ALL = PLAIN | {
    "model__qk_norm": True, "model__qkv_bias": True, "model__proj_bias": True, "model__mlp_bias": True,
    "model__norm_bias": True, "model__num_register_tokens": 2, "model__tied_heads": False,
    "model__share_modality_embeddings": False, "model__encoder_depth": 2, "model__decoder_depth": 2,
}  # fmt: skip
CASES = {
    "8 parts, 2 passes": ((1, 8, 1), PLAIN | {"train__accumulation": 2}),
    "2 x 2 x 2, groups of layers": ((2, 2, 2), ALL | {"model__scan_group": 2, "model__remat": "projections"}),
    "2 x 4, weights again in the backward pass": ((2, 4, 1), ALL | {"model__remat": "full"}),
}
HOW = ("train__accumulation", "model__remat", "model__scan_group")


def run(shape, changes, start=None):
    """(losses and gradient norms of `STEPS` steps, parameters after them, the state at the start on the host).

    ``start``: of another mesh, since compiling the random numbers anew takes as long as the step.
    """
    # A large epsilon: the gradient of a key's bias is rounding alone, which Adam would make a step of.
    config = tiny_config(optimizer__warmup="0 steps", optimizer__eps=1e-3, optimizer__ema=0.9, **changes)
    stream = SpoiledStream(spoiled=(16 * STEPS + 5,))
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.make_mesh(*shape, devices=devices)
    model, optimizer = plan.make_model_config(config), optim.from_config(config, 10, 0, 0)
    abstract = step.abstract_state(config, model, stream.modalities, optimizer, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    fresh = jax.jit(lambda: step.init_state(config, model, stream.modalities, optimizer), out_shardings=where)
    state = fresh() if start is None else jax.device_put(start, where)
    start = jax.device_get(state)
    for x, sharded in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert x.sharding == sharded and x.addressable_shards[0].data.shape == sharded.shard_shape(x.shape)
    one_step = step.make_step(config, model, stream.modalities, stream.masking, stream.tasks, optimizer, mesh)
    batches, values = sharding.device_batches(stream, mesh, position=0, global_batch=16), []
    for _ in range(STEPS):
        state, metrics = one_step(state, *next(batches))
        values.append([metrics[name] for name in ("loss", "grad_norm", "inputs", "targets", "skipped")])
    state = check_skipped(one_step, state, next(batches), mesh)
    return np.array(jax.device_get(values)), jax.device_get(state["params"]), start


def check_meshes():
    eight = jax.devices()
    assert len(eight) == 8
    shape = lambda *axes: dict(sharding.make_mesh(*axes).shape)  # noqa: E731
    assert shape() == {"data": 1, "fsdp": 8, "tensor": 1}
    assert shape(2) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert shape(-1, -1, 2) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert shape(-1, 2, 2) == {"data": 2, "fsdp": 2, "tensor": 2}
    sharding.LARGEST_FSDP = 2
    assert shape() == {"data": 4, "fsdp": 2, "tensor": 1}
    sharding.LARGEST_FSDP = 16
    mesh = sharding.make_mesh(2, 4)
    # Rows of the batch follow the devices' order; parameters repeat along data.
    batch = sharding.to_devices(mesh, np.arange(16), 16)
    assert [int(s.data[0]) for s in batch.addressable_shards] == list(range(0, 16, 2))
    whole = sharding.on_one_device({"x": sharding.reshard(np.arange(8.0), mesh, PartitionSpec("fsdp"))})
    np.testing.assert_array_equal(whole["x"], np.arange(8.0))


def check_skipped(one_step, state, batch, mesh):
    """A step on a batch with a NaN changes no bit of the state on any device, but the count."""
    bits = lambda state: [np.asarray(s.data).tobytes() for x in jax.tree.leaves(state) for s in x.addressable_shards]  # noqa: E731
    parts = lambda state: {name: bits(tree) for name, tree in state.items() if name != "step"}  # noqa: E731
    before, count = parts(state), int(state["step"])
    state, values = one_step(state, *batch)
    assert parts(state) == before and state["step"] == count + 1
    assert [int(s.data) for s in values["skipped"].addressable_shards] == [1] * mesh.size
    assert not np.isfinite(values["loss"]) and not np.isfinite(values["grad_norm"])
    assert np.isfinite(values["counts"]).all() and np.isfinite(values["lr"])
    return state


def main():
    check_meshes()
    alone = {}
    for name, (shape, changes) in CASES.items():
        key = tuple((k, v) for k, v in changes.items() if k not in HOW)
        if key not in alone:
            alone[key] = run((1, 1, 1), dict(key))
        values, params, _ = run(shape, changes, alone[key][2])
        np.testing.assert_allclose(values, alone[key][0], rtol=5e-6, err_msg=name)
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(alone[key][1]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=5e-6, err_msg=name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
