"""Masking on the device: equal to the plain version, its hard rules, and the laws of its random numbers."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import masking_reference
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from masking_cases import (
    CAPTION,
    CASES,
    DEPTH,
    NORMAL,
    PART,
    T5,
    B,
    assert_same,
    check_rules,
    compiled,
    keys_of,
    make_raw,
    run,
)

from fm4m.masking import GAMMA_TRIES, Masking, draw, log_gamma, mask_batch, select
from fm4m.modalities import Modality, ModalitySet
from fm4m.spans import num_tries

# ---- against the plain version


@pytest.mark.parametrize("name", CASES)
def test_select_is_the_plain_version(name):
    modalities, masking, tasks = CASES[name]
    _, drawn, selected = compiled(name)
    for seed in range(12):
        raw = make_raw(modalities, B, seed, len(tasks), missing=(0, 0.2, 0.7, 1.0)[seed % 4])
        draws = drawn(keys_of(seed, np.arange(B)), raw)
        packed = selected(raw, draws)
        assert_same(packed, masking_reference.select(raw, draws, masking, modalities, tasks)[0])
        check_rules(raw, packed, draws, modalities, masking, tasks)
        if seed % 4 == 3:
            assert not packed.encoder.valid.any() and not packed.decoder.valid.any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(["everything", "refill", "sequences"]), st.integers(0, 2**32 - 1), st.data())
def test_select_is_the_plain_version_for_any_numbers(name, seed, data):
    """Numbers that `draw` would hardly make: keep probabilities at their ends, one-sided shares, ties of cells."""
    modalities, masking, tasks = CASES[name]
    _, drawn, selected = compiled(name)
    raw = make_raw(modalities, B, seed, len(tasks))
    d = drawn(keys_of(0, np.arange(B)), raw)
    r = np.random.default_rng(seed)
    levels = np.float32(data.draw(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), label="levels"))
    part = lambda x: np.float32(r.choice(levels, x.shape))  # noqa: E731
    share = np.asarray(d.share) * r.choice([0, 1], d.share.shape, p=[0.3, 0.7])
    share = share / np.maximum(share.sum(-1, keepdims=True), 1e-30)
    draws = dataclasses.replace(
        d,
        share=np.float32(share),
        keep_prob=part(d.keep_prob),
        keep=np.maximum(part(d.keep), np.float32(2**-24)),
        window=np.minimum(part(d.window), np.float32(1 - 2**-24)),
        cells=r.integers(0, data.draw(st.sampled_from([1, 300, 2**32])), d.cells.shape).astype(np.uint32),
    )
    assert_same(selected(raw, draws), masking_reference.select(raw, draws, masking, modalities, tasks)[0])


def test_masks_depend_on_key_position_and_sample_only():
    modalities, _, tasks = CASES["everything"]
    whole = compiled("everything")[0]
    raw = make_raw(modalities, B, 5, len(tasks))
    position = np.arange(B, dtype=np.uint32) * 7 + 2**31
    packed = whole(raw, key=jax.random.key(1), position=position)
    order = np.random.default_rng(0).permutation(B)
    for rows in (order, order[:3], order[:1]):
        sub = jax.tree.map(lambda x, rows=rows: x[rows], raw)
        again = whole(sub, key=jax.random.key(1), position=position[rows])
        assert_same(again, jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], packed))
    for key, at in ((jax.random.key(2), position), (jax.random.key(1), position + 1)):
        other = whole(raw, key=key, position=at)
        assert (np.asarray(other.encoder.row) != np.asarray(packed.encoder.row)).any(1).mean() > 0.9


def test_mask_batch_is_draw_then_select():
    modalities, _, tasks = CASES["refill"]
    whole, drawn, selected = compiled("refill")
    raw = make_raw(modalities, B, 6, len(tasks))
    packed = whole(raw, key=jax.random.key(3), position=jnp.arange(B))
    assert_same(packed, selected(raw, drawn(keys_of(3, np.arange(B)), raw)))


def test_no_loop_depends_on_data():
    modalities, masking, tasks = CASES["everything"]
    raw = make_raw(modalities, 2, 0)
    fn = functools.partial(mask_batch, masking=masking, modalities=modalities, tasks=tasks, key=jax.random.key(0))
    assert "while" not in str(jax.make_jaxpr(lambda r: fn(r, position=jnp.arange(2)))(raw))


_SHARDED = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np, functools
import masking_cases as t
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
for kind, (modalities, masking, tasks) in ((AxisType.Auto, t.CASES["refill"]), (AxisType.Explicit, t.NO_PIXELS)):
    raw = t.make_raw(modalities, 8, 0, len(tasks))
    position = np.arange(8, dtype=np.uint32)
    fn = jax.jit(functools.partial(t.mask_batch, masking=masking, modalities=modalities, tasks=tasks))
    want = jax.tree.map(np.asarray, fn(raw, key=jax.random.key(0), position=position))
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        args = jax.device_put((raw, position), sharding)
        step = fn.lower(args[0], key=jax.random.key(0), position=args[1]).compile()
        text = step.as_text()
        assert not [w for w in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if w in text], kind
        got = step(args[0], key=jax.random.key(0), position=args[1])
        assert got.target.sharding.is_equivalent_to(sharding, 2), got.target.sharding
        t.assert_same(jax.tree.map(np.asarray, got), want)
print("sharded ok")
"""


