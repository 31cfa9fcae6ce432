"""Masking: the device function against the plain one, its hard rules, and its laws against the reference's counts."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import masking_reference
import numpy as np
import pytest
import scipy.stats
from fixtures import FIXTURES, needs_fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from fm4m.batch import RawBatch
from fm4m.masking import GAMMA_TRIES, Draws, Masking, MaskingComponent, draw, log_gamma, mask_batch, select
from fm4m.modalities import Modality, ModalitySet
from fm4m.spans import mask_spans, num_tries

B = 16
PART = MaskingComponent

RGB = Modality("rgb", "pixels", grid=(4, 4), patch_size=2, channels=3)
DEPTH = Modality("depth", "tokens", 50, grid=(4, 4))
NORMAL = Modality("normal", "tokens", 130, grid=(4, 4))
GLOBAL = Modality("global", "tokens", 40, grid=(2, 3), learned_positions=True)
CAPTION = Modality("caption", "sequence", 300, max_tokens=24)
POSES = Modality("poses", "sequence", 220, max_tokens=17, max_positions=6)
WORD = Modality("word", "sequence", 250, max_tokens=1)
T5 = Modality("t5", "embedding", max_tokens=9, channels=5)


def _case(modalities, masking, tasks=("a",)):
    return modalities, masking, tasks


EVERY = ModalitySet(
    (CAPTION, RGB, T5, DEPTH, GLOBAL, NORMAL, POSES, WORD),
    inputs=("caption", "rgb", "t5", "depth", "global", "word"),
    outputs=("caption", "depth", "normal", "poses", "word"),
)
MIXED = {
    "a": (
        PART(0.5, 0.5, weight=2),
        PART({"caption": 5.0, "t5": 1.0, "depth": 0.05}, {"depth": 1.0, "poses": 0.3}, keep={"caption": "all"}),
        PART({"rgb": 1000.0}, 1.0, weight=0.5),
    ),
    "*": (PART(1.0, {"caption": 1.0, "word": 1.0}, keep="binary"), PART(0.01, 0.01, weight=0)),
}
CASES = {
    "everything": _case(EVERY, Masking((3, 30), (0, 40), MIXED), ("a", "b")),
    "refill": _case(EVERY, Masking((0, 40), 40, MIXED, refill=True), ("b", "a")),
    "grids": _case(ModalitySet((DEPTH, GLOBAL, NORMAL)), Masking(20, 20, {"*": (PART(0.2, 0.2),)})),
    "sequences": _case(ModalitySet((CAPTION, POSES)), Masking(12, 30, {"*": (PART(0.5, 0.5), PART(1, 1, "all"))})),
    "one word": _case(ModalitySet((WORD,)), Masking((0, 1), (0, 3), {"*": (PART(1, 1),)})),
    "tiny budgets": _case(EVERY, Masking((0, 1), (0, 2), {"*": (PART(1, 1),)})),
}
NO_PIXELS = _case(ModalitySet((CAPTION, T5, DEPTH, GLOBAL, POSES)), Masking(12, (3, 20), {"*": (PART(0.5, 0.5),)}))


def make_raw(modalities: ModalitySet, size: int, seed: int, tasks: int = 1, missing: float = 0.2) -> RawBatch:
    r = np.random.default_rng(seed)
    length = np.zeros((size, len(modalities)), np.int16)
    tokens = np.zeros((size, modalities.num_slots), np.uint16)
    dense = {}
    for i, m in enumerate(modalities.modalities):
        short = r.integers(1, m.max_tokens + 1, size)
        full = r.random(size) < 0.3
        length[:, i] = np.where(full | bool(m.grid), m.max_tokens, short) * (r.random(size) >= missing)
        if m.discrete:
            inside = np.arange(m.max_tokens) < length[:, i, None]
            codes = r.integers(205 if m.kind == "sequence" else 0, m.vocab_size, (size, m.max_tokens))
            tokens[:, modalities.slot_offset[m.name] :][:, : m.max_tokens] = np.where(inside, codes, 0)
        elif m.kind == "pixels":
            shape = (size, m.grid[0] * m.patch_size, m.grid[1] * m.patch_size, 3)
            dense[m.name] = r.integers(0, 256, shape).astype(np.uint8)
        else:
            dense[m.name] = r.normal(size=(size, m.max_tokens, m.channels)).astype(np.float16)
    return RawBatch(tokens, length, r.integers(0, tasks, size).astype(np.uint8), dense)


@functools.cache
def compiled(name: str):
    modalities, masking, tasks = CASES[name]
    static = dict(masking=masking, modalities=modalities, tasks=tasks)
    whole = jax.jit(functools.partial(mask_batch, **static))
    return whole, jax.jit(functools.partial(draw, **static)), jax.jit(functools.partial(select, **static))


def keys_of(seed: int, position) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(position, jnp.uint32))


def run(raw, masking, modalities, seed: int = 0):
    """`mask_batch` of samples 0, 1, ... of a single task, compiled: op by op it would take ten times as long."""
    fn = functools.partial(mask_batch, masking=masking, modalities=modalities, tasks=("a",))
    return jax.jit(fn)(raw, key=jax.random.key(seed), position=np.arange(raw.size))


def assert_same(got, want) -> None:
    got_leaves, want_leaves = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
    assert len(got_leaves) == len(want_leaves)
    for (path, a), b in zip(got_leaves, want_leaves):
        name = jax.tree_util.keystr(path)
        if name.startswith(".dense"):  # the compiler may divide by a constant through its reciprocal
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name, strict=True)


def check_rules(raw, packed, draws, modalities, masking, tasks) -> None:
    """Rules that hold whatever the law: budgets, disjointness, the recipe's zeros, order, clean padding."""
    p = jax.tree.map(np.asarray, packed)
    for side, s in ((0, p.encoder), (1, p.decoder)):
        assert (np.diff(s.valid.astype(int), axis=1) <= 0).all(), "valid slots come first"
        assert not (s.row | s.modality | s.position)[~s.valid].any()
        assert (s.valid.sum(1) <= np.asarray(draws.budget)[:, side]).all()
    assert not p.target[~p.decoder.valid].any()
    low, high = modalities.output_ranges[p.decoder.modality].transpose(2, 0, 1)
    assert ((p.target >= low) & (p.target < high))[p.decoder.valid].all()
    for b in range(raw.size):
        part = masking.components(tasks[int(raw.task[b])])[int(draws.component[b])]
        for side, s in (("inputs", p.encoder), ("targets", p.decoder)):
            alpha = part.concentration(side, modalities)
            used = s.modality[b][s.valid[b]]
            assert (np.diff(used) >= 0).all(), "tokens of a modality are contiguous"
            for i in set(used.tolist()):
                assert alpha[modalities.names[i]] > 0 and raw.length[b, i] > 0
        for i, m in enumerate(modalities.modalities):
            at_in = p.encoder.position[b][p.encoder.valid[b] & (p.encoder.modality[b] == i)]
            at_out = p.decoder.position[b][p.decoder.valid[b] & (p.decoder.modality[b] == i)]
            if m.grid:
                cells = np.concatenate([at_in, at_out]) - modalities.position_offset[m.name]
                assert len(set(cells.tolist())) == len(cells) and ((cells >= 0) & (cells < m.max_tokens)).all()
            else:
                assert at_in.tolist() == list(range(len(at_in)))


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
import test_masking as t
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
    flags = "--xla_force_host_platform_device_count=4"
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


