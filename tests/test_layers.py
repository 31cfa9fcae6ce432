from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.attention import all_valid
from fm4m.layers import Attention, LayerNorm, Linear, Mlp, apply_module, init_module
from fm4m.modalities import Modality, ModalitySet
from fm4m.positions import fixed_position_table, fourier, grid_positions, sincos, sincos_1d
from fm4m.sizes import ModelConfig, model_config

KEY = jax.random.key(0)


def test_layer_norm_subtracts_the_mean_and_uses_epsilon_1e_6():
    x = np.array([[1.0, 2.0, 3.0, 6.0], [1e-3, -1e-3, 1e-3, -1e-3]], np.float32)
    params = init_module(LayerNorm, (4, True), KEY)
    params = {"scale": params["scale"] * 2, "bias": params["bias"] + 0.5}
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * 2 + 0.5
    np.testing.assert_allclose(apply_module(LayerNorm, (4, True), params)(x), expected, rtol=1e-5)
    assert set(init_module(LayerNorm, (4, False), KEY)) == {"scale"}


def test_layer_norm_of_bfloat16_is_computed_in_float32():
    x = (1000 + jax.random.normal(KEY, (8, 64))).astype(jnp.bfloat16)  # bfloat16 has a step of 4 here
    params = init_module(LayerNorm, (64, False), KEY)
    exact = apply_module(LayerNorm, (64, False), params)(x.astype(jnp.float32))
    y = apply_module(LayerNorm, (64, False), params)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02)


def test_linear_is_xavier_uniform_with_zero_bias():
    params = init_module(Linear, (300, 100, True), KEY)
    bound = np.sqrt(6 / 400)
    assert 0.99 * bound < np.abs(params["kernel"]).max() <= bound
    assert not params["bias"].any()


def test_attention_to_an_empty_context_is_zero_and_has_finite_gradients():
    config = ModelConfig(16, 1, 1, 2)
    params = init_module(Attention, (config,), KEY)
    x, context = jax.random.normal(KEY, (2, 3, 16)), jax.random.normal(KEY, (2, 5, 16))
    visibility = all_valid(jnp.array([[True] * 5, [False] * 5]), 3)

    def run(params, context):
        return apply_module(Attention, (config,), params)(x, context, visibility)

    out = run(params, context)
    assert out[0].any() and not out[1].any()
    gradients = jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1))(params, context)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert gradients[1][0].any() and not gradients[1][1].any()


def test_query_and_key_norms_make_attention_blind_to_their_scale():
    config = ModelConfig(16, 1, 1, 2, qk_norm=True)
    params = init_module(Attention, (config,), KEY)
    assert params["query_norm"]["scale"].shape == (8,)
    x = jax.random.normal(KEY, (2, 3, 16))
    every = all_valid(jnp.ones((2, 3), bool), 3)
    scaled = {**params, "query": {"kernel": params["query"]["kernel"] * 7}}
    run = apply_module(Attention, (config,), params)(x, x, every)
    np.testing.assert_allclose(apply_module(Attention, (config,), scaled)(x, x, every), run, atol=1e-4)


def test_mlps():
    x = jax.random.normal(KEY, (2, 3, 16))
    gated = ModelConfig(16, 1, 1, 2)
    p = init_module(Mlp, (gated,), KEY)
    assert p["gate"]["kernel"].shape == (16, 42)  # int(2 * 64 / 3)
    gate = x @ p["gate"]["kernel"]
    expected = (gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]
    np.testing.assert_allclose(apply_module(Mlp, (gated,), p)(x), expected, atol=1e-5)
    plain = ModelConfig(16, 1, 1, 2, gated_mlp=False, activation="gelu", mlp_bias=True)
    p = init_module(Mlp, (plain,), KEY)
    p["up"]["bias"] += 0.3
    hidden = np.asarray(x @ p["up"]["kernel"] + 0.3, np.float64)
    erf = np.vectorize(math.erf)
    expected = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ p["down"]["kernel"] + p["down"]["bias"]
    np.testing.assert_allclose(apply_module(Mlp, (plain,), p)(x), expected, atol=1e-5)


