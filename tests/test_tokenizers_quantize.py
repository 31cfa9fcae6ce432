"""Quantizers: assignment, gradients, moving averages over devices, dead codes, k-means, memcodes, FSQ."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm4m.tokenizers import fsq, memcodes, quantize
from fm4m.tokenizers.config import VQConfig


def config(quantizer: str, size: int, dim: int, **fields) -> VQConfig:
    return VQConfig("rgb", (8, 8), 4, 3, quantizer=quantizer, codebook_size=size, latent_dim=dim, **fields)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit_rows(seed: int, *shape: int) -> np.ndarray:
    x = normal(seed, *shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- cosine and Euclidean

# Where they differ in a line that another test looks at.
ONE_FAST = ["cosine", pytest.param("euclidean", marks=pytest.mark.slow)]


def test_cosine_is_by_angle_and_lookup_returns_stored_rows():
    cfg = config("cosine", 2, 2)
    codebook = {"embed": jnp.array([[0.1, 0.0], [0.0, 5.0]]), "cluster_size": jnp.zeros(2)}
    codes = quantize.encode(cfg, {}, codebook, jnp.array([[3.0, 2.9], [0.1, 0.2]]))
    np.testing.assert_array_equal(codes, [0, 1])
    np.testing.assert_array_equal(quantize.lookup(cfg, {}, codebook, codes), codebook["embed"])


def test_euclidean_is_by_distance():
    cfg = config("euclidean", 8, 3)
    embed, latents = normal(0, 8, 3), normal(1, 4, 5, 3)
    nearest = np.argmin(((latents[..., None, :] - embed) ** 2).sum(-1), axis=-1)
    np.testing.assert_array_equal(quantize.encode(cfg, {}, {"embed": jnp.array(embed)}, latents), nearest)


@pytest.mark.parametrize("kind", ONE_FAST)
def test_large_codebooks_are_searched_in_blocks(kind, monkeypatch):
    cfg, latents = config(kind, 24, 4), jnp.array(normal(1, 50, 4))
    embed = normal(0, 24, 4)
    embed[13] = embed[5]  # of equal codes the first, wherever blocks end
    whole = quantize.encode(cfg, {}, {"embed": jnp.array(embed)}, latents)
    monkeypatch.setattr(quantize, "BLOCK", 8)
    np.testing.assert_array_equal(quantize.encode(cfg, {}, {"embed": jnp.array(embed)}, latents), whole)
    assert len(np.unique(whole)) > 10 and 13 not in whole


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_straight_through_gradient_is_identity_and_commitment_pulls_latents(kind):
    cfg = config(kind, 16, 4)
    codebook = {"embed": jnp.array(unit_rows(0, 16, 4)), "cluster_size": jnp.zeros(16)}
    latents, weights = jnp.array(unit_rows(1, 5, 4) * 2.0), jnp.array(unit_rows(2, 5, 4))

    @jax.jit
    def run(latents):
        quantized, back = jax.vjp(lambda x: quantize.quantize(cfg, {}, codebook, x)[::2], latents)
        codes = quantize.encode(cfg, {}, codebook, latents)
        return *quantized, codes, back((weights, 0.0))[0], back((jnp.zeros_like(weights), 1.0))[0]

    rows, commitment, codes, through, pull = run(latents)
    np.testing.assert_allclose(through, weights, rtol=1e-6)
    np.testing.assert_allclose(rows, codebook["embed"][codes], atol=1e-6)
    np.testing.assert_allclose(commitment, np.mean((np.asarray(rows) - latents) ** 2), rtol=1e-5)
    np.testing.assert_allclose(pull, 2 * (latents - rows) / latents.size, atol=1e-6)


def test_cosine_update_moves_used_codes_only():
    cfg = config("cosine", 3, 2)
    codebook = {"embed": jnp.array([[0.9, 0.0], [0.0, 1.0], [-1.0, 0.0]]), "cluster_size": jnp.array([4.0, 2.0, 1.0])}
    latents = jnp.array([[3.0, 0.0], [0.0, 0.5], [0.0, 7.0]])
    new = quantize.update(cfg, codebook, latents, jnp.array([0, 0, 1]), decay=0.5)
    diagonal = np.array([1.0, 1.0]) / np.sqrt(2.0)  # the length of a latent has no weight
    np.testing.assert_allclose(new["embed"][0], 0.5 * np.array([0.9, 0.0]) + 0.5 * diagonal, rtol=1e-6)
    np.testing.assert_allclose(new["embed"][1:], codebook["embed"][1:], rtol=1e-6)
    np.testing.assert_allclose(new["cluster_size"], [3.0, 1.5, 0.5])


def test_euclidean_update_is_a_smoothed_mean():
    cfg = config("euclidean", 6, 3)
    cluster_size, average = np.abs(normal(0, 6)), normal(1, 6, 3)
    latents, codes = normal(2, 40, 3), np.random.default_rng(3).integers(0, 5, 40)  # code 5 is not used
    codebook = {"embed": average / cluster_size[:, None], "cluster_size": cluster_size, "embed_avg": average}
    new = quantize.update(cfg, jax.tree.map(jnp.array, codebook), latents, jnp.array(codes), decay=0.9)
    sizes = np.array([0.9 * cluster_size[k] + 0.1 * np.sum(codes == k) for k in range(6)])
    sums = np.array([0.9 * average[k] + 0.1 * latents[codes == k].sum(0) for k in range(6)])
    smoothed = (sizes + 1e-5) / (sizes.sum() + 6e-5) * sizes.sum()
    np.testing.assert_allclose(new["cluster_size"], sizes, rtol=1e-5)
    np.testing.assert_allclose(new["embed_avg"], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["embed"], sums / smoothed[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ONE_FAST)
def test_statistics_are_those_of_all_devices(kind):
    cfg, latents = config(kind, 16, 4), jnp.array(normal(0, 2, 3, 10, 4))
    codebook = quantize.init(cfg, jax.random.key(0)) | {"cluster_size": jnp.linspace(0, 2, 16)}
    codes = quantize.encode(cfg, {}, codebook, latents)

    def device(latents, codes):
        new = quantize.update(cfg, codebook, latents, codes, axis_name=("a", "b"))
        return new, quantize.restart_dead(cfg, jax.random.key(1), new, latents, 1.0, axis_name=("a", "b"))

    new, restarted = jax.jit(jax.vmap(jax.vmap(device, axis_name="b"), axis_name="a"))(latents, codes)
    for leaf in jax.tree.leaves((new, restarted)):  # alike everywhere, and as one device would have it
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0, 0], leaf.shape))
    one = quantize.update(cfg, codebook, latents, codes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0, 0], y, rtol=1e-5, atol=1e-6), new, one)
    dead = np.asarray(one["cluster_size"]) < 1.0
    rows, flat = np.asarray(restarted["embed"][0, 0])[dead], np.asarray(latents).reshape(-1, 4)
    flat = flat if kind == "euclidean" else flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    distance = np.linalg.norm(rows[:, None] - flat, axis=-1)
    assert dead.sum() > 4 and distance.min(axis=1).max() < 1e-5
    assert len(np.unique(distance.argmin(axis=1) // 10)) > 1  # from more than one device


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_dead_codes_become_latents(kind):
    cfg = config(kind, 4, 3)
    codebook = {"embed": jnp.array(unit_rows(0, 4, 3)), "cluster_size": jnp.array([0.1, 2.0, 0.2, 0.5])}
    codebook["embed_avg"] = codebook["embed"] * codebook["cluster_size"][:, None]
    latents = jnp.array(5.0 * unit_rows(1, 10, 3))
    new = quantize.restart_dead(cfg, jax.random.key(0), codebook, latents, 0.5)
    alive = np.array([1, 3])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[alive], y[alive]), new, codebook)
    wanted = np.asarray(latents) / (5.0 if kind == "cosine" else 1.0)
    for row in (0, 2):
        distance = np.linalg.norm(wanted - np.asarray(new["embed"][row]), axis=-1)
        assert np.isclose(distance, 0.0, atol=1e-5).sum() == 1
    assert not np.allclose(new["embed"][0], new["embed"][2])
    if kind == "cosine":
        np.testing.assert_array_equal(new["cluster_size"], codebook["cluster_size"])
    else:  # a step in which nobody uses it leaves the code where it was put
        empty = jnp.zeros((0, 3)), jnp.zeros((0,), jnp.int32)
        np.testing.assert_allclose(quantize.update(cfg, new, *empty)["embed"], new["embed"], rtol=1e-3)


def test_linde_buzo_gray_splits_the_most_used_codes():
    cfg = config("cosine", 4, 3)
    codebook = {"embed": jnp.array(unit_rows(0, 4, 3)), "cluster_size": jnp.array([0.1, 2.0, 0.2, 5.0])}
    split = functools.partial(quantize.restart_dead, cfg, jax.random.key(0), codebook, jnp.ones((2, 3)), 0.5)
    new = split(policy="linde_buzo_gray")
    np.testing.assert_allclose(new["embed"], codebook["embed"][np.array([3, 1, 1, 3])], atol=1e-6)
    with pytest.raises(ValueError, match="policy 'best'"):
        split(policy="best")


@pytest.mark.parametrize("kind", ONE_FAST)
def test_kmeans_finds_clusters(kind):
    cfg, centres = config(kind, 32, 16), unit_rows(0, 8, 16) * (3.0 if kind == "euclidean" else 1.0)
    noise = 0.02 * np.random.default_rng(1).normal(size=(800, 16))
    latents = jnp.array(np.repeat(centres, 100, axis=0) + noise, jnp.float32)
    codebook = quantize.kmeans_init(cfg, jax.random.key(3), latents, tokens_per_batch=64)
    distance = np.linalg.norm(centres[:, None] - np.asarray(codebook["embed"]), axis=-1)
    assert distance.min(axis=1).max() < 0.1
    np.testing.assert_allclose(codebook["cluster_size"], 2.0)
    if kind == "euclidean":
        np.testing.assert_allclose(codebook["embed_avg"], 2.0 * codebook["embed"])
    else:
        np.testing.assert_allclose(np.linalg.norm(codebook["embed"], axis=-1), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="k-means cannot start quantizer 'fsq'"):
        quantize.kmeans_init(config("fsq", 1024, 32, fsq_levels=(3, 3)), jax.random.key(0), latents, 64)


def test_usage():
    used, perplexity = quantize.usage(np.array([5, 5, 0, 0]))
    assert float(used) == 0.5
    assert float(perplexity) == pytest.approx(2.0)


# ---- memcodes


def memcode_params(heads: int = 3, size: int = 5, dim: int = 4) -> dict:
    maps = {name: normal(seed, heads, dim, dim) for seed, name in enumerate(("to_k", "to_v"), 1)}
    return {"codes": normal(0, heads, size, dim), **maps}


def test_memcodes_against_numpy():
    cfg, p = config("memcodes", 5, 12, num_codebooks=3), memcode_params()
    latents = normal(3, 2, 6, 12)
    assert quantize.init(cfg, jax.random.key(0)) == {}
    codes = quantize.encode(cfg, {"quantizer": p}, {}, latents)
    rows = quantize.lookup(cfg, {"quantizer": p}, {}, codes)
    assert codes.shape == (2, 6, 3)
    for b, n, h in np.ndindex(2, 6, 3):
        query = latents[b, n, 4 * h : 4 * h + 4] / np.sqrt(4)
        scores = [query @ (p["codes"][h, v] @ p["to_k"][h]) for v in range(5)]
        assert codes[b, n, h] == np.argmax(scores)
        value = p["codes"][h, codes[b, n, h]] @ p["to_v"][h]
        np.testing.assert_allclose(rows[b, n, 4 * h : 4 * h + 4], value, rtol=1e-4, atol=1e-5)
    quantised, again, commitment = quantize.quantize(cfg, {"quantizer": p}, {}, latents)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(quantised, rows, atol=1e-5)
    assert commitment == 0
    assert quantize.update(cfg, {}, latents, codes) == {}


def test_memcodes_draw_by_gumbel_and_learn_by_the_softmax():
    p = memcode_params(1, 4, 2)
    latents = np.tile(np.array([[1.0, -0.5]], np.float32), (4000, 1))

    @jax.jit
    def run(latents):
        rows, codes = memcodes.quantize(p, latents, jax.random.key(0))
        return jnp.sum(rows), codes[:, 0]

    codes = np.asarray(run(latents)[1])
    keys, values = p["codes"][0] @ p["to_k"][0] / np.sqrt(2), p["codes"][0] @ p["to_v"][0]
    probability = np.exp(keys @ latents[0]) / np.exp(keys @ latents[0]).sum()
    np.testing.assert_allclose(np.bincount(codes, minlength=4) / 4000, probability, atol=0.03)
    # The gradient is that of the soft mixture of values; its noise is that of the draw.
    noisy = memcodes.logits(p, latents)[:, 0] + jax.random.gumbel(jax.random.key(0), (4000, 1, 4))[:, 0]
    soft = np.exp(noisy) / np.exp(noisy).sum(-1, keepdims=True)
    worth = values.sum(-1)
    expected = (soft * (worth - (soft @ worth)[:, None])) @ keys
    np.testing.assert_allclose(jax.grad(lambda x: run(x)[0])(latents), expected, rtol=1e-3, atol=1e-4)


# ---- FSQ

# As many channels and codes in every example, so that nothing is compiled twice.
LEVELS = st.lists(st.integers(2, 9), min_size=4, max_size=4)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(LEVELS)
def test_fsq_codes_and_vectors_are_one_to_one(levels):
    codes = np.linspace(0, int(np.prod(levels)) - 1, 512).astype(np.int32)  # all of them, or a spread
    rows = np.asarray(fsq.rows(levels, codes))
    assert rows.shape == (512, 4) and len(np.unique(rows, axis=0)) == len(np.unique(codes))
    assert rows.min() >= -1 and rows.max() <= 1
    np.testing.assert_array_equal(fsq.codes_of_rows(levels, rows), codes)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(LEVELS, st.integers(0, 2**31 - 1))
def test_fsq_rounds_to_the_values_of_its_levels(levels, seed):
    latents = 4 * normal(seed, 200, len(levels))
    codes = np.asarray(fsq.codes(levels, latents))
    assert codes.min() >= 0 and codes.max() < np.prod(levels)
    # The first channel changes fastest, and every channel's value grows with its latent.
    digits, rest = [], codes
    for level in levels:
        digits.append(rest % level)
        rest = rest // level
    for channel, digit in enumerate(digits):
        assert (np.diff(digit[np.argsort(latents[:, channel])]) >= 0).all()
        assert set(digit) == set(range(levels[channel])) or levels[channel] > 6
    rows = np.asarray(fsq.rows(levels, codes))
    for channel, level in enumerate(levels):
        np.testing.assert_allclose(rows[:, channel], (digits[channel] - level // 2) / (level // 2), rtol=1e-6)


def test_fsq_of_the_paper():
    cfg = config("fsq", 1024, 32, fsq_levels=(8, 5, 5, 5))
    assert (cfg.codebook_size, cfg.latent_dim) == (1000, 4)
    latents = jnp.array(normal(0, 3, 7, 4))
    rows, codes, commitment = quantize.quantize(cfg, {}, quantize.init(cfg, jax.random.key(0)), latents)
    np.testing.assert_allclose(rows, quantize.lookup(cfg, {}, {}, codes), atol=1e-6)
    np.testing.assert_array_equal(codes, quantize.encode(cfg, {}, {}, latents))
    assert commitment == 0
    # tanh(z) * 1.998 for 5 levels, rounded; 0 is the middle value.
    np.testing.assert_allclose(rows[..., 1], np.round(np.tanh(latents[..., 1]) * 2 * 0.999) / 2, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(quantize.quantize(cfg, {}, {}, x)[0][..., 1]))(latents)
    np.testing.assert_allclose(gradient[..., 1], 0.999 * (1 - np.tanh(latents[..., 1]) ** 2), rtol=1e-4)
