"""Reconstruction losses of tokenizers (the reference implementation's), as means over a batch, float32.

    mse, l1, smooth_l1      of values; smooth_l1 is quadratic up to a difference of 1
    cross_entropy           logits against class ids
    binary_cross_entropy    one logit a pixel against a target in [-1, 1], which stands for a probability in [0, 1]
    cosine                  1 - cosine of each channel over its positions
    cosine_1d               1 - cosine of each position over its channels

The reference implementation's ``binary_cross_entropy`` is a two-way softmax cross-entropy whose "logits" are already
sigmoids: they lie in [0, 1], so its probabilities never leave [0.27, 0.73], no pixel costs less than 0.31 nats, and
gradients vanish where the network is sure. Here the logit is what the network wrote, and the loss reaches 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fm4m.tokenizers.config import VQConfig

_EPS = 1e-8

# What a domain is trained with where the configuration does not say.
OF_DOMAIN = {"rgb": "mse", "normal": "mse", "semseg": "cross_entropy", "mask": "binary_cross_entropy"}
OTHERWISE = "smooth_l1"


def mse(output: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared difference."""
    return jnp.mean(jnp.square(output - target))


def l1(output: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute difference."""
    return jnp.mean(jnp.abs(output - target))


def smooth_l1(output: jax.Array, target: jax.Array) -> jax.Array:
    """Huber loss: half the square below a difference of 1, the difference less 0.5 above."""
    return jnp.mean(optax.huber_loss(output, target, delta=1.0))


def cross_entropy(output: jax.Array, target: jax.Array) -> jax.Array:
    """Logits [..., classes] against class ids int [...], nats."""
    # A comparison instead of an index: the gradient of an index is a scatter, which runs on one core of a CPU.
    chosen = jnp.where(jnp.arange(output.shape[-1]) == target[..., None], output, 0.0)
    return jnp.mean(jax.nn.logsumexp(output, axis=-1) - chosen.sum(-1))


def binary_cross_entropy(output: jax.Array, target: jax.Array) -> jax.Array:
    """Logits against targets in [-1, 1], of one shape; -1 is "no" and 1 is "yes", nats."""
    probability = 0.5 * (target + 1.0)
    # log(1 + e^z) - p z, which overflows for no z.
    return jnp.mean(jax.nn.softplus(output) - probability * output)


def cosine(output: jax.Array, target: jax.Array) -> jax.Array:
    """1 - cosine between the maps of each channel over all positions: [B, ..., C]."""
    flat = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in (output, target))
    return 1.0 - jnp.mean(cosine_similarity(*flat, axis=1))


def cosine_1d(output: jax.Array, target: jax.Array) -> jax.Array:
    """1 - cosine between the vectors of each position: [B, ..., C]."""
    return 1.0 - jnp.mean(cosine_similarity(output, target, axis=-1))


def cosine_similarity(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Cosine over an axis; vectors shorter than 1e-8 count as that long."""
    # The root of a sum that cannot be 0: the gradient of a norm at 0 is not a number.
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=axis) + _EPS**2)  # noqa: E731
    return jnp.sum(a * b, axis=axis) / (norm(a) * norm(b))


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    f.__name__: f for f in (mse, l1, smooth_l1, cross_entropy, binary_cross_entropy, cosine, cosine_1d)
}


def by_name(name: str, model: VQConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The loss of that name; "" is the one its domain is trained with.

    Raises ValueError for an unknown name, or one that cannot judge what the tokenizer writes.
    """
    name = name or OF_DOMAIN.get(model.domain, OTHERWISE)
    if name not in LOSSES:
        raise ValueError(f"loss.name = {name!r}: must be one of {', '.join(LOSSES)}, or '' for the domain's own")
    if (name == "cross_entropy") != (model.domain == "semseg"):
        own = "only cross_entropy judges class ids" if model.domain == "semseg" else "it is for class ids"
        raise ValueError(f"loss.name = {name!r} does not fit domain {model.domain!r}: {own}")
    if (name == "binary_cross_entropy") != (model.domain == "mask"):
        own = "a mask's output is a logit" if model.domain == "mask" else "it is for masks, whose output is a logit"
        raise ValueError(f"loss.name = {name!r} does not fit domain {model.domain!r}: {own}")
    function = LOSSES[name]
    return lambda output, target: function(
        output.astype(jnp.float32), target if name == "cross_entropy" else target.astype(jnp.float32)
    )