# ---- the reference's arrays


def _tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(FIXTURES / "parity" / "tiny_tokenizer.json"))


def _run_spans(cases):
    """Visible and target tokens of cases (ids, input budget, target budget, keep probability, uniform numbers)."""
    size, width = len(cases), 32
    codes, uniforms = np.zeros((size, width), np.int32), np.ones((size, 1, width), np.float32)
    for q, (ids, _, _, _, values) in enumerate(cases):
        codes[q, : len(ids)] = ids
        uniforms[q, 0, : len(values)] = values
    ids, budget_in, budget_out, keep_prob, _ = zip(*cases)
    length, budget_in, budget_out = np.int32([[len(i) for i in ids], budget_in, budget_out])
    zeros = np.zeros(size, np.float32)
    args = (codes, length, np.full(size, -1), budget_in, budget_out, np.float32(keep_prob), uniforms, zeros)
    s = jax.tree.map(np.asarray, jax.jit(mask_spans)(*args))
    visible = [row[:n].tolist() for row, n in zip(s.visible, s.num_visible)]
    return visible, [row[a : a + n].tolist() for row, a, n in zip(s.masked, s.start, s.num_masked)]


@needs_fixtures
def test_span_masking_equals_the_reference():
    cases = json.loads((FIXTURES / "masking" / "masking_exact.json").read_text())
    deterministic, tokenizer = [c for c in cases["sequence"] if c["deterministic"]], _tokenizer()
    assert len(cases["simple_span"]) == 40 and len(deterministic) >= 4
    inputs = [(c["sequence"], 1000, 1000, c["keep_prob"], c["uniform"]) for c in cases["simple_span"]]
    for c in deterministic:
        ids = [*tokenizer.encode(c["text"]).ids, 3]
        budget = 1000 if c["target_budget"] is None else c["target_budget"]
        inputs.append((ids, c["input_budget"], budget, 1.0 if c["keep"] == "all" else 0.5, np.ones(len(ids))))
    visible, target = _run_spans(inputs)
    wanted = [*cases["simple_span"], *deterministic]
    assert visible == [c["input"] for c in wanted]
    assert target == [c["target"] for c in wanted]


