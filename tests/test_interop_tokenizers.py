"""Tokenizers in the reference implementation's format: what they compute, round trips, and files that are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fm4m.interop import ml4m_divae, ml4m_tokenizers, tokenizer_config
from fm4m.interop.reference_config import FormatError
from fm4m.tokenizers import io, quantize, vqvae_model
from fm4m.tokenizers.config import DIFFUSION_DECODERS, VQConfig
from fm4m.tokenizers.diffusion_config import DiffusionConfig, UViTConfig
from fm4m.tokenizers.tokenizer import Tokenizer

PARITY = FIXTURES / "parity" if FIXTURES else None
NAMES = sorted(p.name.removesuffix("_weights.safetensors") for p in PARITY.glob("*vae_*_weights.*")) if PARITY else []
DETERMINISTIC = [name for name in NAMES if name.startswith("vqvae_")] or [None]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def load_case(name: str):
    meta = json.loads((PARITY / f"{name}_meta.json").read_text())
    tokenizer = io.load(PARITY / f"{name}_weights.safetensors", presets=meta["presets"])
    return types.SimpleNamespace(
        meta=meta, tokenizer=tokenizer, config=tokenizer.config, arrays=dict(np.load(PARITY / f"{name}_io.npz")),
        path=PARITY / f"{name}_weights.safetensors",
    )  # fmt: skip


@pytest.fixture(params=DETERMINISTIC)
def case(request):
    if request.param is None:
        pytest.skip("the reference's arrays are absent (shared/fixtures beside the checkout, or FM4M_FIXTURES)")
    return load_case(request.param)


def rows_of(array: np.ndarray) -> np.ndarray:
    """[B, D, ...] -> [B, n, D]."""
    return np.moveaxis(array.reshape(*array.shape[:2], -1), 1, 2)


def codes_of(config: VQConfig, tokens: np.ndarray) -> np.ndarray:
    """[B, h, w] -> [B, n]; memcodes [B, heads, n] -> [B, n, heads]."""
    if config.quantizer != "memcodes":
        return tokens.reshape(len(tokens), -1)
    return np.moveaxis(tokens.reshape(len(tokens), config.num_codebooks, -1), 1, 2)


def input_of(config: VQConfig, image: np.ndarray) -> np.ndarray:
    if config.domain == "semseg":
        return image.reshape(len(image), *image.shape[-2:])
    return image.reshape(len(image), -1) if config.domain == "vector" else np.moveaxis(image, 1, -1)


def output_of(config: VQConfig, image: np.ndarray) -> np.ndarray:
    return image.reshape(len(image), -1) if config.domain == "vector" else np.moveaxis(image, 1, -1)


@pytest.mark.parametrize(("image", "prefix"), [("in/image", "out"), ("in/image2", "out2")])
def test_what_the_reference_computes(case, image, prefix):
    """Also for an image of another size: its positions are the table's, resized bicubically."""
    config, tokenizer, arrays = case.config, case.tokenizer, case.arrays
    if image not in arrays:
        pytest.skip(f"{case.meta['case']} has no {image}")
    x = input_of(config, arrays[image])
    grid = config.grid_of(x.shape)
    raw = dataclasses.replace(config, norm_latents=False)

    expected = codes_of(config, arrays[f"{prefix}/tokens"])

    @jax.jit
    def run(params, codebook, x):
        tokens, latents = vqvae_model.encode_tokens(config, params, x), vqvae_model.encode(raw, params, x)
        codes = quantize.encode(config, params, codebook, latents)
        rows = quantize.lookup(config, params, codebook, expected)
        return tokens, latents, codes, rows, vqvae_model.decode(config, params, rows, grid)

    tokens, latents, codes, rows, output = run(tokenizer.params, tokenizer.codebook, x)
    np.testing.assert_allclose(tokens, rows_of(arrays[f"{prefix}/enc"]), atol=5e-5)
    np.testing.assert_allclose(latents, rows_of(arrays[f"{prefix}/latent"]), atol=5e-5)
    clear = np.ones(expected.shape, bool)
    if f"{prefix}/code_margin" in arrays:
        clear = codes_of(config, arrays[f"{prefix}/code_margin"]) > 1e-5
        assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(codes)[clear], expected[clear])
    # Stored rows, not normalised again.
    np.testing.assert_allclose(rows, rows_of(arrays[f"{prefix}/quant"]), atol=5e-5)
    for name in ("recon", "decode_tokens"):
        if f"{prefix}/{name}" in arrays:
            wanted = output_of(config, arrays[f"{prefix}/{name}"])
            np.testing.assert_allclose(output, wanted, atol=5e-5, err_msg=name)


