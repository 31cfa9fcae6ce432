"""Attention: the rule of visibility, and every implementation against the plain one."""

from __future__ import annotations

import functools
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m import attention as attention_lib
from fm4m import attention_tpu
from fm4m.attention import INTERPRETED, Visibility, all_valid, attention, best_implementation, dense

# bfloat16 has 8 bits of mantissa. Scaled query, weights and the gradient of the logits are rounded once each, and the
# sizes compared are up to 8.
TOLERANCE = {jnp.float32: dict(atol=1e-5, rtol=1e-5), jnp.bfloat16: dict(atol=0.04, rtol=0.02)}


def random_qkv(batch: int, queries: int, keys: int, width: int, dtype=jnp.float32, seed: int = 0):
    """query, key, value and a gradient of the output."""
    random = np.random.default_rng(seed)
    sizes = (queries, keys, keys, queries)
    return [jnp.asarray(random.normal(size=(batch, n, width)), dtype) for n in sizes]


def random_visibility(batch: int, queries: int, keys: int, groups: int = 3, seed: int = 0) -> Visibility:
    """Negative groups and limits that exclude everything occur."""
    random = np.random.default_rng(seed)

    def draw(low, high, n):
        return jnp.asarray(random.integers(low, high, (batch, n)), jnp.int32)

    limits, orders = draw(-2, keys, queries), draw(0, keys, keys)
    return Visibility(draw(-1, groups, queries), limits, draw(-1, groups, keys), orders)


def decoder_visibility(modality, is_sequence, valid, separate: bool = True, causal: bool = False) -> Visibility:
    """Slots see their modality: sequences what is not later, grids all of it; not ``separate``: also what is before."""
    modality = np.asarray(modality)
    slot = np.broadcast_to(np.arange(modality.shape[1]), modality.shape)
    last = np.array([[np.flatnonzero(row == m)[-1] for m in row] for row in modality])
    limit = slot if causal else np.where(np.asarray(is_sequence)[modality], slot, last)
    group = modality if separate else np.zeros_like(modality)
    arrays = (group, limit, np.where(valid, group, -1), slot)
    return Visibility(*(jnp.asarray(a, jnp.int32) for a in arrays))


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def outputs(query, key, value, gradient, visibility, num_heads, implementation, library=None):
    """Output and gradients, in float32."""

    def run(query, key, value):
        if library:
            return attention_lib._cudnn(query, key, value, visibility, num_heads, library)
        return attention(query, key, value, visibility, num_heads, implementation)

    out, backward = jax.vjp(run, query, key, value)
    return [x.astype(jnp.float32) for x in (out, *backward(gradient))]


def assert_same(found, expected, dtype):
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE[dtype], err_msg=name)


def compare(shape, visibility, num_heads, dtype=jnp.float32, library=None):
    """An implementation, by default the kernels, in ``dtype`` against the plain one in float32 on the same numbers."""
    inputs = random_qkv(*shape, dtype)
    found = outputs(*inputs, visibility, num_heads, INTERPRETED, library)
    exact = outputs(*(x.astype(jnp.float32) for x in inputs), visibility, num_heads, "einsum")
    assert_same(found, exact, dtype)
    nothing = ~np.asarray(dense(visibility)).any(-1)
    assert (np.asarray(found[0])[nothing] == 0).all() and (np.asarray(found[1])[nothing] == 0).all()
    return nothing


# ---- the rule


def test_dense_is_the_rule():
    visibility = Visibility(*(jnp.asarray([row]) for row in ([0, 1, -1], [1, 5, 9], [0, 0, 1, -1], [1, 2, 5, 0])))
    expected = [[True, False, False, False], [False, False, True, False], [False, False, False, False]]
    np.testing.assert_array_equal(dense(visibility)[0], expected)


def test_all_valid_shows_the_valid_keys_to_all_queries():
    valid = jnp.asarray([[True, False, True], [False, False, False]])
    seen = dense(all_valid(valid, 4))
    np.testing.assert_array_equal(seen, np.broadcast_to(np.asarray(valid)[:, None], (2, 4, 3)))


def test_visibility_is_a_pytree():
    visibility = all_valid(jnp.ones((2, 3), bool), 4)
    assert [x.shape for x in jax.tree.leaves(visibility)] == [(2, 4), (2, 4), (2, 3), (2, 3)]


# ---- the plain implementation


