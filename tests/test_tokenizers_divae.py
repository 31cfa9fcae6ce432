"""Diffusion decoders against the reference's arrays, and as part of a tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.interop import ml4m_divae, tokenizer_config
from fm4m.interop.reference_config import FormatError
from fm4m.tokenizers import diffusion, divae_model, uvit
from fm4m.tokenizers.config import VQConfig
from fm4m.tokenizers.diffusion_config import DiffusionConfig, UViTConfig
from tests import numpy_uvit
from tests.fixtures import FIXTURES

CASES = sorted(p.name.removesuffix("_io.npz") for p in (FIXTURES or ()) and FIXTURES.glob("parity/divae_*_io.npz"))


class Case:
    """One recorded tokenizer: configuration, parameters and arrays (pictures as [B, H, W, C])."""

    def __init__(self, name: str):
        from safetensors.numpy import load_file

        folder = FIXTURES / "parity"
        self.meta = json.loads((folder / f"{name}_meta.json").read_text())
        self.tensors = load_file(folder / f"{name}_weights.safetensors")
        with np.load(folder / f"{name}_io.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        values, presets = self.meta["config"], self.meta["presets"]
        shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        self.config = tokenizer_config.parse(values, name, shapes, "rgb", presets)
        self.diffusion = self.config.diffusion
        self.params = {"decoder": ml4m_divae.to_params(self.config, self.tensors)}
        self.rows = self["out/quant"].reshape(len(self["out/quant"]), -1, values["latent_dim"])
        size = self.meta.get("orig_res")
        self.size = None if size is None else np.broadcast_to(np.asarray(size, np.float32), (len(self.rows), 2))
        # One program for all calls: a mask without a masked position is none.
        self._denoise = jax.jit(
            lambda x, t, mask: divae_model.denoise(
                self.config, self.params, self.rows, x, t, condition_mask=mask, original_size=self.size
            )
        )

    def __getitem__(self, key: str) -> np.ndarray:
        """An array with its channels last; pictures and latent maps are the arrays of four or more axes."""
        x = self.arrays[key]
        return np.moveaxis(x, -3, -1) if x.ndim >= 4 else x

    def denoise(self, x, t, mask=None) -> np.ndarray:
        t = np.broadcast_to(np.asarray(t, np.int32), len(self.rows))
        mask = np.zeros(self.rows.shape[:2], bool) if mask is None else mask.reshape(self.rows.shape[:2])
        return np.asarray(self._denoise(x, t, mask))


@pytest.fixture(scope="module", params=CASES or [None])
def case(request):
    if request.param is None:
        pytest.skip("the reference's arrays are absent (shared/fixtures beside the checkout, or FM4M_FIXTURES)")
    return Case(request.param)


# ---- against the reference


def test_tensors_come_back_as_they_were(case):
    back = ml4m_divae.from_params(case.config, case.params["decoder"])
    theirs = {k: v for k, v in case.tensors.items() if k.startswith("decoder.")}
    theirs = ml4m_divae.with_twins(case.config, theirs)
    assert set(back) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_allclose(back[key], value, rtol=0, atol=1e-4 if key.endswith("pos_emb") else 0, err_msg=key)


def test_noisy_pictures_and_targets(case):
    args = case["in/image"], case["in/noise"], case["in/timesteps"]
    np.testing.assert_allclose(diffusion.q_sample(case.diffusion, *args), case["in/noised"], atol=5e-6)
    velocity = diffusion.target(dataclasses.replace(case.diffusion, prediction="v_prediction"), *args)
    np.testing.assert_allclose(velocity, case["sched/velocity_target"], atol=5e-6)


def test_one_evaluation(case):
    output = case.denoise(case["in/noised"], case["in/timesteps"])
    np.testing.assert_allclose(output, case["out/model_output"], rtol=0, atol=5e-5)
    target = diffusion.target(case.diffusion, case["in/image"], case["in/noise"], case["in/timesteps"])
    assert float(diffusion.distance("mse", output, target)) == pytest.approx(float(case["train/mse_loss"]), abs=1e-5)


def test_one_evaluation_without_some_rows(case):
    output = case.denoise(case["in/noised"], case["in/timesteps"], case["in/cond_mask"])
    np.testing.assert_allclose(output, case["out/model_output_cond_mask"], rtol=0, atol=5e-5)
    assert np.abs(output - case["out/model_output"]).max() > 1e-3


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(k, marks=pytest.mark.slow) for k in ("thresh", "clip"))])
def test_ddim_steps(case, kind):
    settings = dataclasses.replace(
        case.diffusion, sampler="ddim", spacing="trailing", thresholding=kind == "thresh", clip=kind == "clip"
    )
    for spacing in ("trailing", "linspace", "leading"):
        ours = diffusion.timesteps(settings.steps, 5, spacing)
        np.testing.assert_array_equal(ours, case[f"ddim/{spacing}/timesteps"])
    if settings.prediction == "epsilon":
        settings = dataclasses.replace(settings, spacing="leading")
    x, table = case["in/start_noise"], diffusion.sampling_table(settings, 5)
    for i, (t, abar, before) in enumerate(zip(table["t"], table["abar"], table["abar_prev"], strict=True)):
        abar, before = np.float32(abar), np.float32(before)
        output = case.denoise(x, t)
        x0 = diffusion.limit(settings, diffusion.interpret(settings.prediction, output, x, abar)[0])
        x = np.asarray(diffusion.ddim_step(settings, output, x, abar, before))
        if kind == "plain":
            if i == 0:
                for ours, theirs in zip((output, x0, x), case["ddim/plain/step0"], strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
            np.testing.assert_allclose(x[:1], case["ddim/plain/x_prev_sample0"][i], rtol=0, atol=5e-4)
        elif i == 0:
            np.testing.assert_allclose(x0[:1], case[f"ddim/{kind}/step0_pred_x0_sample0"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(x[:1], case[f"ddim/{kind}/final_sample0"], rtol=0, atol=5e-4)


def test_ddpm_steps(case):
    settings = dataclasses.replace(case.diffusion, sampler="ddpm", spacing="leading", clip=False, thresholding=False)
    x, table = case["in/start_noise"], diffusion.sampling_table(settings, 5)
    np.testing.assert_array_equal(table["t"], case["ddpm/timesteps"])
    for i, (t, abar, before) in enumerate(zip(table["t"], table["abar"], table["abar_prev"], strict=True)):
        noise = np.broadcast_to(case["ddpm/variance_noise_sample0"][i], x.shape)
        output = case.denoise(x, t)
        x = np.asarray(diffusion.ddpm_step(settings, output, x, np.float32(abar), np.float32(before), noise))
        np.testing.assert_allclose(x[:1], case["ddpm/x_prev_sample0"][i], rtol=0, atol=5e-4)


@pytest.mark.slow
def test_whole_sampling_program(case):
    settings = dataclasses.replace(case.diffusion, sampler="ddim", spacing="trailing")
    if settings.prediction == "epsilon":
        pytest.skip("a network that predicts noise cannot start from pure noise")
    config = dataclasses.replace(case.config, diffusion=settings)
    decode = jax.jit(functools.partial(divae_model.decode, config, steps=4, original_size=case.size))
    pictures = decode(case.params, case.rows, jax.random.key(0), x_start=case["pipeline/start_noise"])
    np.testing.assert_allclose(pictures, case["pipeline/out"], rtol=0, atol=5e-4)


@pytest.mark.slow
def test_gradients(case):
    recorded = dict(zip(case["train/grad_names"].tolist(), case["train/grad_norms"], strict=True))
    args = case.rows, case["in/image"], case["in/timesteps"], case["in/noise"]
    loss = lambda p: divae_model.loss_at(case.config, p, *args, original_size=case.size)  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(case.params)["decoder"]
    ours = ml4m_divae.from_params(case.config, jax.tree.map(np.asarray, gradients))
    compared = {key for key in ours if key in recorded and np.isfinite(recorded[key])}
    assert len(compared) > 50
    for key in compared:
        assert np.linalg.norm(ours[key]) == pytest.approx(recorded[key], rel=2e-4, abs=1e-7), key


# ---- as part of a tokenizer


def tiny(**changes) -> VQConfig:
    values = dict(
        domain="rgb", image_size=(16, 24), patch_size=8, channels=3, latent_dim=4, decoder="uvit",
        diffusion=DiffusionConfig(
            uvit=UViTConfig(patch_size=4, block_channels=(32,), layers=1, dim=16, depth=3, heads=2, position_grid=4,
                            mlp_ratio=1.0, long_skip=True, resolution_embedding=True,
                            conditioning="xattn", dropout=0.1),
            sampling_steps=3,
        ),
    )  # fmt: skip
    return VQConfig(**values | changes)


@pytest.fixture(scope="module")
def small():
    config = tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvit.layers, "draw", numpy_uvit.draw)
        return config, {"decoder": divae_model.init_decoder(config, jax.random.key(0))}


def _shaded(config, params, x, t, latents, mask, original_size=None, key=None, dtype=None):
    """A network that compiles at once: every cell of the picture takes the first number of its latent."""
    side = x.shape[1] // latents.shape[1]
    return 0.1 * x + jnp.repeat(jnp.repeat(latents[..., :1], side, axis=1), side, axis=2)


@pytest.mark.parametrize("network", [_shaded, pytest.param(uvit.apply, marks=pytest.mark.slow)])
def test_decoding_follows_the_key_and_the_grid(small, network, monkeypatch):
    config, params = small
    monkeypatch.setattr(uvit, "apply", network)
    decode = jax.jit(functools.partial(divae_model.decode, config), static_argnames=("grid", "steps"))
    rows = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    one, same, other = (decode(params, rows, jax.random.key(n)) for n in (0, 0, 1))
    assert one.shape == (2, 16, 24, 3)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    assert divae_model.output_size(config, (1, 4)) == (8, 32)
    if network is _shaded:
        cells = one.reshape(2, 2, 8, 3, 8, 3).mean(axis=(2, 4, 5)).reshape(2, 6)
        assert np.corrcoef(cells.ravel(), rows[..., 0].ravel())[0, 1] > 0.98


@pytest.mark.slow
def test_training_lowers_the_loss_and_reaches_the_rows(small):
    config, params = small
    x = np.tile(np.linspace(-1, 1, 24, dtype=np.float32)[None, None, :, None], (4, 16, 1, 3))
    # Not zeros: closed gates would never open, because cross-attention to them puts out zeros.
    state = {"params": params, "rows": np.random.default_rng(0).standard_normal((4, 6, 4), np.float32)}
    mask, size = np.arange(24).reshape(4, 6) % 5 == 0, np.full((4, 2), 100.0, np.float32)

    @jax.jit
    def step(state, key):
        loss = lambda s: divae_model.loss(  # noqa: E731
            config, s["params"], s["rows"], x, key, condition_mask=mask, original_size=size
        )
        value, gradients = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients), value, gradients

    losses = []
    for number in range(40):
        state, value, gradients = step(state, jax.random.key(number))
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert [jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(leaf)] == []
    np.testing.assert_array_equal(np.any(gradients["rows"], axis=-1), ~mask)


def test_wrong_sizes_are_refused_with_a_sentence(small):
    config, params = small
    x, t = np.zeros((1, 16, 24, 3), np.float32), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"\(1, 5, 4\)"):
        divae_model.denoise(config, params, np.zeros((1, 5, 4)), x, t)
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        divae_model.denoise(config, params, np.zeros((1, 6, 4)), x[:, :12], t)
    with pytest.raises(ValueError, match="x_start"):
        divae_model.decode(config, params, np.zeros((1, 6, 4)), jax.random.key(0), x_start=x[:, :8])
    with pytest.raises(ValueError, match="deterministic"):
        divae_model.init_decoder(tiny(decoder="vit", diffusion=None), jax.random.key(0))


# ---- the reference's files


def test_a_uvit_survives_the_references_format(small):
    config, params = small
    tensors = ml4m_divae.from_params(config, params["decoder"])
    assert {key: value.shape for key, value in tensors.items()} == ml4m_divae.keys(config)
    assert tensors["decoder.conv_out.weight"].shape == (32, 3, 4, 4)
    assert tensors["decoder.mid_block.mid_block.2.skip_linear.weight"].shape == (16, 32)
    assert tensors["decoder.mid_block.mid_block.0.cross_attn.kv.weight"].shape == (32, 4)
    assert tensors["decoder.mid_block.mid_pos_emb"].shape == (1, 16, 4, 4)
    assert tensors["decoder.up_blocks.0.resnets.1.conv_shortcut.weight"].shape == (32, 64, 1, 1)
    back = ml4m_divae.to_params(config, tensors | {"quantize.codes": np.zeros(3)})
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, params["decoder"]))


def test_the_downsampling_before_the_transformer_has_two_names(small):
    config, params = small
    tensors = ml4m_divae.from_params(config, params["decoder"])
    twins = ml4m_divae.twins(config)
    assert twins["decoder.downsample_mid.conv.bias"] == "decoder.downsample_mid.Conv2d_0.bias" and len(twins) == 2
    for left_out in (twins.keys(), twins.values()):
        back = ml4m_divae.to_params(config, {k: v for k, v in tensors.items() if k not in left_out})
        jax.tree.map(np.testing.assert_array_equal, back, params["decoder"])
    with pytest.raises(FormatError, match=r"downsample_mid\.conv\.bias and .* differ"):
        ml4m_divae.to_params(config, tensors | {"decoder.downsample_mid.conv.bias": np.ones(32)})
    with pytest.raises(FormatError, match="lacks decoder.downsample_mid"):
        ml4m_divae.to_params(config, {k: v for k, v in tensors.items() if "downsample_mid" not in k})


def test_a_file_that_does_not_fit_is_refused_by_key(small):
    config, params = small
    tensors = ml4m_divae.from_params(config, params["decoder"])
    key = "decoder.mid_block.mid_proj_in.weight"
    with pytest.raises(FormatError, match=f"lacks {key}"):
        ml4m_divae.to_params(config, {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(FormatError, match=r"decoder\.mid_block\.other"):
        ml4m_divae.to_params(config, tensors | {"decoder.mid_block.other": np.zeros(1)})
    with pytest.raises(FormatError, match=rf"{key} has shape \(16, 5\)"):
        ml4m_divae.to_params(config, tensors | {key: np.zeros((16, 5))})
    with pytest.raises(FormatError, match="pos_emb"):
        ml4m_divae.to_params(config, tensors | {"decoder.mid_block.mid_pos_emb": np.zeros((1, 16, 4, 4))})
    broken = {k: v for k, v in params["decoder"].items() if k != "norm"}
    with pytest.raises(ValueError, match=r"norm\.bias"):
        ml4m_divae.from_params(config, broken)