@needs_fixtures
def test_grid_masking_equals_the_reference():
    cases = json.loads((FIXTURES / "masking" / "masking_exact.json").read_text())["image_mask"]
    n = len(cases)
    single = ModalitySet((DEPTH,))
    draws = Draws(
        component=np.zeros(n, np.int32),
        budget=np.int32([(c["input_budget"], c["target_budget"]) for c in cases]),
        share=np.ones((n, 2, 1), np.float32),
        extra=np.zeros((n, 2, 0), np.int32),
        # There, cell i comes as number argsort(noise)[i].
        cells=np.uint32([np.argsort(c["noise"]) << 4 for c in cases]),
        keep_prob=np.zeros((n, 0), np.float32),
        keep=np.zeros((n, 0, 1, 0), np.float32),
        window=np.zeros((n, 0), np.float32),
    )
    raw = make_raw(single, n, 0, missing=0)
    masking = Masking((0, 16), (0, 16), {"*": (PART(1.0, 1.0),)})
    packed = jax.jit(select, static_argnums=(2, 3, 4))(raw, draws, masking, single, ("a",))
    for b, c in enumerate(cases):
        for side, name in ((packed.encoder, "input_mask"), (packed.decoder, "target_mask")):
            mask = np.ones(16, int)
            mask[np.asarray(side.position[b])[np.asarray(side.valid[b])]] = 0
            assert mask.tolist() == c[name]


def _law_case(config: str):
    folder = FIXTURES / "masking"
    info = json.loads((folder / f"masking_{config}.json").read_text())
    text = json.loads((folder / f"masking_{config}_text.json").read_text())
    ids = {name: [*_tokenizer().encode(t).ids, 3] for name, t in text.items()}
    assert {k: len(v) for k, v in ids.items()} == {k: v["n_tokens_with_eos"] for k, v in info["sequences"].items()}
    ms = []
    for name in info["modalities"]:
        if name in text:
            # There it is 256; as no budget exceeds 128, that makes no difference, but half the numbers to draw.
            assert info["max_tokens"][name] >= info["in_range"][1] == info["out_range"][1] == 128
            ms.append(Modality(name, "sequence", 512, max_tokens=128))
        elif name.startswith("rgb"):
            ms.append(Modality(name, "pixels", grid=(14, 14), patch_size=1, channels=3))
        else:
            ms.append(Modality(name, "tokens", 64, grid=(14, 14)))
    modalities = ModalitySet(tuple(ms))
    alphas = info["alphas"]
    parts = tuple(
        MaskingComponent(
            inputs={n: a["input_alphas"][i] for n, a in alphas.items()},
            targets={n: a["target_alphas"][i] for n, a in alphas.items() if n in modalities.outputs},
            keep={n: a["keep"][i] for n, a in alphas.items() if "keep" in a},
            weight=info["sampling_weights"][i] if info["sampling_weights"] else 1.0,
        )
        for i in range(len(alphas[info["modalities"][0]]["input_alphas"]))
    )
    masking = Masking(tuple(info["in_range"]), tuple(info["out_range"]), {"*": parts})
    tokens = np.zeros((1, modalities.num_slots), np.uint16)
    for name, t in ids.items():
        tokens[0, modalities.slot_offset[name] :][: len(t)] = t
    length = np.int16([[len(ids[m.name]) if m.name in ids else m.max_tokens for m in ms]])
    dense = {m.name: np.zeros((1, 14, 14, 3), np.uint8) for m in ms if m.kind == "pixels"}
    return modalities, masking, RawBatch(tokens, length, np.zeros(1, np.uint8), dense), ids