def test_one_training_step(case):
    config, tokenizer, arrays = case.config, case.tokenizer, case.arrays
    if "train/rec_loss" not in arrays or config.quantizer == "memcodes":
        pytest.skip(f"{case.meta['case']} has no training step that does not depend on PyTorch's random numbers")
    x = input_of(config, arrays["in/image"])

    def loss_fn(params):
        output, latents, codes, commitment = vqvae_model.forward(config, params, tokenizer.codebook, x)
        if config.domain == "semseg":
            chosen = jnp.take_along_axis(jax.nn.log_softmax(output), x[..., None], axis=-1)
            rebuilt = -jnp.mean(chosen)
        else:
            rebuilt = jnp.mean(jnp.square(output - x))
        return rebuilt + commitment, (rebuilt, commitment, latents, codes)

    grads, (rebuilt, commitment, latents, codes) = jax.jit(jax.grad(loss_fn, has_aux=True))(tokenizer.params)
    np.testing.assert_allclose(rebuilt, arrays["train/rec_loss"], rtol=1e-5)
    np.testing.assert_allclose(commitment, arrays["train/code_loss"][0], rtol=1e-5)
    ours = ml4m_tokenizers.from_tokenizer(Tokenizer(config, grads, tokenizer.codebook))
    names = [str(name) for name in arrays["train/grad_names"]]
    assert len(names) > 20
    for name, norm in zip(names, arrays["train/grad_norms"], strict=True):
        if np.isnan(norm):  # a constant: the reference gives no gradient
            assert name.endswith("pos_emb")
            continue
        np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, rtol=2e-4, atol=1e-7, err_msg=name)
    updated = quantize.update(config, tokenizer.codebook, latents, codes)
    np.testing.assert_allclose(updated["embed"], arrays["train/embed_after"], atol=1e-6)
    np.testing.assert_allclose(updated["cluster_size"], arrays["train/cluster_size_after"], rtol=1e-6)


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_fixtures_come_back_byte_by_byte(name, tmp_path):
    """Read, written in our own format, read again, and exported: the same file."""
    found = load_case(name)
    io.save(tmp_path / "ours.safetensors", found.tokenizer)
    again = io.load(tmp_path / "ours.safetensors")
    assert again.config == found.config
    ml4m_tokenizers.save(tmp_path / "back.safetensors", again)
    assert_same_file(tmp_path / "back.safetensors", found.path)


def assert_same_file(path, wanted):
    first, second = load_file(wanted), load_file(path)
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.tobytes() == second[key].tobytes(), key
    with safe_open(wanted, "numpy") as a, safe_open(path, "numpy") as b:
        assert a.metadata() == b.metadata()


# ---- tokenizers of our own in that format