def test_einsum_is_softmax_of_scaled_products():
    query, key, value, _ = random_qkv(2, 5, 7, 12)
    visibility = random_visibility(2, 5, 7)
    found = attention(query, key, value, visibility, 3, "einsum")
    seen = np.asarray(dense(visibility))
    for b, t, h in np.ndindex(2, 5, 3):
        part = slice(4 * h, 4 * h + 4)
        logits = np.asarray(key)[b, :, part] @ np.asarray(query)[b, t, part] / 2
        weights = np.exp(logits) * seen[b, t]
        expected = weights @ np.asarray(value)[b, :, part] / max(weights.sum(), 1e-30)
        np.testing.assert_allclose(found[b, t, part], expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["einsum", INTERPRETED])
def test_nothing_seen_gives_zeros_and_zero_gradients(implementation):
    inputs = random_qkv(2, 8, 8, 128)
    valid = jnp.asarray([[True] * 8, [False] * 8])
    for x in outputs(*inputs, all_valid(valid, 8), 2, implementation):
        assert np.isfinite(x).all() and np.asarray(x)[0].any() and not np.asarray(x)[1].any()


# ---- the TPU kernels, interpreted


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("separate", "causal"), [(True, False), (False, False), (True, True)])
def test_kernels_with_the_decoders_rule(dtype, separate, causal):
    modality = np.repeat([[0, 1, 2, 3], [2, 0, 3, 1]], [9, 7, 11, 5], axis=1)
    valid = np.random.default_rng(0).random(modality.shape) > 0.2
    visibility = decoder_visibility(modality, [False, True, False, True], valid, separate, causal)
    compare((2, 32, 32, 128), visibility, 2, dtype)


@pytest.mark.parametrize(("queries", "keys"), [(16, 48), (40, 8), (13, 21), (136, 24), (24, 136)])
def test_kernels_with_any_number_of_tokens(queries, keys):
    valid = jnp.asarray(np.random.default_rng(0).random((1, keys)) > 0.3)
    compare((1, queries, keys, 128), all_valid(valid, queries), 2)


@pytest.mark.parametrize(("head_dim", "num_heads"), [(32, 4), (64, 4), (128, 1)])
def test_kernels_with_any_head_width(head_dim, num_heads):
    compare((2, 16, 24, head_dim * num_heads), random_visibility(2, 16, 24), num_heads)


def test_kernels_with_several_samples_a_step():
    assert attention_tpu.step_samples(8, 16, 16) == 4
    nothing = compare((8, 16, 16, 128), random_visibility(8, 16, 16), 2, jnp.bfloat16)
    assert nothing.any()


@pytest.mark.parametrize(("tokens", "dtype"), [(512, jnp.float32), (1024, jnp.bfloat16)])
def test_kernels_in_tiles_of_queries(tokens, dtype):
    compare((1, tokens, tokens, 128), random_visibility(1, tokens, tokens), 2, dtype)


@hypothesis.settings(derandomize=True, max_examples=12, deadline=None)
@hypothesis.given(seed=st.integers(0, 10_000), groups=st.integers(1, 5))
def test_kernels_with_random_visibility(seed, groups):
    compare((2, 16, 16, 128), random_visibility(2, 16, 16, groups, seed), 2)


def test_large_logits_stay_exact():
    query, key, value, gradient = random_qkv(1, 16, 16, 128)
    inputs = (60 * query, 60 * key, value, gradient)
    visibility = random_visibility(1, 16, 16)
    found, expected = (outputs(*inputs, visibility, 2, i) for i in (INTERPRETED, "einsum"))
    # The logits are thousands: their own rounding is 1e-4 of a weight, and the gradients carry the factor 60.
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("size", [256, 128])
@pytest.mark.parametrize("tokens", [8, 128, 256, 264, 384, 392, 600, 1024])
def test_tiles_cover_the_queries(tokens, size):
    tiles = attention_tpu._tiles(tokens, size)
    assert [i for t in tiles for i in range(t.start, t.stop)] == list(range(tokens))
    assert max(t.stop - t.start for t in tiles) <= size + 128


def test_both_cores_get_samples():
    assert [attention_tpu.step_samples(b, 256, 256) for b in (1, 2, 4, 6, 8, 64)] == [1, 1, 2, 1, 4, 4]
    assert attention_tpu.step_samples(64, 1024, 1024) == 1


def traced(implementation: str, differentiate: bool, batch: int = 2, policy=None):
    """A jitted function of query, key, value and the mask of keys, with shapes to trace it for."""

    def loss(query, key, value, valid):
        return attention(query, key, value, all_valid(valid, 256), 4, implementation).astype(jnp.float32).sum()

    if policy is not None:
        loss = jax.checkpoint(loss, policy=policy)
    x = jax.ShapeDtypeStruct((batch, 256, 256), jnp.bfloat16)
    return jax.jit(jax.grad(loss, (0, 1, 2)) if differentiate else loss).trace(
        x, x, x, jax.ShapeDtypeStruct((batch, 256), bool)
    )


