"""The ViT VQ-VAE and its codebook: parity with the reference implementation, and the codebook's rules."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FIXTURES

from fm4m.tokenizers import quantize, vqvae_model
from fm4m.tokenizers.config import VQConfig

REFERENCE = VQConfig(
    "rgb", (64, 64), 8, 3, codebook_size=128, latent_dim=16, norm_latents=True, encoder_dim=64, encoder_depth=2,
    encoder_heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=4, out_conv=True,
)  # fmt: skip


def reference_params(weights: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Parameters and codebook of the `vqvae_rgb` case in the layout of `vqvae_model`."""

    def linear(name):
        kernel = weights[f"{name}.weight"]
        return {"kernel": kernel.reshape(kernel.shape[0], -1).T, "bias": weights[f"{name}.bias"]}

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def mlp(name):
        return {"fc1": linear(f"{name}.fc1"), "fc2": linear(f"{name}.fc2")}

    def block(name):
        return {
            "norm1": norm(f"{name}.norm1"),
            "attn": {"qkv": linear(f"{name}.attn.qkv"), "proj": linear(f"{name}.attn.proj")},
            "norm2": norm(f"{name}.norm2"),
            "mlp": mlp(f"{name}.mlp"),
        }

    def vit(side):
        blocks = jax.tree.map(lambda *leaves: np.stack(leaves), *[block(f"{side}.blocks.{i}") for i in range(2)])
        return {"blocks": blocks, "norm_mlp": norm(f"{side}.norm_mlp"), "post_mlp": mlp(f"{side}.post_mlp")}

    def convnext(name):
        depthwise = {"kernel": weights[f"{name}.dwconv.weight"].transpose(2, 3, 1, 0)}
        return {
            "dwconv": {**depthwise, "bias": weights[f"{name}.dwconv.bias"]},
            "norm": norm(f"{name}.norm"),
            "pwconv1": linear(f"{name}.pwconv1"),
            "pwconv2": linear(f"{name}.pwconv2"),
            "gamma": weights[f"{name}.gamma"],
        }

    decoder = {"out_proj": linear("decoder.out_proj")}
    decoder["out_conv"] = {str(i): convnext(f"decoder.out_conv.{i}") for i in range(2)}
    params = {
        "encoder": {"proj": linear("encoder.proj"), **vit("encoder")},
        "quant_proj": linear("quant_proj"),
        "post_quant_proj": linear("post_quant_proj"),
        "decoder": {**vit("decoder"), **decoder},
    }
    return params, {name: weights[f"quantize._codebook.{name}"] for name in ("embed", "cluster_size")}


@pytest.fixture(scope="module")
def case():
    if FIXTURES is None:
        pytest.skip("the arrays written by the reference implementation are not beside this checkout")
    from safetensors.numpy import load_file

    params, codebook = reference_params(load_file(FIXTURES / "parity" / "vqvae_rgb_weights.safetensors"))
    return params, codebook, np.load(FIXTURES / "parity" / "vqvae_rgb_io.npz")


def test_reference_forward(case):
    params, codebook, io = case
    image = io["in/image"].transpose(0, 2, 3, 1)

    def tokens(name):
        return io[f"out/{name}"].transpose(0, 2, 3, 1).reshape(2, 64, -1)

    with jax.default_matmul_precision("highest"):
        not_normalised = dataclasses.replace(REFERENCE, norm_latents=False)
        raw = jax.jit(functools.partial(vqvae_model.encode, not_normalised))(params, image)
        output, _, codes, _ = jax.jit(functools.partial(vqvae_model.forward, REFERENCE))(params, codebook, image)
    np.testing.assert_allclose(raw, tokens("latent"), atol=5e-5)
    clear = io["out/code_margin"].reshape(2, -1) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(codes)[clear], io["out/tokens"].reshape(2, -1)[clear])
    # Rows come back as stored, not normalised again.
    np.testing.assert_array_equal(quantize.lookup(codebook, codes), tokens("quant"))
    np.testing.assert_allclose(output, io["out/recon"].transpose(0, 2, 3, 1), atol=5e-5)