TINY = {"patch_size": 4, "codebook_size": 16, "latent_dim": 8, "encoder_dim": 16, "encoder_depth": 2,
        "encoder_heads": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
PRESETS = {
    "vit_own_enc": {"dim_tokens": 16, "depth": 2, "num_heads": 2},
    "vit_own_dec": {"dim_tokens": 8, "depth": 1, "num_heads": 2},
}
KINDS = {
    "depth": {"out_conv": True, "encoder_size": (16, 16)},
    "semseg": {"num_classes": 5, "class_dim": 6, "quantizer": "euclidean", "post_mlp": False},
    "features": {"patch_proj": False, "channels": 10, "norm_latents": True},
    "vector": {"channels": 7, "image_size": (1, 1), "patch_size": 1, "encoder": "mlp", "decoder": "mlp",
               "quantizer": "memcodes", "num_codebooks": 4, "mlp_ratio": 2.0},
}  # fmt: skip


def own(kind: str) -> Tokenizer:
    config = VQConfig(**{"domain": kind, "image_size": (8, 8), "channels": 1} | TINY | KINDS[kind])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0))
    params, codebook = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    stats = {}
    if kind in ("features", "vector"):
        width = config.channels
        stats = {"mean": np.zeros(width), "std": np.ones(width), "pca": np.eye(width, 3)}
    return Tokenizer(config, params, codebook, {k: v.astype(np.float32) for k, v in stats.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_own_tokenizers_come_back(kind, tmp_path):
    tokenizer = own(kind)
    ml4m_tokenizers.save(tmp_path / f"own_{kind}", tokenizer, presets=PRESETS)
    again = io.load(tmp_path / f"own_{kind}", presets=PRESETS)
    assert tokenizer_config.same_shape(again.config, tokenizer.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, tokenizer.params)
    jax.tree.map(np.testing.assert_array_equal, again.codebook, tokenizer.codebook)
    jax.tree.map(np.testing.assert_array_equal, again.stats, tokenizer.stats)
    # The texts of the metadata and the JSON beside it are one configuration.
    (tmp_path / f"own_{kind}" / "config.json").unlink()
    assert io.load(tmp_path / f"own_{kind}", presets=PRESETS).config == again.config


def uvit_tokenizer() -> tuple[VQConfig, dict]:
    """A tokenizer with a UViT, and presets that name its networks in the reference's words."""
    network = {
        "patch_size": 4, "block_out_channels": [32], "layers_per_block": 1, "downsample_before_mid": True,
        "mid_layers": 3, "mid_num_heads": 2, "mid_dim": 16, "mid_mlp_ratio": 1, "mid_qkv_bias": True,
        "mid_hw_posemb": 4, "mid_use_long_skip": True, "res_embedding": True,
    }  # fmt: skip
    uvit = UViTConfig(block_channels=(32,), layers=1, depth=3, heads=2, dim=16, mlp_ratio=1.0, position_grid=4,
                      long_skip=True, resolution_embedding=True, conditioning="xattn", dropout=0.1)  # fmt: skip
    values = TINY | {"patch_size": 8, "decoder": "uvit", "diffusion": DiffusionConfig(uvit=uvit, sampler="ddpm")}
    config = VQConfig(domain="rgb", image_size=(16, 16), channels=3, **values)
    return config, PRESETS | {"uvit_own": network}


def test_a_uvit_comes_back_from_file_and_folder(tmp_path):
    """Of the downsampling before the transformer, a file holds both names, as a state dict does; a folder holds one."""
    config, presets = uvit_tokenizer()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0))
    params, codebook = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    names = {f"decoder.downsample_mid.{name}.{part}" for name in ("Conv2d_0", "conv") for part in ("weight", "bias")}
    kept = {name for name in names if "Conv2d_0" in name}
    for path, held in ((tmp_path / "rgb.safetensors", names), (tmp_path / "rgb", kept)):
        ml4m_tokenizers.save(path, Tokenizer(config, params, codebook, {}), presets)
        again = io.load(path, "rgb", presets)
        assert again.config.diffusion.network == config.diffusion.network
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        file = path if path.suffix else path / "model.safetensors"
        assert {key for key in load_file(file) if "downsample_mid" in key} == held
        # Written again as it was, after a stop in our own format.
        io.save(tmp_path / "ours.safetensors", again)
        back = tmp_path / "back" / path.name
        ml4m_tokenizers.save(back, io.load(tmp_path / "ours.safetensors"), presets)
        assert_same_file(back if path.suffix else back / "model.safetensors", file)
    typed = json.loads((tmp_path / "rgb" / "config.json").read_text())
    assert typed["dec_type"] == "uvit_own" and typed["conditioning"] == "xattn" and not any("." in key for key in typed)


