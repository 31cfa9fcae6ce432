"""A loss on what a trained network sees in two pictures (Zhang et al. 2018, "The unreasonable effectiveness of deep
features as a perceptual metric"), for any network.

An extractor is a function of pictures, float32 [B, H, W, 3] in [-1, 1], to a list of feature maps [B, h, w, C]. It is
traced, so it must be made of JAX operations; whatever it wants of resizing and normalising is its own business. A
configuration names one as ``"module:function"``, where the function takes no argument and returns an extractor.

Every map counts once, however many values it has, and the loss is a mean over the batch. (The reference
implementation's version for timm networks divides by the batch twice.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fm4m.tokenizers import losses

Extractor = Callable[[jax.Array], Sequence[jax.Array]]

DISTANCES = {"cosine": losses.cosine_1d, "l1": losses.l1, "mse": losses.mse}


def load(name: str) -> Extractor:
    """The extractor that ``"module:function"`` makes. Raises ValueError saying what is wrong with the name."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"loss.perceptual = {name!r}: expected 'module:function', which returns an extractor")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss.perceptual = {name!r} cannot be had: {error}") from error
    return make()


def make_loss(
    extractor: Extractor, distance: str = "cosine", layers: Sequence[int] = ()
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(output, target) -> mean distance of their feature maps; pictures are float [B, H, W, 1 or 3] in [-1, 1].

    Args:
      extractor: see above.
      distance: "cosine" (1 - cosine over channels, by position), "l1" or "mse".
      layers: which of the extractor's maps count, by position in its list; () for all.

    Raises:
      ValueError: an unknown distance; when traced, a layer that the extractor does not give.
    """
    if distance not in DISTANCES:
        raise ValueError(f"loss.perceptual_distance = {distance!r}: must be one of {', '.join(DISTANCES)}")
    between = DISTANCES[distance]

    def maps(x: jax.Array) -> list[jax.Array]:
        x = x.astype(jnp.float32)
        found = list(extractor(jnp.broadcast_to(x, (*x.shape[:-1], 3))))
        chosen = tuple(layers) or tuple(range(len(found)))
        if not found or not all(-len(found) <= i < len(found) for i in chosen):
            raise ValueError(f"loss.perceptual_layers = {list(layers)}: the extractor gives {len(found)} feature maps")
        return [found[i].astype(jnp.float32) for i in chosen]

    def loss(output: jax.Array, target: jax.Array) -> jax.Array:
        pairs = zip(maps(output), maps(jax.lax.stop_gradient(target)), strict=True)
        return jnp.mean(jnp.stack([between(a, b) for a, b in pairs]))

    return loss
