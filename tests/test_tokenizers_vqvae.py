"""The deterministic tokenizers' networks: patches, positions for any grid, every kind of input, dtypes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.positions import grid_positions
from fm4m.tokenizers import mlp, vit, vqvae_model
from fm4m.tokenizers.config import VQConfig

SMALL = {
    "codebook_size": 16, "latent_dim": 8, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 12,
    "decoder_depth": 2, "decoder_heads": 3,
}  # fmt: skip


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_patchify_round_trip_and_order():
    x = normal(0, 2, 8, 12, 3)
    patches = vit.patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(patches[1, 4], x[1, 4:8, 4:8].transpose(2, 0, 1).ravel())  # row 1, column 1
    np.testing.assert_array_equal(vit.unpatchify(patches, 4, (2, 3)), x)


# ---- positions


def cubic(distance: float) -> float:
    """The convolution kernel with a = -0.75, by the distance from the sample."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def resize_one_by_one(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Every output as a sum over the 16 samples around it; samples outside repeat the edge."""
    height, width, _ = table.shape
    out = np.zeros((rows, columns, table.shape[2]))
    for i, j in np.ndindex(rows, columns):
        y, x = (i + 0.5) * height / rows - 0.5, (j + 0.5) * width / columns - 0.5
        for k in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for m in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                sample = table[min(max(k, 0), height - 1), min(max(m, 0), width - 1)]
                out[i, j] += cubic(y - k) * cubic(x - m) * sample
    return out


@pytest.mark.parametrize(("size", "grid"), [((4, 4), (6, 5)), ((5, 3), (2, 7)), ((1, 2), (3, 3)), ((4, 4), (4, 5))])
def test_resizing_is_bicubic(size, grid):
    table = np.random.default_rng(0).normal(size=(*size, 3))
    np.testing.assert_allclose(vit.resize_bicubic(table, grid), resize_one_by_one(table, *grid), atol=1e-12)


def test_positions_follow_the_grid():
    table = grid_positions((4, 4), 8)
    np.testing.assert_array_equal(vit.positions((4, 4), (4, 4), 8), table.astype(np.float32))
    resized = resize_one_by_one(table.reshape(4, 4, 8), 2, 6).reshape(12, 8)
    np.testing.assert_allclose(vit.positions((4, 4), (2, 6), 8), resized, atol=1e-6)


# ---- networks against numpy


def numpy_norm(p, x, eps):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def numpy_linear(p, x):
    return x @ p["kernel"] + p["bias"]


def numpy_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def random_like(shapes, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


def random_params(config: VQConfig):
    return random_like(jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0)))


def test_bottleneck_mlp_against_numpy():
    config = VQConfig("vector", (1, 1), 1, 6, **SMALL | {"encoder_depth": 3}, encoder="mlp", decoder="mlp")
    params, _ = random_params(config)
    x, p = normal(1, 4, 6), params["encoder"]
    y = numpy_linear(p["linear_in"], x)
    for i in range(3):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        hidden = numpy_gelu(numpy_linear(block["fc1"], numpy_norm(block["norm"], y, 1e-5)))
        y = y + numpy_linear(block["fc2"], hidden)
    y = numpy_linear(params["quant_proj"], numpy_linear(p["linear_out"], y))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(vqvae_model.encode(config, params, x)[:, 0], y, rtol=1e-4, atol=1e-4)
        # A map is so many vectors.
        many = mlp.bottleneck_mlp(p, jnp.array(x.reshape(2, 2, 6))).reshape(4, -1)
        np.testing.assert_allclose(many, mlp.bottleneck_mlp(p, jnp.array(x)), atol=1e-5)


def test_semseg_embeds_ids():
    config = VQConfig("semseg", (8, 8), 4, 1, num_classes=5, class_dim=3, **SMALL)
    params, _ = random_params(config)
    ids = np.random.default_rng(1).integers(0, 5, (2, 8, 8))
    rgb = dataclasses.replace(config, domain="rgb", num_classes=0, channels=3)
    embedded = params["cls_emb"][ids]
    run = jax.jit(vqvae_model.encode, static_argnums=0)
    np.testing.assert_allclose(run(config, params, ids), run(rgb, params, embedded), atol=1e-5)


KINDS = {
    "rgb": ({"channels": 3, "out_conv": True}, (8, 16, 3), (8, 16, 3)),
    "semseg": ({"num_classes": 7, "class_dim": 8}, (8, 16), (8, 16, 7)),
    "features": ({"channels": 20, "patch_proj": False}, (2, 4, 20), (2, 4, 20)),
    "edges": ({"encoder_size": (16, 16), "quantizer": "euclidean"}, (8, 16, 1), (8, 16, 1)),
    "mask": (
        {"quantizer": "fsq", "fsq_levels": (4, 3, 3), "codebook_size": 36, "latent_dim": 3}, (8, 16, 1), (8, 16, 1),
    ),
    "vector": (
        {"channels": 9, "image_size": (1, 1), "patch_size": 1, "encoder": "mlp", "decoder": "mlp",
         "quantizer": "memcodes", "num_codebooks": 4}, (9,), (9,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("domain", KINDS)
def test_shapes_of_every_kind(domain):
    fields, input_shape, output_shape = KINDS[domain]
    config = VQConfig(**{"domain": domain, "image_size": (8, 16), "patch_size": 4, "channels": 1} | SMALL | fields)
    cells = 1 if domain == "vector" else 8
    x = jnp.ones((2, *input_shape), jnp.int32 if domain == "semseg" else jnp.float32)
    params, codebook = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0))
    output, latents, codes, loss = jax.eval_shape(
        functools.partial(vqvae_model.forward, config), params, codebook, x, jax.random.key(0)
    )
    assert output.shape == (2, *output_shape) and output.dtype == jnp.float32
    assert latents.shape == (2, cells, config.latent_dim) and latents.dtype == jnp.float32
    assert codes.shape == ((2, 1, 4) if domain == "vector" else (2, cells)) and codes.dtype == jnp.int32
    assert loss.shape == ()


def test_half_precision_stays_close_and_other_grids_work():
    config = VQConfig("rgb", (8, 8), 4, 3, **SMALL)
    params, _ = random_params(config)
    x = normal(2, 2, 12, 8, 3)
    run = jax.jit(vqvae_model.encode, static_argnums=(0, 3))
    full, half = run(config, params, x, jnp.float32), run(config, params, x, jnp.bfloat16)
    assert full.shape == (2, 6, 8) and half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.1 * np.abs(full).max())
    assert np.abs(np.asarray(half) - full).max() > 0
    with pytest.raises(ValueError, match="12x6 cannot be cut into patches of 4"):
        vqvae_model.encode(config, params, x[:, :, :6])


def test_random_parameters():
    config = VQConfig("semseg", (8, 8), 4, 1, num_classes=5, post_mlp=False, **SMALL | {"encoder_dim": 32})
    params, codebook = jax.jit(functools.partial(vqvae_model.init_with_codebook, config))(jax.random.key(0))
    kernel = np.asarray(params["encoder"]["blocks"]["attn"]["qkv"]["kernel"])
    assert np.abs(kernel).max() == pytest.approx((6 / 64) ** 0.5, rel=0.01)  # of a square map, three times
    assert params["cls_emb"].std() == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(np.linalg.norm(codebook["embed"], axis=-1), 1.0, rtol=1e-5)
    assert not codebook["cluster_size"].any() and not params["quant_proj"]["bias"].any()