def test_keys_of_global_tokenizers():
    """The names of section by section: MLP, memcodes; what the reference's file of a global feature holds."""
    keys = ml4m_tokenizers.shapes(own("vector").config)
    side = lambda s, n: {  # noqa: E731
        *(f"{s}.{end}.{p}" for end in ("linear_in", "linear_out") for p in ("weight", "bias")),
        *(f"{s}.blocks.{i}.block.{j}.{p}" for i in range(n) for j in (0, 2) for p in ("weight", "bias")),
        *(f"{s}.layernorms.{i}.{p}" for i in range(n) for p in ("weight", "bias")),
    }
    rest = {f"{n}.{p}" for n in ("quant_proj", "post_quant_proj") for p in ("weight", "bias")}
    codes = {"quantize.codes", "quantize.to_k.weight", "quantize.to_v.weight"}
    assert set(keys) == side("encoder", 2) | side("decoder", 1) | rest | codes
    assert keys["quantize.codes"] == (4, 16, 2) and keys["quant_proj.weight"] == (8, 16, 1, 1)
    assert keys["encoder.blocks.0.block.0.weight"] == (32, 16)


def test_released_sizes_are_the_references():
    """Parameter counts of the released tokenizers for 224 to 448 pixels; codebooks are no parameters there."""
    vit = {"encoder_dim": 768, "encoder_depth": 12, "encoder_heads": 12, "decoder_dim": 768, "decoder_depth": 12,
           "decoder_heads": 12, "image_size": (448, 448), "latent_dim": 32}  # fmt: skip
    configs = {
        181.6: VQConfig("features", patch_size=16, channels=512, patch_proj=False, codebook_size=8192, **vit),
        182.4: VQConfig("features", patch_size=14, channels=768, patch_proj=False, codebook_size=8192, **vit),
        219.8: VQConfig("semseg", patch_size=16, channels=1, num_classes=134, codebook_size=4096, **vit),
    }
    for millions, config in configs.items():
        counted = sum(np.prod(s) for k, s in ml4m_tokenizers.shapes(config).items() if not k.startswith("quantize."))
        assert counted / 1e6 == pytest.approx(millions, abs=0.051), config


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("4M_tokenizers_rgb_16k_224-448", "rgb"), ("4M_tokenizers_CLIP-B16_8k_224-448", "features"),
        ("4M_tokenizers_DINOv2-B14-global_8k_16_224", "vector"), ("4M_tokenizers_human-poses_1k_8", "vector"),
        ("4M_tokenizers_sam-instance_1k_64", "mask"), ("4M_tokenizers_edge_8k_224-512", "edges"),
        ("4M_tokenizers_semseg_4k_224-448", "semseg"), ("4M_tokenizers_depth_8k_224-448", "depth"),
        ("4M_tokenizers_normal_8k_224-448", "normal"), ("weights", None),
    ],
)  # fmt: skip
def test_domain_of_the_released_names(name, domain):
    assert tokenizer_config.domain_of(name) == domain


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "depth.safetensors"
    ml4m_tokenizers.save(path, own("depth"), presets=PRESETS)
    return path


