"""The patched UNet: shape of the network, start values, conditioning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.tokenizers import conv_layers, unet
from fm4m.tokenizers.diffusion_config import UNetConfig
from tests import numpy_uvit

CONFIG = UNetConfig(patch_size=2, channels=32, channel_mult=(1, 2), res_blocks=1, attention_downsamples=(2,))


def noisy(tree, seed=0):
    """Parameters away from their start, so that nothing is zero by construction."""
    leaves, shape = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(shape, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_layers, "draw", numpy_uvit.draw)
        start = unet.init(CONFIG, 3, 8, jax.random.key(0))

    @jax.jit
    def apply(params, x, t, latents, mask):
        return unet.apply(CONFIG, params, x, t, latents, mask)

    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 16, 24, 3), np.float32)
    latents = rng.standard_normal((2, 2, 3, 8), np.float32)
    return start, noisy(start), apply, x, np.array([3, 700]), latents, np.zeros((2, 2, 3), bool)


def test_the_released_network_has_the_references_size():
    shapes = jax.eval_shape(lambda key: unet.init(UNetConfig(), 3, 32, key), jax.random.key(0))
    # The released RGB tokenizer has 287,346,000 parameters, 90,995,744 of them in its encoder.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 287_346_000 - 90_995_744


def test_blocks_in_order():
    inputs, outputs, middle = unet.plan(UNetConfig(), 80)
    assert [b.kind for b in inputs] == ["conv", *["res"] * 3, *["down", *["res"] * 3] * 3]
    assert [b.attention for b in inputs if b.kind == "res"] == [False] * 6 + [True] * 6
    assert inputs[0].fan_in == 80 and middle == 512
    assert len(outputs) == 16 and [i for i, b in enumerate(outputs) if b.up] == [3, 7, 11]
    assert outputs[-1].fan_out == 256 and outputs[0].fan_in == 1024


def test_an_untrained_network_puts_out_zeros(network):
    start, _, apply, x, t, latents, mask = network
    assert not np.any(apply(start, x, t, latents, mask))
    # Convolutions within a block start at 1/sqrt(inputs) of one output.
    kernel = start["input"]["1"]["res"]["conv1"]["kernel"]
    assert np.abs(kernel).max() == pytest.approx((32 * 9) ** -0.5, rel=0.02)


def test_picture_level_and_latents_all_count(network):
    _, params, apply, x, t, latents, mask = network
    y = apply(params, x, t, latents, mask)
    assert y.shape == x.shape and y.dtype == jnp.float32
    for changed in ((x + 0.1, t, latents), (x, t + 200, latents), (x, t, latents + 0.1)):
        assert np.abs(apply(params, *changed, mask) - y).max() > 1e-3
    first, second = (np.abs(apply(params, x, np.array([3, 900]), latents, mask) - y)[i].max() for i in (0, 1))
    assert first < 1e-5 < second  # a level is that of one picture


def test_a_masked_latent_counts_as_zero(network):
    _, params, apply, x, t, latents, mask = network
    some = np.random.default_rng(2).random(mask.shape) < 0.5
    zeros = np.where(some[..., None], 0, latents)
    np.testing.assert_array_equal(apply(params, x, t, latents, some), apply(params, x, t, zeros, mask))


@pytest.mark.slow
def test_bfloat16_is_near_float32(network):
    _, params, apply, x, t, latents, mask = network
    low = jax.jit(lambda *a: unet.apply(CONFIG, *a, dtype=jnp.bfloat16))(params, x, t, latents, mask)
    exact = apply(params, x, t, latents, mask)
    assert low.dtype == jnp.float32
    assert 1e-4 < np.abs(low - exact).mean() / np.abs(exact).mean() < 0.05


def test_the_products_are_computed_in_the_type_asked_for(network):
    _, params, _, x, t, latents, _ = network
    program = jax.make_jaxpr(lambda *a: unet.apply(CONFIG, *a, dtype=jnp.bfloat16))(params, x, t, latents)
    products = [e for e in program.eqns if e.primitive.name == "conv_general_dilated"]
    assert products and all(e.outvars[0].aval.dtype == jnp.bfloat16 for e in products)
    assert program.out_avals[0].dtype == jnp.float32


# ---- layers


def test_parameters_are_drawn_within_their_bounds():
    leaves = {"a": conv_layers.Leaf((40, 3), bound=0.5), "b": conv_layers.Leaf((2,), constant=1.0),
              "c": conv_layers.Leaf((120,), bound=2.0)}  # fmt: skip
    one, other = (jax.jit(lambda key: conv_layers.draw(leaves, key))(jax.random.key(n)) for n in (0, 1))
    assert {name: x.shape for name, x in one.items()} == {"a": (40, 3), "b": (2,), "c": (120,)}
    np.testing.assert_array_equal(one["b"], 1)
    for name, bound in (("a", 0.5), ("c", 2.0)):
        assert 0.9 * bound < np.abs(one[name]).max() <= bound and np.min(one[name]) < 0 < np.max(one[name])
        assert np.abs(one[name] - other[name]).max() > 0.5 * bound
    assert np.abs(np.ravel(one["a"]) / 0.5 - one["c"] / 2).min() > 0  # no number is used twice


def test_cells_are_in_channel_row_column_order():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    cells = conv_layers.to_cells(jnp.asarray(x), 2)
    assert cells.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(cells[1, 1, 2], x[1, 2:4, 4:6].transpose(2, 0, 1).ravel())
    np.testing.assert_array_equal(conv_layers.to_pixels(cells, 2), x)


def test_latents_are_repeated_to_the_cells():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    y = conv_layers.resize_nearest(x, (4, 4))[0, :, :, 0]
    np.testing.assert_array_equal(y, [[0, 0, 1, 2]] * 2 + [[3, 3, 4, 5]] * 2)
    # PyTorch rounds 41 * (2 / 82) to float32, and stays below 1.
    assert conv_layers.resize_nearest(x, (82, 3))[0, 40:43, 0, 0].tolist() == [0, 0, 3]


def test_time_features_are_cosines_then_sines():
    t = jnp.array([0, 7])
    y = conv_layers.time_features(t, 4)
    np.testing.assert_allclose(y[0], [1, 1, 0, 0])
    np.testing.assert_allclose(y[1], [np.cos(7), np.cos(0.07), np.sin(7), np.sin(0.07)], atol=1e-6)


def test_group_norm_is_computed_in_float32_over_groups_of_channels():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 64)).astype(np.float32) + 3
    p = {"scale": np.full(64, 2.0, np.float32), "bias": np.full(64, 0.5, np.float32)}
    groups = x.reshape(2, 15, 32, 2)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * 2 + 0.5
    np.testing.assert_allclose(jax.jit(conv_layers.group_norm)(p, x), expected, atol=1e-5)
    assert jax.eval_shape(conv_layers.group_norm, p, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((100, 100))
    assert conv_layers.dropout(x, 0.2, None) is x
    y = conv_layers.dropout(x, 0.2, jax.random.key(0))
    assert float(y.mean()) == pytest.approx(1, abs=0.03) and float((y == 0).mean()) == pytest.approx(0.2, abs=0.02)
