from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODALITIES

from fm4m import checkpoint, sharding
from fm4m.checkpoint import CheckpointError
from fm4m.sizes import ModelConfig

MODEL = ModelConfig(16, 1, 1, 2)


def make_state(width=8):
    params = {
        "head": {"tokens": jnp.arange(16.0 * width).reshape(16, width)},
        "decoder_norm": {"scale": jnp.ones(width)},
    }
    moments = jax.tree.map(lambda x: x / 3, params)
    return {"step": jnp.int32(4), "params": params, "opt_state": {"mu": moments, "nu": moments}}


def make_abstract(state):
    shardings = sharding.state_shardings(state, sharding.make_mesh())
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return {k: v for k, v in shapes.items() if k != "step"}


def describe(step=4, **changed):
    given = {
        "seed": 0,
        "mixture": {"tasks": {"a": {"rate": 1.0}}},
        "model": MODEL,
        "config": {"train": {"total": "9 steps"}},
    }
    return checkpoint.make_meta(step=step, position=step * 16, modalities=MODALITIES, **(given | changed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = checkpoint.Checkpoints(workdir, every=2, keep=2, keep_period=4)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(make_state(), describe(step))
    checkpoints.save(make_state(), describe(10))
    checkpoints.wait()
    checkpoints.close()
    return workdir


def test_round_trip_and_policy(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    assert checkpoints.latest() == 10
    assert sorted(int(p.name) for p in checkpoints.folder.iterdir()) == [4, 8, 10]
    meta = checkpoints.meta(10)
    assert meta == describe(10)
    assert meta["position"] == 160 and meta["versions"]["jax"] == jax.__version__
    state = make_state()
    got = checkpoints.restore(10, make_abstract(state))
    jax.tree.map(np.testing.assert_array_equal, got, {k: state[k] for k in got})
    checkpoints.close()


def test_due():
    made = checkpoint.Checkpoints.__new__(checkpoint.Checkpoints)
    made._every = 5
    assert made.due(10) and not made.due(11)
    made._every = 0
    assert not made.due(10)


def test_parameters_alone(saved):
    params, meta = checkpoint.load_params(saved)
    jax.tree.map(np.testing.assert_array_equal, params, make_state()["params"])
    assert meta["step"] == 10 and meta["model"]["dim"] == 16
    assert checkpoint.load_params(saved, 4)[1]["step"] == 4
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*; there are: 4, 8, 10"):
        checkpoint.load_params(saved, 5)
    with pytest.raises(CheckpointError, match=r"has no 'ema' \(optimizer.ema was 0\)"):
        checkpoint.load_params(saved, ema=True)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="there are: none"):
        checkpoint.load_params(tmp_path)


def test_another_model_names_the_parameter(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    with pytest.raises(CheckpointError, match=r"params/decoder_norm/scale of shape \(8,\), but the model's is \(4,\)"):
        checkpoints.restore(10, make_abstract(make_state(4)))
    more = make_state()
    more["params"]["context_projection"] = {"kernel": jnp.zeros((8, 8))}
    with pytest.raises(
        CheckpointError, match=r"has no array params/context_projection/kernel \(expected shape \(8, 8\)\)"
    ):
        checkpoints.restore(10, make_abstract(more))
    less = make_state()
    del less["params"]["head"]
    with pytest.raises(
        CheckpointError, match=r"has an array params/head/tokens \(16, 8\) that the model does not have"
    ):
        checkpoints.restore(10, make_abstract(less))
    checkpoints.close()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"mixture": {"tasks": {"a": {"rate": 2.0}}}}, r"mixture.tasks.a.rate was 1.0, is 2.0 \(see data.mixture"),
        ({"mixture": {"tasks": {"b": {"rate": 1.0}}}}, "mixture.tasks.a was {'rate': 1.0}, is None"),
        ({"model": ModelConfig(32, 1, 1, 2)}, r"model.dim was 16, is 32 \(see model\)"),
    ],
)
def test_another_run_is_refused(changed, expected):
    checkpoint.check_same_run(describe(), describe(step=8, config={"train": {"total": "20 steps"}}), "runs/a")
    with pytest.raises(CheckpointError, match=expected) as error:
        checkpoint.check_same_run(describe(), describe(**changed), "runs/a")
    assert "another --workdir" in str(error.value)


def test_a_write_that_was_cut_short_is_not_seen(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "10", folder / "12.orbax-checkpoint-tmp")
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    assert checkpoints.latest() == 10
    checkpoints.close()
    assert checkpoint.load_params(tmp_path / "run")[1]["step"] == 10