def edit(path, change):
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    tensors = dict(load_file(path))
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("quant_proj.bias"), "lacks quant_proj.bias"),
        (lambda t, m: t.update({"decoder.more": np.zeros(1, np.float32)}), "holds decoder.more, which its conf"),
        (lambda t, m: t.update({"quant_proj.bias": np.zeros(3, np.float32)}), r"quant_proj.bias has shape \(3,\)"),
        (lambda t, m: t.update({"quant_proj.bias": np.full(8, np.nan, np.float32)}), "not finite"),
        (lambda t, m: t["encoder.pos_emb"].fill(0.5), "encoder.pos_emb is no sine-cosine table"),
        (lambda t, m: t["quantize._codebook.initted"].fill(0), "waits for a k-means"),
        (lambda t, m: m.update(enc_type="vit_xxl_enc"), "no preset 'vit_xxl'.*dim_tokens"),
        (lambda t, m: m.update(latent_dim="-3"), "latent_dim is -3; expected a whole number"),
        (lambda t, m: m.update(num_codebooks="2"), "'lucid' with 2 codebook"),
        (lambda t, m: m.update(quant_type="residual"), "quantizer 'residual'"),
        (lambda t, m: m.update(patch_size_dec="8"), "patch_size_dec 8"),
        (lambda t, m: m.update(norm_codes="perhaps"), "norm_codes is 'perhaps'; expected True or False"),
        (lambda t, m: [t.pop(k) for k in list(t) if k.startswith("decoder.")], "holds no decoder"),
        (lambda t, m: m.update(dec_type="unet_tiny"), "unet_tiny is no known denoiser"),
    ],
)  # fmt: skip
def test_files_that_are_refused(file, change, message):
    edit(file, change)
    with pytest.raises(FormatError, match=message) as error:
        io.load(file, presets=PRESETS)
    assert str(file) in str(error.value)


def test_domain_must_be_known(file):
    unnamed = file.rename(file.with_name("tokenizer.safetensors"))
    with pytest.raises(FormatError, match=r"nothing says what its images of 1 channel.*pass domain="):
        io.load(unnamed, presets=PRESETS)
    assert io.load(unnamed, "edges", PRESETS).config.domain == "edges"


def test_what_the_reference_has_no_place_for(tmp_path):
    tokenizer = own("features")
    tokenizer.stats["std"] = 2 * tokenizer.stats["std"]
    with pytest.raises(FormatError, match="standardises its input"):
        ml4m_tokenizers.save(tmp_path / "a.safetensors", tokenizer, PRESETS)
    with pytest.raises(FormatError, match=re.escape("no encoder of width 16 with 2 blocks and 2 heads")):
        ml4m_tokenizers.save(tmp_path / "b.safetensors", own("depth"))
    for change, message in (
        ({"quantizer": "fsq", "fsq_levels": (8, 5), "codebook_size": 40, "latent_dim": 2}, "FSQ"),
        ({"image_size": (8, 16)}, "square"),
    ):
        config = dataclasses.replace(own("depth").config, **change)
        with pytest.raises(FormatError, match=message):
            tokenizer_config.from_config(config, PRESETS)
    assert not list(tmp_path.iterdir())


@needs_fixtures
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("divae_")])
def test_diffusion_tokenizers(name):
    """Encoder and codes; the decoder's own numbers are tested with it."""
    found = load_case(name)
    config, tokenizer, arrays = found.config, found.tokenizer, found.arrays
    stored = ml4m_divae.with_twins(config, load_file(found.path))
    assert config.decoder in DIFFUSION_DECODERS and set(ml4m_divae.keys(config)) < set(stored)
    x = input_of(config, arrays["in/image"])
    latents = jax.jit(vqvae_model.encode, static_argnums=0)(config, tokenizer.params, x)
    np.testing.assert_allclose(latents, rows_of(arrays["out/latent"]), atol=5e-5)
    codes = quantize.encode(config, tokenizer.params, tokenizer.codebook, latents)
    clear = codes_of(config, arrays["out/code_margin"]) > 1e-5
    np.testing.assert_array_equal(np.asarray(codes)[clear], codes_of(config, arrays["out/tokens"])[clear])
