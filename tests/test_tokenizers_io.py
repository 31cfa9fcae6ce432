"""Tokenizer objects and files: preprocessing, encode/decode, save/load, what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from fixtures import FIXTURES

from fm4m.tokenizers import io, preprocess, reconstruction, vqvae_model
from fm4m.tokenizers.config import DOMAINS, VQConfig
from fm4m.tokenizers.diffusion_config import DiffusionConfig
from fm4m.tokenizers.tokenizer import Tokenizer
from fm4m.transforms.images import standardise_depth

SMALL = {
    "codebook_size": 24, "latent_dim": 8, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16,
    "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


# Codes of the shipped tokenizers for `test_shipped_tokenizers_give_the_codes_they_gave`.
SHIPPED = {
    "rgb": (499, 54, 530, 933, 841, 499, 717, 463, 120, 326, 904, 484),
    "depth": (71, 61, 88, 1, 17, 114, 90, 6, 5, 64, 88, 101),
    "normal": (30, 30, 20, 20, 45, 24, 20, 30, 73, 20, 20, 20),
    "semseg": (121, 118, 57, 2, 24, 57, 0, 46, 113, 118, 113, 2),
    "features": (1000, 1000, 1000, 648, 1000, 1000, 1000, 581, 1000, 730, 581, 1000),
}


def small_config(domain: str) -> VQConfig:
    if domain == "features":
        return VQConfig(domain, (2, 4), 1, 12, **SMALL)
    if domain == "vector":
        coded = {"encoder": "mlp", "decoder": "mlp", "quantizer": "memcodes", "num_codebooks": 4}
        return VQConfig(domain, (1, 1), 1, 12, **SMALL, **coded)
    extra = {"num_classes": 5, "palette": [(i, 2 * i, 3 * i) for i in range(5)]} if domain == "semseg" else {}
    return VQConfig(domain, (16, 32), 8, 3 if domain in ("rgb", "normal") else 1, **extra, **SMALL)


def small_array(config: VQConfig, count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (count, *config.array_shape)
    if config.domain == "depth":
        return rng.uniform(0.5, 9.0, shape).astype(np.float32)
    if config.domain in ("features", "vector"):
        return rng.normal(2.0, 3.0, shape).astype(np.float32)
    if config.domain == "mask":
        return rng.integers(0, 2, shape, dtype=np.uint8)
    return rng.integers(0, config.num_classes or 256, shape, dtype=np.uint8)


def small_tokenizer(domain: str, config: VQConfig | None = None) -> Tokenizer:
    """Random weights, without a compilation."""
    config, rng = config or small_config(domain), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: vqvae_model.init_with_codebook(config, key), jax.random.key(0))
    params, codebook = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, shapes)
    stats = preprocess.feature_stats(small_array(config, 9)) if domain in ("features", "vector") else {}
    return Tokenizer(config, params, codebook, stats)


def some_fast(*fast: str) -> list:
    """All domains; those whose programs differ little from another's are slow tests, as each is compiled anew."""
    return [pytest.param(domain, marks=() if domain in fast else pytest.mark.slow) for domain in DOMAINS]



def test_equal_tokenizers_are_equal_files(tmp_path):
    """The safetensors library alone writes its metadata in one of two orders."""
    tokenizer = small_tokenizer("depth")
    for i in range(8):
        io.save(tmp_path / str(i), tokenizer)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert io.load(tmp_path / "0").config == tokenizer.config


@pytest.mark.parametrize("domain", some_fast("depth", "semseg", "features", "vector"))
def test_encode_decode_picture_and_file(domain, tmp_path):
    tokenizer = small_tokenizer(domain)
    array = small_array(tokenizer.config)
    vector = domain == "vector"
    assert (tokenizer.name, tokenizer.vocab_size) == (domain, 24)
    assert (tokenizer.grid, tokenizer.num_tokens) == (((1, 1), 4) if vector else ((2, 4), 8))
    codes = tokenizer.encode(array)
    assert (codes.shape, codes.dtype) == ((3, tokenizer.num_tokens), np.int32)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == array.shape
    assert decoded.dtype == array.dtype
    picture = tokenizer.to_picture(decoded)
    size = (4, 4) if vector else tokenizer.config.image_size
    assert (picture.shape, picture.dtype) == ((3, *size, 3), np.uint8)

    path = tmp_path / "sub" / f"{domain}.safetensors"
    io.save(path, tokenizer)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = io.load(path)
    assert again.config == tokenizer.config
    np.testing.assert_array_equal(again.encode(array), codes)
    np.testing.assert_array_equal(again.decode(codes), decoded)

    io.save(path, tokenizer, dtype="float16")
    half = io.load(path)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((half.params, half.codebook)))
    assert np.mean(half.encode(array) == codes) > 0.8


