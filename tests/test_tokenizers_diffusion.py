"""Noise schedules, targets and samplers of the diffusion decoders, without a network."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.tokenizers import diffusion
from fm4m.tokenizers.diffusion_config import PRESETS, DiffusionConfig, UNetConfig, UViTConfig, preset
from tests.fixtures import FIXTURES, needs_fixtures

config = functools.partial(DiffusionConfig, unet=UNetConfig(channels=32))


# ---- configuration


@pytest.mark.parametrize("name", ["unet_patched", "uvit_l_p4_f16_longskip", "uvit_b_p4_f16_extraconv"])
def test_configuration_comes_back_from_plain_values(name):
    one = preset(name, schedule="shifted_cosine:0.5", prediction="v_prediction", sampling_steps=50)
    assert DiffusionConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.kind == name.split("_")[0] and one.network == PRESETS[name]


def test_strides_of_the_presets():
    assert PRESETS["unet_patched"].stride == 32
    assert PRESETS["uvit_b_p4_f8"].stride == 8 and PRESETS["uvit_b_p4_f16"].stride == 16
    assert PRESETS["uvit_l_p4_f16_extraconv"].stride == 16 and not PRESETS["uvit_l_p4_f16_extraconv"].extra_downsample
    assert [PRESETS[f"uvit_{size}_p4_f16_longskip"].depth for size in "bl"] == [13, 25]


@pytest.mark.parametrize(
    "values, field",
    [
        ({"schedule": "cosine"}, "schedule"),
        ({"schedule": "shifted_cosine"}, "schedule"),
        ({"schedule": "shifted_cosine:-1"}, "schedule"),
        ({"schedule": "linear:0.5"}, "schedule"),
        ({"prediction": "x0"}, "prediction"),
        ({"sampler": "euler"}, "sampler"),
        ({"sampling_steps": 1001}, "sampling_steps"),
        ({"clip": True, "thresholding": True}, "clip"),
        ({"threshold_max": 0.5}, "threshold_max"),
        ({"uvit": UViTConfig()}, "unet and uvit"),
        ({"unet": None}, "unet and uvit"),
        ({"unet": {"width": 32}}, "width"),
        ({"unet": {"channels": 48}}, "channels"),
        ({"unet": {"attention_downsamples": [16]}}, "attention_downsamples"),
        ({"unet": None, "uvit": {"conditioning": "film"}}, "conditioning"),
        ({"unet": None, "uvit": {"dim": 100, "heads": 3}}, "dim"),
        ({"steps_": 3}, "steps_"),
    ],
)
def test_a_wrong_field_is_named(values, field):
    with pytest.raises(ValueError, match=field):
        DiffusionConfig.from_dict({"unet": {}} | values)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="unet_patched"):
        preset("unet")


# ---- schedules


@needs_fixtures
def test_schedules_are_the_references():
    with np.load(FIXTURES / "parity" / "diffusion_schedules.npz") as file:
        for key in file.files:
            _, schedule, zero = key.split("/")
            ours = diffusion.alphas_cumprod(config(schedule=schedule, zero_terminal_snr=zero == "zero_snr1"))
            np.testing.assert_allclose(ours, file[key], rtol=0, atol=1e-6, err_msg=key)


def test_linear_schedule_with_zero_terminal_snr():
    abar = diffusion.alphas_cumprod(config())
    levels = [0, 1, 10, 100, 250, 500, 750, 900, 998]
    known = [0.9999, 0.99978, 0.99779, 0.89449, 0.51886, 0.075246, 0.0026441, 1.0304e-4, 4.2e-9]
    np.testing.assert_allclose(abar[levels], known, rtol=1e-2, atol=1e-5)
    assert abar[-1] == 0 and np.all(np.diff(abar) < 0)


def test_shifted_cosine_halves_the_signal_to_noise_of_the_plain_one():
    plain, shifted = (diffusion.alphas_cumprod(config(schedule=f"shifted_cosine:{s}"))[100:900] for s in (1, 2))
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 4, rtol=1e-9)


def test_timesteps():
    assert diffusion.timesteps(1000, 5, "trailing").tolist() == [999, 799, 599, 399, 199]
    assert diffusion.timesteps(1000, 5, "leading").tolist() == [800, 600, 400, 200, 0]
    assert diffusion.timesteps(1000, 5, "linspace").tolist() == [999, 749, 499, 250, 0]
    fifty = diffusion.timesteps(1000, 50)
    assert (len(fifty), fifty[1], fifty[-1]) == (50, 979, 19)
    # 1000 / 30 is no whole number: the levels left over are visited too.
    assert len(diffusion.timesteps(1000, 30)) == 31
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="sampling steps"):
            diffusion.timesteps(1000, steps)
    with pytest.raises(ValueError, match="spacing"):
        diffusion.timesteps(1000, 5, "even")


def test_the_last_step_reaches_the_clean_picture():
    for spacing in ("trailing", "leading", "linspace"):
        table = diffusion.sampling_table(config(spacing=spacing), 8)
        assert table["abar_prev"][-1] == 1 and np.all(table["abar_prev"] > table["abar"])


# ---- targets


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_every_target_implies_picture_and_noise(prediction):
    c = config(prediction=prediction)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 4, 3)), rng.standard_normal((2, 4, 4, 3))
    t = np.array([40, 600])
    x = diffusion.q_sample(c, x0, noise, t)
    output = diffusion.target(c, x0, noise, t)
    abar = diffusion.alphas_cumprod(c)[t].reshape(2, 1, 1, 1)
    got_x0, got_noise = diffusion.interpret(prediction, output, x, jnp.asarray(abar, jnp.float32))
    np.testing.assert_allclose(got_x0, x0, atol=2e-5)
    np.testing.assert_allclose(got_noise, noise, atol=2e-5)


def test_the_last_level_is_pure_noise():
    x0, noise = np.ones((1, 2, 2, 1)), np.full((1, 2, 2, 1), 0.3)
    np.testing.assert_allclose(diffusion.q_sample(config(), x0, noise, np.array([999])), noise, rtol=1e-6)


def test_distances():
    a, b = jnp.array([0.0, 0.5, 3.0]), jnp.zeros(3)
    assert diffusion.distance("mse", a, b) == pytest.approx(9.25 / 3)
    assert diffusion.distance("l1", a, b) == pytest.approx(3.5 / 3)
    assert diffusion.distance("smooth_l1", a, b) == pytest.approx((0.125 + 2.5) / 3)


# ---- samplers


@pytest.mark.parametrize("sampler, prediction", [("ddim", "v_prediction"), ("ddpm", "sample")])
def test_samplers_find_the_distribution_that_the_best_denoiser_knows(sampler, prediction):
    """Pixels of the data are normal, N(0.4, 0.5^2), so E[x0 | x_t] is known and samples must have these moments."""
    # DDPM's smaller variance is exact for a single picture only: 100 steps give a spread of 0.46, 500 of 0.49.
    c = config(sampler=sampler, prediction=prediction, sampling_steps=100 if sampler == "ddim" else 500)
    mean, std = 0.4, 0.5
    table = jnp.asarray(diffusion.alphas_cumprod(c), jnp.float32)

    def denoise(x, t):
        abar = table[t].reshape(-1, 1, 1, 1)
        gain = jnp.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar)
        x0 = mean + gain * (x - jnp.sqrt(abar) * mean)
        noise = (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)
        return x0 if prediction == "sample" else jnp.sqrt(abar) * noise - jnp.sqrt(1 - abar) * x0

    x = jax.jit(lambda key: diffusion.sample(c, denoise, (4, 32, 32, 1), key))(jax.random.key(0))
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(std, abs=0.03)


@pytest.mark.slow
def test_noise_prediction_samples_too_where_the_schedule_keeps_some_picture():
    c = config(prediction="epsilon", zero_terminal_snr=False, sampling_steps=20)
    picture = 0.7
    table = jnp.asarray(diffusion.alphas_cumprod(c), jnp.float32)

    def denoise(x, t):
        abar = table[t].reshape(-1, 1, 1, 1)
        return (x - jnp.sqrt(abar) * picture) / jnp.sqrt(1 - abar)

    x = diffusion.sample(c, denoise, (1, 4, 4, 1), jax.random.key(1))
    np.testing.assert_allclose(x, picture, atol=1e-3)


def test_noise_prediction_at_pure_noise_is_refused():
    with pytest.raises(ValueError, match="pure noise"):
        diffusion.sampling_table(config(prediction="epsilon"))
    diffusion.sampling_table(config(prediction="epsilon", spacing="leading"))


def test_a_key_decides_the_samples_and_the_first_noise_can_be_given():
    c = config(sampler="ddpm", sampling_steps=5, spacing="leading")
    sample = jax.jit(lambda key, x: diffusion.sample(c, lambda x, t: 0.3 * x, (2, 4, 4, 1), key, None, x))
    start = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    one, same, other = (sample(jax.random.key(n), start) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    ddim = dataclasses.replace(c, sampler="ddim")
    first, second = (diffusion.sample(ddim, lambda x, t: 0.3 * x, (2, 4, 4, 1), jax.random.key(n), 2, start)
                     for n in (0, 1))  # fmt: skip
    np.testing.assert_array_equal(first, second)


def test_limits_of_the_predicted_picture():
    x0 = jnp.asarray(np.linspace(-3, 3, 2 * 16).reshape(2, 4, 4, 1), jnp.float32)
    np.testing.assert_array_equal(diffusion.limit(config(), x0), x0)
    clipped = jnp.clip(x0, -1, 1)
    np.testing.assert_array_equal(diffusion.limit(config(clip=True), x0), clipped)
    # With its upper end at 1 the threshold can only be 1.
    np.testing.assert_array_equal(diffusion.limit(config(thresholding=True), x0), clipped)
    wide = diffusion.limit(config(thresholding=True, threshold_quantile=1.0, threshold_max=10.0), x0)
    np.testing.assert_allclose(wide, x0 / 3, rtol=1e-6)