def test_reference_training_step(case):
    params, codebook, io = case
    image = io["in/image"].transpose(0, 2, 3, 1)

    def loss_fn(params):
        output, latents, codes, commitment = vqvae_model.forward(REFERENCE, params, codebook, image)
        rebuilt = jnp.mean((output - image) ** 2)
        return rebuilt + commitment, (rebuilt, commitment, latents, codes)

    with jax.default_matmul_precision("highest"):
        grads, (rebuilt, commitment, latents, codes) = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(rebuilt, io["train/rec_loss"], rtol=1e-5)
    np.testing.assert_allclose(commitment, io["train/code_loss"][0], rtol=1e-5)
    norms = dict(zip(io["train/grad_names"], io["train/grad_norms"]))
    for name, leaf in {
        "encoder.proj.weight": grads["encoder"]["proj"]["kernel"],
        "quant_proj.weight": grads["quant_proj"]["kernel"],
        "decoder.out_proj.weight": grads["decoder"]["out_proj"]["kernel"],
        "decoder.post_mlp.fc1.bias": grads["decoder"]["post_mlp"]["fc1"]["bias"],
        "decoder.out_conv.0.gamma": grads["decoder"]["out_conv"]["0"]["gamma"],
    }.items():
        np.testing.assert_allclose(np.linalg.norm(leaf), norms[name], rtol=2e-4, err_msg=name)
    updated = quantize.update(codebook, latents.reshape(-1, 16), codes.reshape(-1))
    np.testing.assert_allclose(updated["embed"], io["train/embed_after"], atol=1e-6)
    np.testing.assert_allclose(updated["cluster_size"], io["train/cluster_size_after"], rtol=1e-6)


def test_init_matches_reference_shapes(case):
    params, codebook, _ = case
    shapes = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(REFERENCE, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, (params, codebook)) == jax.tree.map(jnp.shape, shapes)


def test_patchify_round_trip_and_order():
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    patches = vqvae_model.patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(patches[1, 4], x[1, 4:8, 4:8].transpose(2, 0, 1).ravel())  # row 1, column 1
    np.testing.assert_array_equal(vqvae_model.unpatchify(patches, 4, (2, 3)), x)


