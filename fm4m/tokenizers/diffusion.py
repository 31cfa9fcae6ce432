"""Gaussian diffusion: noise schedules, training targets, and the DDIM and DDPM samplers.

Notation of Ho et al. 2020: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, with abar the cumulative product of 1 - beta.
Schedules are float64 numpy tables made from the configuration alone; samplers are `lax.scan` programs over the rows of
such a table and never look at the network, which they get as a function.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.tokenizers.diffusion_config import SPACINGS, DiffusionConfig

BETA_FIRST, BETA_LAST = 1e-4, 0.02
# Largest beta of the cosine schedule (Nichol & Dhariwal 2021, section 3.2).
BETA_CAP = 0.999
# Bound on log SNR of the shifted cosine.
LOG_SNR_MAX = 15.0
# Smallest variance of a DDPM step, so that its logarithm would exist.
VARIANCE_MIN = 1e-20

# (noisy picture f32 [B, ...], timestep int32 [B]) -> network output f32 [B, ...]
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


# ---- schedules


def _betas(kind: str, steps: int) -> np.ndarray:
    if kind == "linear":
        return np.linspace(BETA_FIRST, BETA_LAST, steps)
    if kind == "scaled_linear":
        return np.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, steps) ** 2
    if kind == "sigmoid":
        return (BETA_LAST - BETA_FIRST) / (1 + np.exp(-np.linspace(-6, 6, steps))) + BETA_FIRST
    # squaredcos_cap_v2
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], BETA_CAP)


def alphas_cumprod(config: DiffusionConfig) -> np.ndarray:
    """abar, float64 [steps], falling.

    With `zero_terminal_snr`, sqrt(abar) is shifted and scaled so that its first value stays and its last is 0 (Lin et
    al. 2023, algorithm 1). The shifted cosine has log SNR -2 (ln tan(pi t / 2) + ln shift) for t in 0..1 (Hoogeboom et
    al. 2023), bounded by +-15, and ends at 0 in any case.
    """
    kind, _, shift = config.schedule.partition(":")
    if kind == "shifted_cosine":
        t = np.linspace(0.0, 1.0, config.steps)
        with np.errstate(divide="ignore"):
            log_snr = -2 * (np.log(np.tan(np.pi * t / 2)) + np.log(float(shift)))
        abar = 1 / (1 + np.exp(-np.clip(log_snr, -LOG_SNR_MAX, LOG_SNR_MAX)))
        abar[-1] = 0.0
        return abar
    abar = np.cumprod(1 - _betas(kind, config.steps))
    if config.zero_terminal_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


def timesteps(steps: int, sampling_steps: int, spacing: str = "trailing") -> np.ndarray:
    """Noise levels that a sampler visits, int32, falling (Lin et al. 2023, table 2).

    "trailing" starts at the last level and goes down by floor(steps / sampling_steps), so a number that does not divide
    ``steps`` gets the evaluations left over too (30 of 1000 gives 31), as in the reference implementation. "leading"
    ends at level 0 and never sees the last; "linspace" has both ends.

    Raises ValueError for an unknown spacing or a number of evaluations that is not 1..steps.
    """
    if not 1 <= sampling_steps <= steps:
        raise ValueError(f"{sampling_steps} sampling steps were asked for; the schedule allows 1 to {steps}")
    stride = steps // sampling_steps
    if spacing == "trailing":
        return np.arange(steps - 1, -1, -stride, dtype=np.int32)
    if spacing == "leading":
        return (np.arange(sampling_steps, dtype=np.int32) * stride)[::-1].copy()
    if spacing == "linspace":
        # Rounded from the noisy end, which decides ties as the reference implementation does.
        return (steps - 1 - np.round(np.linspace(0, steps - 1, sampling_steps))).astype(np.int32)
    raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")


def sampling_table(config: DiffusionConfig, sampling_steps: int | None = None) -> dict[str, np.ndarray]:
    """What the samplers know about every evaluation: {"t": int32 [n], "abar", "abar_prev": float64 [n]}.

    A step goes down by floor(steps / sampling_steps) levels; below level 0 the picture is clean (abar 1).

    Raises ValueError if a visited level is pure noise and the network predicts noise: it then says nothing about the
    picture.
    """
    sampling_steps = config.sampling_steps if sampling_steps is None else sampling_steps
    abar = alphas_cumprod(config)
    t = timesteps(config.steps, sampling_steps, config.spacing)
    if config.prediction == "epsilon" and np.any(abar[t] == 0):
        raise ValueError(
            f"level {t[0]} is pure noise under schedule {config.schedule!r}, where a network that predicts noise says "
            "nothing about the picture; use spacing 'leading', or prediction 'sample' or 'v_prediction'"
        )
    before = t - config.steps // sampling_steps
    return {"t": t, "abar": abar[t], "abar_prev": np.where(before >= 0, abar[np.maximum(before, 0)], 1.0)}


# ---- training


def _roots(config: DiffusionConfig, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """sqrt(abar) and sqrt(1 - abar) at levels t [B], f32 [B, 1, ...]."""
    abar = alphas_cumprod(config)
    shape = (-1,) + (1,) * (ndim - 1)
    pick = lambda table: jnp.asarray(table, jnp.float32)[t].reshape(shape)  # noqa: E731
    return pick(np.sqrt(abar)), pick(np.sqrt(1 - abar))


def q_sample(config: DiffusionConfig, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """The picture x0 [B, ...] at noise levels t int [B]: sqrt(abar) x0 + sqrt(1 - abar) noise."""
    signal, sigma = _roots(config, t, x0.ndim)
    return signal * x0 + sigma * noise


def target(config: DiffusionConfig, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """What the network has to put out for x0 [B, ...] and its noise at levels t [B], by `config.prediction`."""
    if config.prediction == "sample":
        return x0
    if config.prediction == "epsilon":
        return noise
    signal, sigma = _roots(config, t, x0.ndim)
    return signal * noise - sigma * x0


def distance(kind: str, output: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean over all elements of the squared, absolute or smooth absolute difference (kink at 1); f32 scalar."""
    difference = jnp.asarray(output, jnp.float32) - jnp.asarray(wanted, jnp.float32)
    if kind == "mse":
        return jnp.mean(jnp.square(difference))
    magnitude = jnp.abs(difference)
    if kind == "l1":
        return jnp.mean(magnitude)
    return jnp.mean(jnp.where(magnitude < 1, 0.5 * jnp.square(difference), magnitude - 0.5))