def _law_counts(config: str, runs: int, chunk: int = 1000) -> dict[str, np.ndarray]:
    """The arrays of the reference's counts, from the device functions."""
    modalities, masking, one, ids = _law_case(config)
    raw = jax.tree.map(lambda x: np.repeat(x, chunk, 0), one)
    names = [n for n in modalities.names if n in ids]
    index = np.array([modalities.index(n) for n in names])

    @jax.jit
    def run(start):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(11), start + jnp.arange(chunk, dtype=jnp.uint32))
        d = draw(keys, raw, masking, modalities, ("a",))
        budget = jnp.floor(d.share * d.budget[..., None]).astype(jnp.int32)
        left = d.budget - budget.sum(-1)
        given = jax.nn.one_hot(d.extra, len(modalities), dtype=jnp.int32)
        budget += (given * (jnp.arange(d.extra.shape[-1]) < left[..., None])[..., None]).sum(2)
        # A target of one token leaves no slot in the packed batch, so its token is taken from the spans themselves.
        codes = np.stack([np.pad(ids[n], (0, d.keep.shape[-1] - len(ids[n]))) for n in names]).astype(np.int32)
        length, gap = np.int32([len(ids[n]) for n in names]), np.full(len(names), -1)
        fn = functools.partial(mask_spans, codes, length, gap)
        spans = jax.vmap(fn)(budget[:, 0, index], budget[:, 1, index], d.keep_prob, d.keep, d.window)
        first = jnp.take_along_axis(spans.masked, spans.start[..., None], -1)[..., 0]
        packed = select(raw, d, masking, modalities, ("a",))
        return dataclasses.replace(packed, dense={}), budget, first

    out: dict[str, list] = {}
    add = lambda k, v: out.setdefault(k, []).append(v)  # noqa: E731
    sentinel = lambda x: (x >= 5) & (x < 204)  # noqa: E731
    for begin in range(0, runs, chunk):
        packed, budget, first = jax.tree.map(np.asarray, run(np.uint32(begin)))
        for i, m in enumerate(modalities.modalities):
            visible = packed.encoder.valid & (packed.encoder.modality == i)
            asked = packed.decoder.valid & (packed.decoder.modality == i)
            add(f"in/{m.name}", visible.sum(1))
            if m.grid:
                add(f"out/{m.name}", asked.sum(1))
                for name, s, at in (("in", packed.encoder, visible), ("out", packed.decoder, asked)):
                    cells = s.position[at] - modalities.position_offset[m.name]
                    add(f"posfreq_{name}/{m.name}", np.bincount(cells, minlength=196))
                continue
            shown = np.where(visible, packed.encoder.row - modalities.input_offset[m.name], -1)
            # The target: the token of every slot, and what the last one predicts; -1 elsewhere.
            target = np.full((chunk, asked.shape[1] + 1), -1)
            rows, slots = np.nonzero(asked)
            target[rows, slots + 1] = packed.target[rows, slots] - modalities.output_offset[m.name]
            target[rows, slots] = packed.decoder.row[rows, slots] - modalities.output_offset[m.name]
            single = ~asked.any(1) & (budget[:, 1, i] > 0)
            target[single, 0] = first[single, names.index(m.name)]
            present = target >= 0
            at_end = np.where(present.any(1), present.shape[1] - 1 - np.argmax(present[:, ::-1], 1), 0)
            ends = target[np.arange(chunk), np.argmax(present, 1)], target[np.arange(chunk), at_end]
            add(f"out/{m.name}", present.sum(1))
            values = dict(
                in_sentinels=sentinel(shown).sum(1),
                in_kept=(visible & ~sentinel(shown)).sum(1),
                in_has_eos=(shown == 3).any(1),
                tgt_sentinels=sentinel(target).sum(1),
                tgt_has_eos=(target == 3).any(1),
                tgt_start=np.where(present.any(1), budget[:, 0, i], -1),
                # What the reference's counts call complete: from the first sentinel to some sentinel.
                target_complete=(ends[0] == 5) & sentinel(ends[1]),
            )
            for k, v in values.items():
                add(f"seq/{m.name}/{k}", v)
            rows, slots = np.nonzero(sentinel(target))
            add(f"seq/{m.name}/span_lengths", (np.diff(slots) - 1)[np.diff(rows) == 0])
    join = lambda k, v: sum(v) if k.startswith("posfreq") else np.concatenate(v)  # noqa: E731
    return {k: join(k, v).astype(np.int64) for k, v in out.items()}


