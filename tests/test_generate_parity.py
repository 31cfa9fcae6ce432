"""Generation gives what the reference implementation gives, step by step and running freely."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from reference_batches import mod7

from fm4m.generate import Generator, Target, engine, sampling, schedules
from fm4m.generate.canvas import Canvas, without
from fm4m.interop.ml4m import Source

PARITY = (FIXTURES or pathlib.Path("absent")) / "parity"
pytestmark = needs_fixtures


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model():
    meta = json.loads((PARITY / "fm_swiglu_rgb_meta.json").read_text())
    vocab = {name: info["vocab_size"] for name, info in meta["modality_info"].items() if "vocab_size" in info}
    modalities = mod7(vocab)
    source = Source(PARITY / "fm_swiglu_rgb_weights.safetensors", modalities)
    loaded = source.load().params
    config = dataclasses.replace(source.config, dtype="float32", attention="einsum")
    yield loaded, config, source.modalities
    source.close()


@pytest.fixture(scope="module")
def runs():
    meta = json.loads((PARITY / "gen_fm_swiglu_rgb_meta.json").read_text())
    return meta, np.load(PARITY / "gen_fm_swiglu_rgb_io.npz")


def canvas(arrays, prefix: str, modalities) -> Canvas:
    """The state that a fixture has under ``prefix``; text that is hidden there is no part of it."""
    names = {key.removeprefix(prefix).split("/")[0] for key in arrays.files if key.startswith(prefix)}
    ids, seen, dense = {}, {}, {}
    for name in sorted(names):
        m = modalities[name]
        shown = ~arrays[f"{prefix}{name}/input_mask"]
        x = arrays[f"{prefix}{name}/tensor"]
        if m.kind == "pixels":
            (rows, columns), p = m.grid, m.patch_size
            x = x.reshape(len(x), m.channels, rows, p, columns, p).transpose(0, 2, 4, 3, 5, 1)
            dense[name] = jnp.asarray(x.reshape(len(x), rows * columns, -1), jnp.float32)
            seen[name] = jnp.asarray(shown)
            continue
        if m.kind == "sequence":
            packed, visible = np.zeros((len(x), m.max_tokens), int), np.zeros((len(x), m.max_tokens), bool)
            for b in range(len(x)):
                tokens = x[b][shown[b]]
                packed[b, : len(tokens)], visible[b, : len(tokens)] = tokens, True
            x, shown = packed, visible
        ids[name], seen[name] = jnp.asarray(x.reshape(len(x), -1), jnp.int32), jnp.asarray(shown)
    for name in modalities.continuous:
        if name not in dense:
            m = modalities[name]
            dense[name] = jnp.zeros((len(x), modalities.continuous_count(name), m.patch_dim), jnp.float32)
    return Canvas(ids, seen, dense)


def slots(branches) -> tuple[int, ...]:
    return (448,) * len(branches)  # enough for all of them, so that few programs are compiled


def keys(size=2):
    return jax.random.split(jax.random.key(0), size)


def one_step(model, branches, run_step, target, scheme, order, scale=None):
    params, config, modalities = model
    queries = 196 if scheme == "maskgit" else 28
    shape = engine.GridStep(target, scheme, queries, slots(branches), sampling.Filter(), True)
    weights = jnp.asarray([scale] if scale is not None else [], jnp.float32)
    return engine.grid_step(
        params, branches, weights, keys(), order, jnp.asarray(run_step["num_tokens"]), jnp.zeros(()), config=config,
        modalities=modalities, step=shape,
    )  # fmt: skip


GRIDS = (
    "maskgit_rgb2depth",
    "maskgit_cap2depth_cfg3",
    "maskgit_rgb2normal_cfg2_empty",
    "roar_rgb2depth",
    "roar_rgbcap2clip_cfg2",
)


def branches_of(arrays, name, meta, modalities):
    full = canvas(arrays, f"{name}/in/", modalities)
    scale = meta["steps"][0]["cfg_scale"]
    if scale == 1.0:
        return (full,), None
    conditions = ["caption"] if name == "maskgit_cap2depth_cfg3" else ["rgb@224"]
    return (without(full, modalities, conditions), full), scale


def roar_order(arrays, prefix, count, cells):
    order = np.full((2, cells), 1e9, np.float32)
    for i in range(count):
        position = arrays[f"{prefix}step{i}/pos"]
        for b in range(2):
            order[b, position[b]] = i
    return jnp.asarray(order)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_equal_the_reference_step_by_step_and_freely(model, runs, name):
    meta, arrays = runs[0][name], runs[1]
    target, scheme, modalities = meta["target"], meta["scheme"], model[2]
    branches, scale = branches_of(arrays, name, meta, modalities)
    cells = modalities[target].max_tokens
    order = jnp.zeros((2, cells))
    if scheme == "roar":
        order = roar_order(arrays, f"{name}/", len(meta["steps"]), cells)
    free = True
    for i, step in enumerate(meta["steps"]):
        told = f"{name}/step{i}/"
        after, got = one_step(model, branches, step, target, scheme, order, scale)
        got = jax.device_get(got)
        for b in range(2):
            at = {int(p): k for k, p in enumerate(got["position"][b]) if got["valid"][b, k]}
            expected = arrays[told + "pos"][b]
            assert sorted(at) == sorted(expected.tolist())
            pick = [at[int(p)] for p in expected]
            if told + "logits" in arrays.files:
                np.testing.assert_allclose(got["logits"][b, pick], arrays[told + "logits"][b], atol=5e-5)
            if told + "logits_uncond" in arrays.files:
                shown, hidden = (arrays[f"{told}logits_{part}"][b] for part in ("cond", "uncond"))
                np.testing.assert_allclose(got["logits"][b, pick], hidden + scale * (shown - hidden), atol=1e-4)
            assert (got["token"][b, pick] == arrays[told + "argmax"][b]).all()
            np.testing.assert_allclose(got["confidence"][b, pick], arrays[told + "maxprob"][b], atol=2e-5)
        written = np.asarray(after[0].seen[target]) & ~np.asarray(branches[0].seen[target])
        same = (written == arrays[told + "new_mask"]).all()
        assert same or step["min_confidence_gap_at_cut"] < 2e-5, f"step {i}"
        free &= bool(same)
        ids = np.where(arrays[told + "new_mask"], arrays[told + "tensor"], np.asarray(branches[0].ids[target]))
        known = np.asarray(branches[0].seen[target]) | arrays[told + "new_mask"]
        if same:
            np.testing.assert_array_equal(np.where(known, np.asarray(after[0].ids[target]), 0), np.where(known, ids, 0))
            branches = after
        else:
            branches = tuple(b.write(target, jnp.asarray(ids, jnp.int32), jnp.asarray(known)) for b in branches)
    assert free or any((s["min_confidence_gap_at_cut"] or 1) < 2e-5 for s in meta["steps"])
    np.testing.assert_array_equal(np.asarray(branches[0].ids[target]), arrays[f"{name}/final"])


@pytest.mark.parametrize("name", ["ar_rgb2caption", "ar_rgb2det", "ar_rgb2caption_cfg2"])
def test_sequences_equal_the_reference(model, runs, name):
    params, config, modalities = model
    meta, arrays = runs[0][name], runs[1]
    full = canvas(arrays, f"{name}/in/", modalities)
    branches, weights = (full,), jnp.zeros((0,))
    if meta["cfg_scale"] != 1.0:
        branches = (without(full, modalities, meta["conditioning"]), full)
        weights = jnp.asarray([meta["cfg_scale"]], jnp.float32)
    first = jnp.full((2,), meta["start_token"], jnp.int32)
    got = engine.sequence(
        params, branches, weights, keys(), first, jnp.full((2,), meta["eos_token"], jnp.int32), jnp.zeros(()),
        config=config, modalities=modalities, target=meta["target"], slots=slots(branches), chosen=sampling.Filter(),
        length=arrays[f"{name}/in/{meta['target']}/tensor"].shape[1],
    )  # fmt: skip
    for ours, expected in zip(np.asarray(got).tolist(), meta["generated"], strict=True):
        expected = expected[: expected.index(meta["eos_token"]) + 1] if meta["eos_token"] in expected else expected
        assert ours[: len(expected)] == expected and not any(ours[len(expected) :])


def test_conditions_with_weights_equal_the_reference(model, runs):
    meta, arrays = runs[0]["multiguided_maskgit"], runs[1]
    params, config, modalities = model
    parts = ("uncond", "cond0", "cond1")
    branches = tuple(canvas(arrays, f"multiguided_maskgit/{part}_in/", modalities) for part in parts)
    target, weights = meta["target"], jnp.asarray(meta["weights"], jnp.float32)
    for i, count in enumerate(meta["steps"]):
        step = engine.GridStep(target, "maskgit", 196, slots(branches), sampling.Filter(), True)
        branches, got = engine.grid_step(
            params, branches, weights, keys(), jnp.zeros((2, 196)), jnp.asarray(count), jnp.zeros(()),
            config=config, modalities=modalities, step=step,
        )  # fmt: skip
        if i == 0:
            expected = arrays["multiguided_maskgit/step0/logits_guided"]
            np.testing.assert_allclose(np.asarray(got["logits"]), expected, atol=1e-4)
        told = f"multiguided_maskgit/step{i}/"
        known = np.asarray(branches[0].seen[target])
        np.testing.assert_array_equal(known, arrays[told + "target_mask"])
        np.testing.assert_array_equal(np.asarray(branches[0].ids[target])[known], arrays[told + "tensor"][known])
    np.testing.assert_array_equal(np.asarray(branches[0].ids[target]), arrays["multiguided_maskgit/final"])


def test_a_chain_equals_the_reference(model, runs, monkeypatch):
    """RGB to CLIP features by ROAR, both to depth by MaskGIT, all three to a caption: one call of the generator."""
    params, config, modalities = model
    meta, arrays = runs[0]["chain"], runs[1]
    counts = {}
    for step in meta["schedule"]:
        counts.setdefault(step["target_domain"], []).append(step["num_tokens"])
    clip, depth, caption = counts
    assert schedules.token_schedule("cosine", 4, 196) == counts[depth]
    monkeypatch.setattr(Generator, "_order", lambda *_: roar_order(arrays, "chain/roar_", 4, 196))
    targets = [
        Target(clip, steps=4, temperature=0.0),
        Target(depth, scheme="maskgit", steps=4, temperature=0.0),
        Target(caption, temperature=0.0, max_tokens=arrays["chain/in/caption/tensor"].shape[1]),
    ]
    done = Generator(params, config, modalities)(canvas(arrays, "chain/in/", modalities), targets)
    for name in (clip, depth):
        np.testing.assert_array_equal(np.asarray(done.ids[name]), arrays[f"chain/out/{name}/tensor"])
    length = np.asarray(done.seen[caption]).sum(1)
    assert set(length) == {arrays["chain/out/caption/tensor"].shape[1]}
    np.testing.assert_array_equal(np.asarray(done.ids[caption])[:, : length[0]], arrays["chain/out/caption/tensor"])


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("topk5", sampling.Filter(top_k=5)),
        ("topk_frac0.1", sampling.Filter(top_k=0.1)),
        ("topp0.8", sampling.Filter(top_p=0.8)),
        ("topp0.3", sampling.Filter(top_p=0.3)),
        ("topk10_topp0.5", sampling.Filter(top_k=10, top_p=0.5)),
    ],
)
def test_filters_equal_the_references(runs, name, chosen):
    got = sampling.keep(jnp.asarray(runs[1]["filter/logits"]), chosen)
    np.testing.assert_array_equal(np.asarray(got), runs[1][f"filter/{name}"])


def test_spans_are_merged_as_in_the_reference():
    for case in json.loads((PARITY / "gen_schedules.json").read_text())["merge_span_masking"]:
        assert engine.merge_spans(case["input"], case["decoder"]) == case["merged"]