def test_batches_do_not_change_results(monkeypatch):
    monkeypatch.setattr("fm4m.tokenizers.tokenizer.MAX_CHUNK", 4)
    tokenizer = small_tokenizer("rgb")
    array = small_array(tokenizer.config, 7)  # a full chunk, and one of three padded to four
    codes = tokenizer.encode(array)
    np.testing.assert_array_equal(codes[3:6], tokenizer.encode(array[3:6]))
    np.testing.assert_array_equal(tokenizer.decode(codes)[3:6], tokenizer.decode(codes[3:6]))
    assert tokenizer.encode(array[:0]).shape == (0, 8)
    assert tokenizer.decode(codes[:0]).shape == (0, 16, 32, 3)


def test_other_sizes():
    tokenizer = small_tokenizer("rgb")
    array = np.random.default_rng(0).integers(0, 256, (2, 24, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"expects arrays \[batch, 16, 32, 3\]"):
        tokenizer.encode(array)
    codes = tokenizer.encode(array, grid=(3, 1))
    assert codes.shape == (2, 3)
    decoded = tokenizer.decode(codes, grid=(3, 1))
    assert decoded.shape == array.shape and tokenizer.to_picture(decoded).shape == array.shape
    with pytest.raises(ValueError, match=r"\[batch, 6\] \(a 3x2 grid\)"):
        tokenizer.decode(codes, grid=(3, 2))
    with pytest.raises(ValueError, match="leave out steps"):
        tokenizer.decode(codes, grid=(3, 1), steps=5)


def test_diffusion_decoder_is_seeded_and_rows_have_their_own_noise(monkeypatch):
    """The denoiser itself is tested elsewhere; here it is noise around the rows."""

    def decode(config, params, rows, key, grid=None, steps=None):
        noise = jax.random.normal(key, (len(rows), 8 * grid[0], 8 * grid[1], 3))
        return 0.3 * noise / (steps or 1) + 0.1 * rows.mean()

    monkeypatch.setattr("fm4m.tokenizers.divae_model.decode", decode)
    monkeypatch.setattr("fm4m.tokenizers.tokenizer.MAX_CHUNK", 2)
    unet = {"channels": 32, "channel_mult": (1,), "res_blocks": 1, "attention_downsamples": ()}
    diffusion = DiffusionConfig(unet=unet)
    tokenizer = small_tokenizer("rgb", dataclasses.replace(small_config("rgb"), decoder="unet", diffusion=diffusion))
    codes = np.zeros((3, 8), np.int32)
    arrays = tokenizer.decode(codes)
    assert arrays.shape == (3, 16, 32, 3) and arrays.dtype == np.uint8
    np.testing.assert_array_equal(arrays, tokenizer.decode(codes))
    np.testing.assert_array_equal(arrays[:1], tokenizer.decode(codes[:1]))
    assert (arrays[0] != arrays[1]).mean() > 0.5 and (arrays[1] != arrays[2]).mean() > 0.5
    assert (arrays != tokenizer.decode(codes, seed=1)).mean() > 0.5
    assert tokenizer.decode(codes, steps=100).std() < 0.2 * arrays.std()


@pytest.mark.parametrize("domain", some_fast("semseg", "features")[:5])
def test_shipped_tokenizers_give_the_codes_they_gave(domain, request):
    """The first codes of two noise images: records made with these files stay readable only as long as they hold."""
    path = request.config.rootpath / "data_pipelines" / "rooms" / "tokenizers" / f"{domain}.safetensors"
    tokenizer = io.load(path)
    rng = np.random.default_rng(0)
    shape = (2, *tokenizer.config.array_shape)
    if domain in ("depth", "features"):
        array = rng.normal(2.0, 0.5, shape).astype(np.float32)
    else:
        array = rng.integers(0, tokenizer.config.num_classes or 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(tokenizer.encode(array)[:, :6].ravel(), SHIPPED[domain])


def test_codes_are_row_major():
    tokenizer = small_tokenizer("rgb")
    array = np.zeros((1, 16, 32, 3), np.uint8)
    changed = array.copy()
    changed[:, 8:, 8:16] = 255  # patch row 1, column 1 of a 2x4 grid
    inputs = [preprocess.to_input(tokenizer.config, {}, x) for x in (array, changed)]
    patches = [vqvae_model.patchify(x, 8) for x in inputs]
    np.testing.assert_array_equal(np.flatnonzero(np.any(patches[0] != patches[1], axis=-1)[0]), [5])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((2, 8), 24), "code 24 at row 0, position 0 is outside 0..23"),
        (np.full((2, 8), -1), "code -1 at row 0"),
        (np.zeros((2, 7), np.int32), r"\[batch, 8\].*got \[2, 7\]"),
        (np.zeros((2, 8), np.float32), "integers"),
    ],
)
def test_decode_refuses(codes, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer("rgb").decode(codes)


@pytest.mark.parametrize(
    ("domain", "array", "message"),
    [
        ("rgb", np.zeros((1, 16, 16, 3), np.uint8), r"expects arrays \[batch, 16, 32, 3\]"),
        ("rgb", np.zeros((1, 16, 32, 3), np.float32), "expects uint8 arrays, got float32"),
        ("depth", np.full((1, 16, 32), np.inf, np.float32), "not finite"),
        ("semseg", np.full((1, 16, 32), 5, np.uint8), "class id 5 but only ids below 5"),
        ("mask", np.zeros((1, 16, 32, 1), np.uint8), r"expects arrays \[batch, 16, 32\]"),
        ("vector", np.zeros((1, 12), np.int32), "expects float arrays, got int32"),
    ],
)
def test_encode_refuses(domain, array, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer(domain).encode(array)


def rewrite(path, change_tensors=None, change_metadata=None):
    """Rewrites a tokenizer file after changing its tensors or metadata."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata=metadata)


def test_load_refuses_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "depth.safetensors"
    with pytest.raises(FileNotFoundError, match=r"depth\.safetensors"):
        io.load(path)

    def fresh():
        io.save(path, small_tokenizer("depth"))

    fresh()
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:5], b"", b"PK\x03\x04 not a tensor file"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"depth\.safetensors is not a complete safetensors file"):
            io.load(path)

    fresh()
    rewrite(path, change_metadata=lambda m: m.pop("format"))
    with pytest.raises(ValueError, match="not a tokenizer of fm4m"):
        io.load(path)

    fresh()
    rewrite(path, lambda t: (t.pop("codebook.embed"), t.update({"params.extra": np.zeros(2, np.float32)})))
    with pytest.raises(ValueError, match=r"missing \['codebook.embed'\], unexpected \['params.extra'\]"):
        io.load(path)

    fresh()
    rewrite(path, lambda t: t.update({"codebook.embed": np.zeros((24, 9), np.float32)}))
    with pytest.raises(ValueError, match=r"'codebook.embed' is float32 \[24, 9\], expected .* \[24, 8\]"):
        io.load(path)

    fresh()
    rewrite(path, lambda t: t.update({"codebook.embed": np.full((24, 8), np.nan, np.float32)}))
    with pytest.raises(ValueError, match=r"'codebook.embed' holds values that are not finite"):
        io.load(path)

    def unknown_key(metadata):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), "dropout": 0.1})

    fresh()
    rewrite(path, change_metadata=unknown_key)
    with pytest.raises(ValueError, match=r"depth\.safetensors: unknown key\(s\).*dropout"):
        io.load(path)


def test_save_refuses_what_float16_cannot_hold(tmp_path):
    tokenizer = small_tokenizer("rgb")
    tokenizer.params["quant_proj"]["bias"] = tokenizer.params["quant_proj"]["bias"] + 1e6
    with pytest.raises(ValueError, match=r"params\.quant_proj\.bias.*not finite as float16"):
        io.save(tmp_path / "rgb.safetensors", tokenizer, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_depth_standardisation_matches_reference():
    if FIXTURES is None:
        pytest.skip("the arrays written by the reference implementation are not beside this checkout")
    arrays = np.load(FIXTURES / "transforms" / "transforms_images.npz")
    for i in range(3):
        ours = standardise_depth(arrays[f"depth_raw/{i}"])
        np.testing.assert_allclose(ours, arrays[f"depth_std/{i}"], atol=1e-5)


def test_depth_standardisation_ignores_scale_and_outliers():
    depth = small_array(small_config("depth"), 2)
    base = standardise_depth(depth)
    np.testing.assert_allclose(standardise_depth(3.0 * depth + 2.0), base, atol=1e-3)
    depth[:, 0, 0] = 1e4
    far = np.asarray(standardise_depth(depth))
    np.testing.assert_allclose(far.reshape(2, -1)[:, 1:], np.asarray(base).reshape(2, -1)[:, 1:], atol=0.05)


def test_normals_flip_and_unit_length():
    config = small_config("normal")
    array = small_array(config)
    flipped = np.asarray(preprocess.flip(config, array))
    np.testing.assert_array_equal(flipped[..., 0], 255 - array[:, :, ::-1, 0])
    np.testing.assert_array_equal(flipped[..., 1:], array[:, :, ::-1, 1:])
    output = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32) * 3.0
    decoded = np.asarray(preprocess.from_output(config, {}, output)).astype(np.float32) / 127.5 - 1.0
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=-1), 1.0, atol=0.02)


@pytest.mark.parametrize("domain", ["rgb", "features", "edges", "mask", "vector"])
def test_input_output_are_inverse(domain):
    config = small_config(domain)
    array = small_array(config)
    stats = preprocess.feature_stats(array) if domain in ("features", "vector") else {}
    back = preprocess.from_output(config, stats, preprocess.to_input(config, stats, array))
    np.testing.assert_allclose(back, array, rtol=1e-4, atol=1e-4)


def test_pictures():
    semseg = small_tokenizer("semseg")
    ids = np.tile(np.arange(4, dtype=np.uint8), (1, 16, 8))
    np.testing.assert_array_equal(semseg.to_picture(ids)[0, 0, 3], [3, 6, 9])
    ramp = np.tile(np.linspace(1.0, 5.0, 32, dtype=np.float32), (1, 16, 1))
    picture = small_tokenizer("depth").to_picture(ramp).astype(int)
    assert picture[0, 0, 0, 0] > picture[0, 0, 0, 2]  # near is red
    assert picture[0, 0, -1, 2] > picture[0, 0, -1, 0]  # far is blue
    assert len(np.unique(preprocess.default_palette(48), axis=0)) == 48
    mask = small_tokenizer("mask").to_picture(np.eye(16, 32, dtype=bool)[None])
    assert set(mask[0, 3, 2:5, 0]) == {0, 255}
    vector = small_tokenizer("vector")
    grey = vector.to_picture(np.tile(vector.stats["mean"], (1, 1)).astype(np.float32))
    assert set(grey[0].ravel()) == {0, 128}  # the mean is middle grey; 12 numbers leave 4 cells of a square empty


def test_vectors_cannot_be_mirrored_and_masks_are_yes_or_no():
    with pytest.raises(ValueError, match="cannot be mirrored"):
        preprocess.flip(small_config("vector"), np.zeros((1, 12)))
    x = preprocess.to_input(small_config("mask"), {}, np.array([[[0, 1, 255]]], np.uint8))
    np.testing.assert_array_equal(x, [[[[-1.0], [1.0], [1.0]]]])
    few = preprocess.feature_stats(np.random.default_rng(0).normal(size=(50, 2)))
    assert few["pca"].shape == (2, 3) and not few["pca"][:, 2].any()


def test_feature_statistics():
    features = small_array(small_config("features"), 50)
    stats = preprocess.feature_stats(features)
    z = ((features - stats["mean"]) / stats["std"]).reshape(-1, 12)
    np.testing.assert_allclose(z.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(np.cov(z @ stats["pca"], rowvar=False, bias=True), np.eye(3), atol=1e-3)


def test_reconstruction_measures():
    rgb = small_array(small_config("rgb"))
    assert reconstruction.psnr(np.full_like(rgb, 100), np.full_like(rgb, 110)) == pytest.approx(28.13, abs=0.01)
    depth = small_array(small_config("depth"))
    assert reconstruction.abs_rel(depth, 0.3 * depth - 7.0) == pytest.approx(0.0, abs=1e-6)
    x, y = (np.tile(np.array(v, np.uint8), (1, 2, 2, 1)) for v in ((255, 128, 128), (128, 255, 128)))
    assert reconstruction.mean_angle(x, y) == pytest.approx(90.0, abs=1.0)
    target, prediction = np.array([[[0, 0, 1, 1]]]), np.array([[[0, 0, 0, 1]]])
    miou, accuracy = reconstruction.segmentation(target, prediction, 5)
    assert (miou, accuracy) == (pytest.approx((2 / 3 + 1 / 2) / 2), 0.75)
    assert reconstruction.cosine(rgb, 2.0 * rgb) == pytest.approx(1.0)
    yes = np.array([[[1, 1, 0]], [[0, 0, 0]]])
    assert reconstruction.measure(small_config("mask"), {}, yes, np.array([[[0, 9, 0]], [[0, 0, 0]]])) == {"iou": 0.75}
    vectors = np.random.default_rng(0).normal(size=(4, 12))
    stats = {"mean": np.zeros(12), "std": np.full(12, 2.0)}
    numbers = reconstruction.measure(small_config("vector"), stats, vectors, vectors + 1.0)
    assert numbers["rmse"] == pytest.approx(0.5) and numbers["cosine"] < 1
    edges = small_array(small_config("edges"))
    assert reconstruction.measure(small_config("edges"), {}, edges // 2, edges // 2 + 10)["psnr_db"] > 28