@pytest.mark.slow
def test_sharded_batches_need_no_communication():
    root = __file__.rsplit("/tests/", 1)[0]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", _SHARDED], cwd=root, env=env, capture_output=True, text=True)
    assert "sharded ok" in done.stdout, done.stderr[-3000:]


# ---- particular rules


def test_refill_uses_what_is_left_and_stays_disjoint():
    grids = ModalitySet((DEPTH, NORMAL, CAPTION))
    recipe = {"*": (PART({"depth": 1.0, "normal": 1.0, "caption": 50.0}, 1.0),)}
    raw = make_raw(grids, 64, 0, missing=0)
    raw.length[:, 2] = 2  # a short text cannot use its share
    for refill in (False, True):
        masking = Masking(20, 10, recipe, refill=refill)
        packed = run(raw, masking, grids)
        drawn = jax.jit(functools.partial(draw, masking=masking, modalities=grids, tasks=("a",)))
        check_rules(raw, packed, drawn(keys_of(0, np.arange(64)), raw), grids, masking, ("a",))
        filled = packed.encoder.valid.sum(1), packed.decoder.valid.sum(1)
        if refill:
            assert (filled[0] == 20).all() and (filled[1] == 10).all()
        else:
            assert (filled[0] < 10).mean() > 0.9 and (filled[1] < 10).any()


def test_budget_of_a_missing_modality_goes_to_the_others():
    pair = ModalitySet((DEPTH, NORMAL))
    raw = make_raw(pair, 32, 0, missing=0)
    raw.length[:16, 1] = 0
    packed = run(raw, Masking(6, 6, {"*": (PART(1.0, 1.0),)}), pair)
    assert packed.encoder.valid.all() and packed.decoder.valid.all()
    assert not packed.encoder.modality[:16].any() and packed.encoder.modality[16:].any()


def test_an_embedding_shows_one_zero_vector_a_gap():
    pair = ModalitySet((T5, DEPTH))
    raw = make_raw(pair, 64, 1, missing=0)
    masking = Masking(9, 4, {"*": (PART({"t5": 1.0}, {"depth": 1.0}),)})
    packed = run(raw, masking, pair)
    assert packed.dense["t5"].shape == (64, 10, 5) and not packed.dense["t5"][:, 9].any()
    gaps = 0
    for row, valid, n in zip(np.asarray(packed.encoder.row), np.asarray(packed.encoder.valid), raw.length[:, 0]):
        row = row[valid]
        kept = row[row < 9]
        assert (np.diff(kept) > 0).all() and (kept < n).all()
        assert not ((row[1:] == 9) & (row[:-1] == 9)).any()
        expected = np.count_nonzero(np.diff([-1, *kept, n]) > 1)
        assert np.count_nonzero(row == 9) == expected
        gaps += expected
    assert gaps > 20


