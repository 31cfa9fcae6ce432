from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from fm4m import sharding
from fm4m.config_file import ConfigError


def abstract(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def test_every_parameter_has_a_role_and_matrices_are_split():
    from tiny_run import MODALITIES

    from fm4m import model
    from fm4m.optim import path_name

    config = model.ModelConfig(
        32, 2, 2, 2, mlp_ratio=3.0, qkv_bias=True, norm_bias=True, qk_norm=True, tied_heads=False
    )
    params = jax.eval_shape(lambda k: model.init_params(config, MODALITIES, k), jax.random.key(0))
    mesh = abstract(2, 4, 2)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        spec = sharding.param_spec(name, x.shape, mesh)
        split = jax.tree.leaves(tuple(spec))
        assert ("fsdp" in split) == name.endswith(("/kernel", "/tokens")), name


def test_unmatched_parameter_and_indivisible_dimension_are_named():
    with pytest.raises(ConfigError, match=r"parameter encoder/new_thing \(4, 4\) has no role"):
        sharding.param_spec("encoder/new_thing", (4, 4), abstract())
    with pytest.raises(ConfigError, match=r"decoder/mlp/up/kernel.*1365 is not divisible by mesh.tensor 2 = 2"):
        sharding.param_spec("decoder/mlp/up/kernel", (8, 512, 1365), abstract(tensor=2))


def test_optimizer_state_and_average_follow_the_parameters():
    params = {"head": {"tokens": jnp.zeros((128, 8))}, "decoder_norm": {"scale": jnp.zeros(8)}}
    state = {"step": jnp.int32(0), "params": params, "opt_state": {"mu": params, "nu": params}, "ema": params}
    got = sharding.state_shardings(state, sharding.make_mesh(devices=jax.devices()[:1]))
    assert got["params"]["head"]["tokens"].spec == PartitionSpec("fsdp", "tensor")
    assert got["opt_state"]["mu"] == got["opt_state"]["nu"] == got["ema"] == got["params"]
    assert got["step"].spec == PartitionSpec()


def test_mesh_and_batch_errors_say_the_numbers():
    with pytest.raises(ConfigError, match="mesh.data 1 x mesh.fsdp -1 x mesh.tensor 3 does not make the 1 devices"):
        sharding.make_mesh(1, -1, 3, devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="= 100 is not divisible by .* = 16; the nearest that are: 96 and 112"):
        sharding.check_batch(abstract(2, 4), 100, accumulation=2)
    sharding.check_batch(abstract(2, 4, 3), 96, accumulation=2)


def test_one_process_reads_everything():
    mesh = sharding.make_mesh()
    assert sharding.loader_shard(mesh, 16) == (0, 1)
    raw = np.arange(32, dtype=np.uint16).reshape(16, 2)
    got = sharding.to_devices(mesh, {"tokens": raw}, 16)["tokens"]
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, raw)


def test_limited_batches_are_emptied_beyond_the_limit():
    from tiny_run import TinyStream

    stream = TinyStream(split="validation", size=40, finite=True)
    batches = list(sharding.device_batches(stream, sharding.make_mesh(), position=0, global_batch=16, limit=20))
    present = np.concatenate([np.asarray(raw.length).any(1) for raw, _ in batches])
    positions = np.concatenate([np.asarray(p) for _, p in batches])
    np.testing.assert_array_equal(present, np.arange(32) < 20)
    np.testing.assert_array_equal(positions, np.arange(32))
