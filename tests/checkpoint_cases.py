"""States of a few arrays and runs with a step or two, for the tests of checkpoints."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from tiny_run import MODALITIES

from fm4m import checkpoint, sharding
from fm4m.sizes import ModelConfig

MODEL = ModelConfig(16, 1, 1, 2)


def make_state(width=8, rows=16):
    params = {
        # Noise, or a compressed file would be a few bytes.
        "head": {"tokens": jnp.asarray(np.random.default_rng(0).normal(size=(rows, width)), jnp.float32)},
        "decoder_norm": {"scale": jnp.ones(width)},
    }
    moments = jax.tree.map(lambda x: (x / 3).astype(jnp.bfloat16), params)
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


@contextlib.contextmanager
def run_in(workdir, **options):
    checkpoints = checkpoint.Checkpoints(workdir, **options)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save_two_steps(workdir):
    """Saves steps 2 and 4 of a state whose arrays are large enough to be in files of their own; returns the state."""
    state = make_state(64, 128)
    with run_in(workdir) as checkpoints:
        for step in (2, 4):
            checkpoints.save(state, describe(step))
        checkpoints.wait()
    return state


def restore(workdir, state):
    """(step that was restored, whether it is what was saved, names of what was set aside)."""
    with run_in(workdir) as checkpoints:
        got, meta = checkpoints.restore_newest(make_abstract(state))
    same = meta == describe(meta["step"])
    for path, x in jax.tree_util.tree_leaves_with_path(got):
        saved = state
        for key in path:
            saved = saved[key.key]
        same &= np.asarray(x).tobytes() == np.asarray(saved).tobytes() and x.dtype == saved.dtype
    aside = sorted(p.name for p in checkpoints.folder.iterdir() if p.name.startswith("damaged"))
    return meta["step"], same, aside