def unit_rows(seed: int, *shape: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_nearest_is_by_angle_and_lookup_returns_stored_rows():
    codebook = {"embed": jnp.array([[0.1, 0.0], [0.0, 5.0]]), "cluster_size": jnp.zeros(2)}
    codes = quantize.nearest(codebook, jnp.array([[3.0, 2.9], [0.1, 0.2]]))
    np.testing.assert_array_equal(codes, [0, 1])
    np.testing.assert_array_equal(quantize.lookup(codebook, codes), codebook["embed"])


def test_straight_through_gradient_is_identity_and_commitment_pulls_latents():
    codebook = {"embed": jnp.array(unit_rows(0, 16, 4)), "cluster_size": jnp.zeros(16)}
    latents = jnp.array(unit_rows(1, 5, 4) * 2.0)
    weights = jnp.array(unit_rows(2, 5, 4))
    grad = jax.grad(lambda x: jnp.sum(quantize.quantize(codebook, x)[0] * weights))(latents)
    np.testing.assert_allclose(grad, weights, rtol=1e-6)
    quantised, codes, commitment = quantize.quantize(codebook, latents)
    np.testing.assert_allclose(quantised, codebook["embed"][codes], atol=1e-6)
    np.testing.assert_allclose(commitment, np.mean((np.asarray(quantised) - latents) ** 2), rtol=1e-5)
    pull = jax.grad(lambda x: quantize.quantize(codebook, x)[2])(latents)
    np.testing.assert_allclose(pull, 2 * (latents - quantised) / latents.size, atol=1e-6)


def test_update_moves_used_codes_only():
    codebook = {"embed": jnp.array([[0.9, 0.0], [0.0, 1.0], [-1.0, 0.0]]), "cluster_size": jnp.array([4.0, 2.0, 1.0])}
    latents = jnp.array([[3.0, 0.0], [0.0, 0.5], [0.0, 7.0]])
    new = quantize.update(codebook, latents, jnp.array([0, 0, 1]), decay=0.5)
    diagonal = np.array([1.0, 1.0]) / np.sqrt(2.0)  # the length of a latent has no weight
    np.testing.assert_allclose(new["embed"][0], 0.5 * np.array([0.9, 0.0]) + 0.5 * diagonal, rtol=1e-6)
    np.testing.assert_allclose(new["embed"][1:], codebook["embed"][1:], rtol=1e-6)
    np.testing.assert_allclose(new["cluster_size"], [3.0, 1.5, 0.5])


def test_restart_replaces_dead_codes_by_latents():
    codebook = {"embed": jnp.array(unit_rows(0, 4, 3)), "cluster_size": jnp.array([0.1, 2.0, 0.2, 0.5])}
    latents = jnp.array(5.0 * unit_rows(1, 10, 3))
    new = quantize.restart_dead(jax.random.key(0), codebook, latents, 0.5)
    np.testing.assert_array_equal(new["embed"][np.array([1, 3])], codebook["embed"][np.array([1, 3])])
    np.testing.assert_array_equal(new["cluster_size"], codebook["cluster_size"])
    for row in (0, 2):
        assert np.isclose(np.asarray(latents) / 5.0 @ np.asarray(new["embed"][row]), 1.0, atol=1e-5).sum() == 1
    assert not np.allclose(new["embed"][0], new["embed"][2])


def test_kmeans_finds_clusters():
    centres = unit_rows(0, 8, 16)
    noise = 0.02 * np.random.default_rng(1).normal(size=(800, 16))
    latents = jnp.array(np.repeat(centres, 100, axis=0) + noise, jnp.float32)
    codebook = quantize.kmeans_init(jax.random.key(3), latents, 32, tokens_per_batch=64)
    similarity = unit_rows(0, 8, 16) @ np.asarray(codebook["embed"]).T
    assert similarity.max(axis=1).min() > 0.98
    np.testing.assert_allclose(np.linalg.norm(codebook["embed"], axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(codebook["cluster_size"], 2.0)


def test_usage():
    used, perplexity = quantize.usage(np.array([5, 5, 0, 0]))
    assert float(used) == 0.5
    assert float(perplexity) == pytest.approx(2.0)


@pytest.mark.parametrize("domain", ["semseg", "features"])
def test_other_inputs(domain):
    extra = {"num_classes": 7, "class_dim": 8} if domain == "semseg" else {}
    config = VQConfig(
        domain, (8, 16), 4 if domain == "semseg" else 1, 1 if domain == "semseg" else 20, codebook_size=16,
        encoder_dim=16, encoder_depth=1, encoder_heads=2, decoder_dim=24, decoder_depth=2, decoder_heads=3, **extra,
    )  # fmt: skip
    params, codebook = jax.jit(functools.partial(vqvae_model.init_with_codebook, config))(jax.random.key(0))
    x = jnp.ones((2, 8, 16), jnp.int32) if domain == "semseg" else jnp.ones((2, 8, 16, 20))
    output, latents, codes, _ = jax.jit(functools.partial(vqvae_model.forward, config))(params, codebook, x)
    tokens = config.grid[0] * config.grid[1]
    assert tokens == (8 if domain == "semseg" else 128)
    assert output.shape == (2, 8, 16, 7 if domain == "semseg" else 20)
    assert latents.shape == (2, tokens, 32)
    assert codes.shape == (2, tokens)