def test_position_tables():
    one, two = sincos_1d(512, 384), grid_positions((14, 14), 384)
    expected = [0.8414710, 0.8152506, 0.7885930, 0.5403023, 0.5791082]
    np.testing.assert_allclose(one[1, [0, 1, 2, 192, 193]], expected, atol=1e-6)
    np.testing.assert_allclose(one[511, 191], 0.0535854, atol=1e-6)
    expected = [0, 1, 0.8414710, 0.7885930, 0.5403023]
    np.testing.assert_allclose(two[1, [0, 96, 192, 193, 288]], expected, atol=1e-6)
    np.testing.assert_allclose(two[14, [0, 1, 96, 192, 288]], [0.8414710, 0.7885930, 0.5403023, 0, 1], atol=1e-6)
    oblong = grid_positions((2, 3), 8)
    np.testing.assert_array_equal(oblong[3:, 4:], oblong[:3, 4:])  # row-major: the columns repeat
    with pytest.raises(ValueError, match="multiple of 4"):
        grid_positions((2, 2), 6)


def test_grid_positions_are_row_major():
    positions = grid_positions((2, 3), 8).reshape(2, 3, 8)
    row, column = np.array([1.0, 0.01]), np.array([2.0, 0.02])
    expected = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)])
    np.testing.assert_allclose(positions[1, 2], expected, atol=1e-6)


def test_fourier_positions_tell_neighbouring_cells_apart():
    near, far = (p @ p.T / 32 for p in (sincos(np.arange(32), 64), fourier(np.arange(32), 64)))
    np.testing.assert_allclose(np.diagonal(near), 1)
    assert near[0, 1] > 0.96
    np.testing.assert_allclose(far, np.eye(32), atol=1e-12)
    table = grid_positions((3, 4), 32, "fourier")
    np.testing.assert_allclose(table @ table.T / 8 - 1, np.eye(12) + same_row_or_column((3, 4)) - 1, atol=1e-12)
    with pytest.raises(ValueError, match="more than twice"):
        fourier(np.arange(33), 64)
    with pytest.raises(ValueError, match="Did you mean 'fourier'"):
        model_config("fm_tiny_6e_6d_swiglu_nobias", grid_positions="furier")


def test_fourier_positions_of_two_grids_are_those_of_one_picture():
    """Every cell of the finer grid is nearest to the cell of the coarser one that holds it."""
    grids = {"small": (8, 8), "large": (16, 24)}
    modalities = ModalitySet(tuple(Modality(name, "tokens", 9, grid) for name, grid in grids.items()))
    table = fixed_position_table(modalities, 128, "fourier")
    small, large = table[:64], table[64:]
    np.testing.assert_array_equal(small, grid_positions((8, 8), 128, "fourier").astype(np.float32))
    row, column = np.divmod(np.arange(16 * 24), 24)
    np.testing.assert_array_equal((large @ small.T).argmax(1), row // 2 * 8 + column // 3)
    assert (np.sort(large @ small.T)[:, -1] > 0.5 * (small @ small.T).max()).all()
    # As the reference implementation, sine-cosine positions count cells, whatever other grids there are.
    other = fixed_position_table(modalities, 128)
    np.testing.assert_array_equal(other[64:], grid_positions((16, 24), 128).astype(np.float32))


def same_row_or_column(grid):
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return (row[:, None] == row).astype(float) + (column[:, None] == column) - np.eye(len(row))


def test_aligned_attention_starts_with_keys_equal_to_queries():
    for init, equal in (("aligned", True), ("xavier", False)):
        config = model_config("fm_tiny_6e_6d_swiglu_nobias", attention_init=init)
        params = init_module(Attention, (config,), jax.random.key(0))
        same = np.array_equal(params["query"]["kernel"], params["key"]["kernel"])
        assert same == equal
    with pytest.raises(ValueError, match="Did you mean 'aligned'"):
        model_config("fm_tiny_6e_6d_swiglu_nobias", attention_init="align")
