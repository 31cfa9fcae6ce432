"""The UViT against plain numpy; shape of the network, start values, conditioning by addition and attention, skips."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.interop import ml4m_divae
from fm4m.tokenizers import uvit
from fm4m.tokenizers.diffusion_config import PRESETS, DiffusionConfig, UViTConfig
from fm4m.tokenizers.vit import resize_bicubic
from tests import numpy_uvit

SMALL = UViTConfig(patch_size=2, block_channels=(32,), layers=1, dim=32, depth=5, heads=2, position_grid=5)
CONFIGS = {
    "concat": dataclasses.replace(SMALL, depth=2, resolution_embedding=True),
    "xattn": dataclasses.replace(SMALL, conditioning="xattn", long_skip=True, extra_downsample=False, dropout=0.5),
    "levels": dataclasses.replace(SMALL, block_channels=(32, 64), layers=2, long_skip=True),
}
X = np.random.default_rng(1).standard_normal((2, 8, 24, 1)).astype(np.float32)
T = np.array([3, 700])
LATENTS = np.random.default_rng(2).standard_normal((2, 2, 3, 4)).astype(np.float32)
MASK = np.zeros((2, 2, 3), bool)
SIZE = np.array([[100.0, 80.0], [50.0, 200.0]], np.float32)


@pytest.fixture(scope="module", params=["concat", "xattn", pytest.param("levels", marks=pytest.mark.slow)])
def network(request):
    config = CONFIGS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvit.layers, "draw", numpy_uvit.draw)
        start = uvit.init(config, 1, 4, jax.random.key(0))
    leaves, shape = jax.tree.flatten(start)
    rng = np.random.default_rng(0)
    moved = jax.tree.unflatten(shape, [x + 0.05 * rng.standard_normal(x.shape, np.float32) for x in leaves])
    apply = jax.jit(lambda params, x, t, latents, mask, size: uvit.apply(config, params, x, t, latents, mask, size))
    return config, start, moved, apply


def numpy_network(config, params):
    """The same network in numpy, as a function of `uvit.apply`'s arguments."""
    whole = types.SimpleNamespace(
        name="small", channels=1, latent_dim=4, diffusion=DiffusionConfig(uvit=config), grid=(2, 3), cell_size=4
    )
    tensors = {key.removeprefix("decoder."): x for key, x in ml4m_divae.from_params(whole, params).items()}
    other = numpy_uvit.UViT(tensors, config.layers, len(config.block_channels), config.heads)
    bicubic = lambda table, grid: resize_bicubic(table[0].transpose(1, 2, 0), grid).transpose(2, 0, 1)[None]  # noqa: E731
    first = lambda x: np.moveaxis(x, -1, 1)  # noqa: E731

    def apply(x, t, latents, mask, size):
        return np.moveaxis(other(first(x), t, first(latents), mask, size, bicubic), 1, -1)

    return apply


def test_the_same_as_in_numpy(network):
    config, _, moved, _ = network
    mask = np.array([[[0, 1, 0], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]], bool)
    other = numpy_network(config, moved)
    # Where all is hidden, attention sees the mean; latents as small as the last show the norm's epsilon.
    for latents, hidden in ((LATENTS, mask), (LATENTS, mask | True), (0.003 * LATENTS, mask)):
        expected, y = other(X, T, latents, hidden, SIZE), _run(network, latents=latents, mask=hidden)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_without_the_original_size_the_network_is_told_none(network):
    config, _, moved, _ = network
    y = jax.jit(lambda p: uvit.apply(config, p, X, T, LATENTS, MASK))(moved)
    expected = numpy_network(config, moved)(X, T, LATENTS, MASK, None)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name, parameters", [("uvit_b_p4_f16", 126_750_979), ("uvit_l_p4_f16", 391_424_003)])
