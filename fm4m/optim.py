"""AdamW and its schedule, as 4M was trained (section 3 of the first paper's appendix; the reference implementation).

The state is a plain dict {"mu", "nu"} of trees shaped like the parameters, whatever else is switched on, so that a
checkpoint does not depend on whether gradients were clipped. The step counter is the train state's own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fm4m import config as config_lib

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Parameters that are not decayed, by the last part of their path: scales and biases of norms, biases of linear layers.
# All others are, as in the reference implementation: matrices, token tables, modality embeddings, mask token, learned
# positions.
NOT_DECAYED = re.compile(r"(scale|bias)$")


def path_name(path: tuple) -> str:
    """A tree path as text: ``"encoder/blocks/qkv"``."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay applies to, in a tree like ``params``."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not NOT_DECAYED.search(path_name(path)), params)


def schedule(peak: float, total: int, warmup: int, kind: str = "cosine", cooldown: int = 0) -> Schedule:
    """Learning rate of step i = 0 .. total - 1, as a function that is traced with an integer step.

    Warm-up is ``linspace(0, peak, warmup)``: step 0 has rate 0 and step warmup - 1 the peak. Then, with j = i - warmup:

    * ``cosine``: peak / 2 * (1 + cos(pi * j / (total - warmup))), which never quite reaches 0 (the reference).
    * ``constant``: peak.
    * ``rsqrt``: peak * sqrt(w / (w + j)), w = max(warmup, 1).

    The last ``cooldown`` steps are multiplied by a line that would reach 0 at step ``total``.

    Raises ConfigError if warm-up and cooldown together are longer than the run, or for an unknown kind.
    """
    if kind not in config_lib.SCHEDULES:
        raise config_lib.ConfigError(f"optimizer.schedule = {kind!r}: must be one of {', '.join(config_lib.SCHEDULES)}")
    if warmup + cooldown > total:
        raise config_lib.ConfigError(
            f"optimizer.warmup ({warmup} steps) and optimizer.cooldown ({cooldown} steps) are longer than the "
            f"whole run (train.total = {total} steps)"
        )

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.maximum(step - warmup, 0.0)
        if kind == "cosine":
            shape = 0.5 * (1.0 + jnp.cos(jnp.pi * after / max(total - warmup, 1)))
        elif kind == "constant":
            shape = jnp.ones_like(step)
        else:
            shape = jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + after))
        rising = step / max(warmup - 1, 1)
        falling = jnp.clip((total - step) / max(cooldown, 1), 0.0, 1.0) if cooldown else 1.0
        return peak * jnp.where(step < warmup, rising, shape) * falling

    return rate


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with optional clipping.

    Attributes:
      init: params -> {"mu", "nu"}, float32 zeros.
      update: (grads, opt_state, params, step) -> (new params, new opt_state, {"grad_norm", "lr"}); ``step`` is the
        int32 number of updates made so far, and ``grad_norm`` the norm before clipping.
      schedule: the learning rate as a function of the step.
    """

    init: Callable[[Any], dict[str, Any]]
    update: Callable[[Any, dict[str, Any], Any, jax.Array], tuple[Any, dict[str, Any], dict[str, jax.Array]]]
    schedule: Schedule


def adamw(
    rate: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    clip_norm: float = 0.0,
) -> Optimizer:
    """AdamW: clip by global norm (0: no), Adam with bias correction, decoupled decay by `decay_mask`, learning rate.

    ``p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)``.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = optax.add_decayed_weights(weight_decay)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()

    def init(params: Any) -> dict[str, Any]:
        state = adam.init(params)
        return {"mu": state.mu, "nu": state.nu}

    def update(grads: Any, opt_state: dict[str, Any], params: Any, step: jax.Array):
        with jax.named_scope("optimizer"):
            lr = rate(step)
            metrics = {"grad_norm": optax.global_norm(grads), "lr": lr}
            grads, _ = clip.update(grads, optax.EmptyState())
            updates, state = adam.update(
                grads, optax.ScaleByAdamState(count=step, mu=opt_state["mu"], nu=opt_state["nu"])
            )
            decayed, _ = decay.update(updates, optax.EmptyState(), params)
            updates = jax.tree.map(lambda d, u, m: -lr * (d if m else u), decayed, updates, decay_mask(params))
            return optax.apply_updates(params, updates), {"mu": state.mu, "nu": state.nu}, metrics

    return Optimizer(init, update, rate)


def from_config(config: Any, total: int, warmup: int, cooldown: int) -> Optimizer:
    """The optimizer of a configuration; lengths in steps. The peak rate is blr * global_batch / 256."""
    o = config.optimizer
    peak = o.blr * config.train.global_batch / 256
    rate = schedule(peak, total, warmup, o.schedule, cooldown)
    return adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