# ---- sampling


def interpret(prediction: str, output: jax.Array, x: jax.Array, abar: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The clean picture and the noise that a network's output at x implies, abar f32 scalar (or broadcastable).

    At abar 0 a prediction of the noise gives no picture (division by zero), at abar 1 a prediction of the picture no
    noise.
    """
    signal, sigma = jnp.sqrt(abar), jnp.sqrt(1 - abar)
    if prediction == "sample":
        return output, (x - signal * output) / sigma
    if prediction == "epsilon":
        return (x - sigma * output) / signal, output
    return signal * x - sigma * output, signal * output + sigma * x


def limit(config: DiffusionConfig, x0: jax.Array) -> jax.Array:
    """The predicted picture [B, ...] clipped or thresholded as the configuration says."""
    if config.thresholding:
        flat = jnp.abs(x0).reshape(x0.shape[0], -1)
        bound = jnp.clip(jnp.quantile(flat, config.threshold_quantile, axis=1), 1.0, config.threshold_max)
        bound = bound.reshape((-1,) + (1,) * (x0.ndim - 1))
        return jnp.clip(x0, -bound, bound) / bound
    return jnp.clip(x0, -1.0, 1.0) if config.clip else x0


def ddim_step(
    config: DiffusionConfig, output: jax.Array, x: jax.Array, abar: jax.Array, abar_prev: jax.Array
) -> jax.Array:
    """One deterministic step (Song et al. 2021, eq. 12 with sigma 0). The noise is that of the unlimited picture."""
    x0, noise = interpret(config.prediction, output, x, abar)
    return jnp.sqrt(abar_prev) * limit(config, x0) + jnp.sqrt(1 - abar_prev) * noise


def ddpm_step(
    config: DiffusionConfig, output: jax.Array, x: jax.Array, abar: jax.Array, abar_prev: jax.Array, noise: jax.Array
) -> jax.Array:
    """One step of ancestral sampling (Ho et al. 2020, eq. 7, with the smaller of its two variances).

    ``noise`` is unit normal; it has no effect in a step to the clean picture (abar_prev 1).
    """
    x0 = limit(config, interpret(config.prediction, output, x, abar)[0])
    alpha = abar / abar_prev
    mean = jnp.sqrt(abar_prev) * (1 - alpha) / (1 - abar) * x0 + jnp.sqrt(alpha) * (1 - abar_prev) / (1 - abar) * x
    variance = jnp.maximum((1 - abar_prev) / (1 - abar) * (1 - alpha), VARIANCE_MIN)
    return mean + jnp.where(abar_prev < 1, jnp.sqrt(variance), 0.0) * noise


def sample(
    config: DiffusionConfig,
    denoise: Denoiser,
    shape: tuple[int, ...],
    key: jax.Array,
    sampling_steps: int | None = None,
    x_start: jax.Array | None = None,
) -> jax.Array:
    """Turns noise into pictures.

    Args:
      config: schedule, sampler and spacing.
      denoise: the network as a function of the noisy picture and its levels.
      shape: [B, ...] of the result.
      key: of the first noise, and of the noise of every DDPM step.
      sampling_steps: static; the configuration's if None.
      x_start: f32 ``shape``, the first noise if it should not be drawn.

    Returns:
      f32 ``shape``. The same key gives the same pictures.
    """
    table = sampling_table(config, sampling_steps)
    rows = {"t": table["t"], **{k: np.asarray(table[k], np.float32) for k in ("abar", "abar_prev")}}
    start_key, steps_key = jax.random.split(key)
    x = jax.random.normal(start_key, shape) if x_start is None else jnp.asarray(x_start, jnp.float32)
    keys = jax.random.split(steps_key, len(rows["t"]))

    def step(x, row):
        row, key = row
        output = denoise(x, jnp.full((shape[0],), row["t"], jnp.int32))
        if config.sampler == "ddim":
            return ddim_step(config, output, x, row["abar"], row["abar_prev"]), None
        noise = jax.random.normal(key, shape)
        return ddpm_step(config, output, x, row["abar"], row["abar_prev"], noise), None

    return jax.lax.scan(step, x, (rows, keys))[0]