def test_long_texts_use_all_slots_and_the_last_sentinel():
    long = ModalitySet((Modality("text", "sequence", 1000, max_tokens=512),))
    raw = make_raw(long, 2, 0, missing=0)
    raw.length[:] = 512
    alternate = np.float32(np.arange(512) % 2)  # 256 runs, more than there are sentinels
    masking = Masking(512, 512, {"*": (PART(1.0, 1.0),)})
    draws = jax.jit(draw, static_argnums=(2, 3, 4))(keys_of(0, np.arange(2)), raw, masking, long, ("a",))
    keep = np.broadcast_to(np.maximum(alternate, 0.1), draws.keep.shape).astype(np.float32)
    draws = dataclasses.replace(draws, keep=keep, keep_prob=np.full((2, 1), 0.5, np.float32))
    packed = jax.jit(select, static_argnums=(2, 3, 4))(raw, draws, masking, long, ("a",))
    assert_same(packed, masking_reference.select(raw, draws, masking, long, ("a",))[0])
    assert packed.encoder.valid.all() and packed.encoder.row[0, -1] == 203


# ---- laws


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0, 3.0, 20.0])
def test_log_gamma_has_the_gamma_law(alpha):
    bits = jax.random.bits(jax.random.key(7), (2 * GAMMA_TRIES + 1, 20000), jnp.uint32)
    x = np.asarray(log_gamma(bits, jnp.float32(alpha)), np.float64)
    assert np.isfinite(x).all()
    assert scipy.stats.kstest(x, scipy.stats.loggamma(alpha).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(x, scipy.stats.loggamma(alpha * 1.2 + 0.01).cdf).pvalue < 1e-3


def test_components_and_ranges_have_their_probabilities():
    pair = ModalitySet((DEPTH, NORMAL))
    parts = (PART({"depth": 1.0}, 1.0, weight=3), PART({"normal": 1.0}, 1.0, weight=0), PART({"normal": 1.0}, 1.0))
    masking = Masking((2, 5), (3, 3), {"x": parts, "*": (PART(1.0, {"depth": 0.5, "normal": 1.5}),)})
    n = 8000
    raw = make_raw(pair, n, 0, missing=0)
    raw = dataclasses.replace(raw, task=np.uint8(np.arange(n) % 2))
    d = jax.jit(lambda k, r: draw(k, r, masking, pair, ("x", "y")))(keys_of(0, np.arange(n)), raw)
    d = jax.tree.map(np.asarray, d)
    assert np.bincount(d.component[::2]).tolist()[1] == 0
    assert abs((d.component[::2] == 0).mean() - 0.75) < 0.03
    assert not d.component[1::2].any()
    assert np.unique(d.budget[:, 0]).tolist() == [2, 3, 4, 5] and (d.budget[:, 1] == 3).all()
    assert scipy.stats.chisquare(np.bincount(d.budget[:, 0] - 2)).pvalue > 1e-3
    assert scipy.stats.kstest(d.share[1::2, 1, 0], scipy.stats.beta(0.5, 1.5).cdf).pvalue > 1e-3
    # The modality of a left over token is the larger part of an independent Dirichlet sample.
    larger = scipy.stats.beta(0.5, 1.5).sf(0.5)
    assert abs((d.extra[1::2, 1, 0] == 0).mean() - larger) < 0.03
    assert abs(np.corrcoef(d.extra[1::2, 1, 0], d.share[1::2, 1, 0])[0, 1]) < 0.06
    assert not d.extra[:, 0][(d.component == 0) & (raw.task == 0)].any()


def test_enough_tries():
    assert num_tries(256) == 60 and num_tries(1) >= 1
    assert 512 * 0.9 ** num_tries(512) <= 0.5 < 512 * 0.9 ** (num_tries(512) - 1)