def _judge(tmp_path, config: str, counts: dict[str, np.ndarray]) -> subprocess.CompletedProcess:
    np.savez(tmp_path / "counts.npz", **counts)
    reference = FIXTURES / "masking" / f"masking_{config}.npz"
    command = [sys.executable, str(FIXTURES / "compare_masking.py"), str(reference), str(tmp_path / "counts.npz")]
    return subprocess.run(command, capture_output=True, text=True)


CONFIGS = ("all2all_a0.5", "mod7_rgb2all_a0.5")


@needs_fixtures
@pytest.mark.parametrize("config", CONFIGS[1:])
def test_counts_have_the_reference_law(tmp_path, config):
    counts = _law_counts(config, 2000)
    done = _judge(tmp_path, config, counts)
    assert done.returncode == 0 and "missing []" in done.stdout, done.stdout
    # The judge notices a change of a few per cent.
    counts["in/rgb@224"] = np.minimum(counts["in/rgb@224"], 120)
    assert _judge(tmp_path, config, counts).returncode == 1


@needs_fixtures
@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_counts_have_the_reference_law_in_20000_runs(tmp_path, config):
    done = _judge(tmp_path, config, _law_counts(config, 20000))
    print(done.stdout)
    assert done.returncode == 0 and "missing []" in done.stdout, done.stdout


# ---- recipes


def test_recipe_round_trip():
    masking = Masking((3, 30), 40, MIXED, refill=True)
    again = Masking.from_dict(json.loads(json.dumps(masking.to_dict())))
    assert again == masking and hash(again) == hash(masking)
    assert again != dataclasses.replace(masking, refill=False)
    with pytest.raises(ValueError, match="num_input.*num_inputs"):
        Masking.from_dict({"num_input": 3})
    with pytest.raises(ValueError, match="weigth.*weight"):
        Masking.from_dict({**masking.to_dict(), "tasks": {"*": [{"inputs": 1, "targets": 1, "weigth": 2}]}})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (PART({"depht": 1.0}, 1.0), ["'a'", "component 0", "depht", "'depth'"]),
        (PART({"normal": 1.0}, 1.0), ["inputs", "normal", "no input"]),
        (PART(1.0, {"global": 1.0}), ["targets", "global", "no target"]),
        (PART(1.0, {"rgb": 1.0}), ["rgb", "pixels", "cannot be predicted"]),
        (PART(1.0, {"t5": 1.0}), ["t5", "embedding", "cannot be predicted"]),
        (PART({"depth": -1.0}, 1.0), ["depth", "-1.0"]),
        (PART(float("nan"), 1.0), ["nan"]),
        (PART(1.0, 0.0), ["nothing to predict"]),
        (PART(1.0, 1.0, keep="some"), ["'some'", "random, all, binary"]),
        (PART(1.0, 1.0, keep={"depth": "all"}), ["depth", "grid"]),
        (PART(1.0, 1.0, keep={"capton": "all"}), ["capton", "caption"]),
        (PART(1.0, 1.0, weight=-1), ["weight", "-1"]),
        (PART(1.0, 1.0, weight=0), ["weights sum to 0"]),
    ],
)
def test_bad_components_are_refused(part, words):
    with pytest.raises(ValueError) as error:
        Masking(4, 4, {"*": (part,)}).validate(EVERY, ("a",))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bad", [0, -1, (5, 3), (-1, 3), (0, 0), 2.5, (1, 2, 3), True])
def test_bad_ranges_are_refused(bad):
    with pytest.raises(ValueError, match="num_inputs"):
        Masking(bad, 4, {"*": (PART(1, 1),)})


def test_bad_tasks_and_vocabularies_are_refused():
    good = PART(1.0, 1.0)
    with pytest.raises(ValueError, match="'taks'"):
        Masking(4, 4, {"taks": (good,), "*": (good,)}).validate(EVERY, ("task",))
    with pytest.raises(ValueError, match="'b'"):
        Masking(4, 4, {"a": (good,)}).validate(EVERY, ("a", "b"))
    with pytest.raises(ValueError, match="at least one component"):
        Masking(4, 4, {"a": ()}).validate(EVERY, ("a",))
    small = ModalitySet((Modality("text", "sequence", 10, max_tokens=20),))
    with pytest.raises(ValueError, match="'text'.*sentinels"):
        Masking(4, 4, {"*": (good,)}).validate(small, ("a",))
    raw = make_raw(EVERY, 2, 0)
    with pytest.raises(ValueError, match="different modality sets"):
        mask_batch(raw, Masking(4, 4, {"*": (good,)}), small, ("a",), jax.random.key(0), jnp.arange(2))