def test_sizes_of_presets(name, parameters):
    shapes = jax.eval_shape(lambda key: uvit.init(PRESETS[name], 3, 32, key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == parameters
    if name == "uvit_b_p4_f16":
        # The reference counts its constant position table, and says 218.5 million with the encoder's 90,995,744.
        assert round((count + 32 * 32 * 768 + 90_995_744) / 1e6, 1) == 218.5


def test_the_transformer_starts_without_attention(network):
    config, start = network[:2]
    for name, depth in uvit.stacks(config).items():
        blocks = start["mid"][name]
        assert blocks["qkv"]["kernel"].shape == (depth, 32, 96)
        assert not np.any(blocks["gate"]["kernel"]) and not np.any(blocks["gate"]["bias"])
        assert ("skip" in blocks) == (name == "second")
    # Attention is closed, so only a condition that is added gets through.
    through = config.conditioning == "concat"
    assert ("cond" in start["mid"]) == ("mask_token" in start["mid"]) == through
    one, other = (_run(network, start, latents=latents) for latents in (LATENTS, LATENTS**2))
    assert (np.abs(one - other).max() > 1e-5) == through


def test_start_values(network):
    config, start = network[:2]
    res = start["down"]["0"]["res"]["0"]
    assert not np.any(res["conv2"]["kernel"]) and np.any(res["conv1"]["kernel"])
    for p, sizes in ((start["time"]["fc1"], (32, 128)), (res["time"], (128, 32)), (start["mid"]["proj_out"], None)):
        bound = (6 / sum(sizes or p["kernel"].shape)) ** 0.5
        assert np.abs(p["kernel"]).max() == pytest.approx(bound, rel=0.02) and not np.any(p["bias"])
    if config.conditioning == "concat":
        assert not np.any(start["mid"]["mask_token"])
    else:  # keys and values are two maps from the latents' width
        kernel = start["mid"]["first"]["cross_kv"]["kernel"]
        assert kernel.shape == (2, 4, 64) and np.abs(kernel).max() == pytest.approx((6 / 36) ** 0.5, rel=0.05)


def _run(network, params=None, x=X, t=T, latents=LATENTS, mask=MASK, size=SIZE):
    _, _, moved, apply = network
    return apply(moved if params is None else params, x, t, latents, mask, size)


def test_everything_given_counts(network):
    config = network[0]
    y = _run(network)
    assert y.shape == X.shape and y.dtype == jnp.float32 and np.isfinite(y).all()
    some = MASK.copy()
    some[0, 0, 1] = True
    # A constant added to all latents would be lost in the norm before cross-attention.
    for change in ({"x": X + 0.1}, {"t": T + 200}, {"latents": 0.9 * LATENTS**2}, {"mask": some}):
        assert np.abs(_run(network, **change) - y).max() > 1e-4, change
    assert (np.abs(_run(network, size=2 * SIZE) - y).max() > 1e-4) == config.resolution_embedding
    assert np.abs(_run(network, mask=some) - y)[1].max() < 1e-5  # masks belong to one picture


def test_the_products_are_computed_in_the_type_asked_for(network):
    config, start = network[:2]
    apply = lambda params: uvit.apply(config, params, X, T, LATENTS, MASK, SIZE, dtype=jnp.bfloat16)  # noqa: E731
    program = jax.make_jaxpr(apply)(start)
    scans = [e for e in program.eqns if e.primitive.name == "scan"]
    products = [e for e in (*program.eqns, *scans[0].params["jaxpr"].eqns) if e.primitive.name == "dot_general"]
    assert len(products) > 4 and all(e.invars[0].aval.dtype == jnp.bfloat16 for e in products)
    assert program.out_avals[0].dtype == jnp.float32


def test_a_masked_latent_has_no_influence(network):
    some = np.random.default_rng(3).random(MASK.shape) < 0.5
    assert not some.all(axis=(1, 2)).any()
    hidden = np.where(some[..., None], 9.0, LATENTS).astype(np.float32)
    np.testing.assert_array_equal(_run(network, latents=hidden, mask=some), _run(network, mask=some))


def test_long_skips_connect_mirrored_blocks():
    assert uvit.stacks(dataclasses.replace(SMALL, long_skip=True)) == {"first": 2, "centre": 1, "second": 2}
    assert uvit.stacks(PRESETS["uvit_b_p4_f16_longskip"]) == {"first": 6, "centre": 1, "second": 6}
    assert uvit.stacks(SMALL) == {"blocks": 5}
    for depth in (1, 4):
        with pytest.raises(ValueError, match="depth"):
            dataclasses.replace(SMALL, long_skip=True, depth=depth)


@pytest.mark.slow
def test_the_skip_of_the_first_block_reaches_the_last():
    """Two blocks a side; with its own input cut off, the last block sees the first block's output only."""
    config = dataclasses.replace(SMALL, long_skip=True)
    dim = config.dim
    mid = jax.jit(lambda key: uvit.init(config, 1, 4, key)["mid"])(jax.random.key(0))
    # All gates are closed but that of the MLP of one block in the first stack, which then adds a pattern.
    mid["second"]["skip"]["kernel"] = jnp.stack([jnp.concatenate([jnp.zeros((dim, dim)), jnp.eye(dim)])] * 2)
    mid["first"]["fc2"]["bias"] = jnp.tile(jnp.arange(dim, dtype=jnp.float32), (2, 1))
    x, time = jnp.ones((2, 2, 3, 32)), jnp.ones((2, 128))
    run = jax.jit(lambda mid: uvit.transformer(config, mid, x, time, LATENTS, None, None))
    outputs = []
    for block in (None, 1, 0):
        bias = jnp.zeros((2, 2 * dim))
        mid["first"]["gate"]["bias"] = bias if block is None else bias.at[block, dim:].set(1.0)
        outputs.append(run(mid))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-2