def test_kernels_lower_for_tpu():
    text = traced("pallas", True).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    assert "attention_forward" in text and "attention_backward" in text


def kernel_counts(jaxpr) -> Counter:
    """How often each kernel occurs in a jaxpr, where something reads its result: XLA drops the others."""
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    counts = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            counts[equation.params["name"]] += any(id(v) in read for v in equation.outvars)
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                counts += kernel_counts(inner)
    return counts


def test_saving_attention_saves_the_kernel_a_second_run():
    policies = jax.checkpoint_policies
    saved = kernel_counts(traced("pallas", True, policy=policies.save_only_these_names("attention")).jaxpr.jaxpr)
    nothing = kernel_counts(traced("pallas", True, policy=policies.nothing_saveable).jaxpr.jaxpr)
    assert saved == {"attention_forward": 1, "attention_backward": 1}
    assert nothing == {"attention_forward": 2, "attention_backward": 1}


# ---- cuDNN


@pytest.mark.parametrize(("queries", "keys"), [(16, 24), (13, 21)])
def test_cudnns_call_means_the_same(queries, keys):
    nothing = compare((2, queries, keys, 32), random_visibility(2, queries, keys), 2, library="xla")
    assert nothing.any()


def test_cudnn_lowers_for_cuda(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(fused, "check_cudnn_version"):
        pytest.skip("this version of jax looks for cuDNN elsewhere")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    text = traced("cudnn", True).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1


# ---- what is chosen and refused


@pytest.mark.parametrize(
    ("platform", "head_dim", "num_heads", "dtype", "tokens", "expected"),
    [
        ("cpu", 64, 12, "bfloat16", 256, "einsum"),
        ("rocm", 64, 12, "bfloat16", 256, "einsum"),
        ("tpu", 64, 12, "bfloat16", 1024, "pallas"),
        ("tpu", 64, 12, "float32", 256, "pallas"),
        ("tpu", 64, 12, "bfloat16", 2048, "einsum"),
        ("tpu", 64, 3, "bfloat16", 256, "einsum"),
        ("tpu", 48, 8, "bfloat16", 256, "einsum"),
        ("gpu", 64, 3, "bfloat16", 256, "cudnn"),
        ("cuda", 64, 12, "bfloat16", 256, "cudnn"),
        ("cuda", 64, 12, "float32", 256, "einsum"),
        ("cuda", 256, 12, "bfloat16", 256, "einsum"),
    ],
)
def test_best_implementation(platform, head_dim, num_heads, dtype, tokens, expected):
    assert best_implementation(platform, head_dim, num_heads, jnp.dtype(dtype), tokens) == expected


def test_unknown_names():
    query, key, value, _ = random_qkv(1, 8, 8, 128)
    with pytest.raises(KeyError, match="Did you mean 'pallas'"):
        attention(query, key, value, all_valid(jnp.ones((1, 8), bool), 8), 2, "palas")
    with pytest.raises(KeyError, match="platform named 'metal'"):
        best_implementation("metal", 64, 12, jnp.bfloat16)


@pytest.mark.parametrize(
    ("width", "num_heads", "implementation", "message"),
    [
        (96, 2, "pallas", r"heads of width \(32, 64, 128\), not 48"),
        (192, 3, "pallas", "3 heads of width 64 are 192 lanes"),
        (128, 2, "cudnn", "bfloat16 or float16, not float32"),
        (128, 3, "einsum", "3 heads do not divide the width 128"),
    ],
)
def test_what_a_kernel_cannot_compute(width, num_heads, implementation, message):
    query, key, value, _ = random_qkv(1, 8, 8, width)
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, all_valid(jnp.ones((1, 8), bool), 8), num_heads, implementation)


def test_shapes_must_belong_together():
    query, key, value, _ = random_qkv(1, 8, 16, 128)
    visibility = all_valid(jnp.ones((1, 16), bool), 8)
    with pytest.raises(ValueError, match=r"not query \(1, 8, 128\), key \(1, 16, 128\), value \(1, 15, 128\)"):
        attention(query, key, value[:, 1:], visibility, 2)
    with pytest.raises(ValueError, match=r"key_group must be \[1, 16\]"):
        attention(query, key, value, visibility._replace(key_group=visibility.query_group), 2)
    long = jax.ShapeDtypeStruct((1, 2048, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="at most 1024 tokens"):
        rule = all_valid(jnp.ones((1, 2048), bool), 2048)
        jax.eval_shape(lambda x: attention(x, x, x, rule, 2, "pallas"), long)
