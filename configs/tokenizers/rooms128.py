r"""Tokenizers of the built-in rooms data set at 128 pixels, from those at 64; the argument is the domain.

Command:  python -m data_pipelines.rooms.generate --out=data/rooms128 --split=train --count=2048 --resolution=128
          python -m data_pipelines.rooms.generate --out=data/rooms128 --split=val --count=128 --resolution=128
          python -m fm4m.tokenizers.train --config=configs/tokenizers/rooms128.py:depth \
              --out=data/rooms128/depth.safetensors
          (depth, normal, semseg or rgb; the features of rooms are the same at any size, see rooms.py)
Cost:     five to nine minutes of one CPU core a tokenizer.
Expect:   AbsRel 0.036, normals 7.8 degrees, mIoU 0.66, PSNR 23.2 dB.

Codes form a 16 x 16 grid of patches of 8 pixels, as many pixels a code as at 64 pixels: patches of 16 would ask each
code to say four times as much, and 8 pixels keep chair legs and table edges. So weights and codes of the shipped
tokenizers fit (positions are computed for any grid), and training goes on from them at the larger size, as the
reference implementation trains its multi-resolution tokenizers.
"""

from __future__ import annotations

import ml_collections

from configs.tokenizers import rooms

DOMAINS = ("rgb", "depth", "normal", "semseg")


def get_config(domain: str) -> ml_collections.ConfigDict:
    """Training of one tokenizer: rgb, depth, normal or semseg."""
    if domain not in DOMAINS:
        raise ValueError(
            f"no tokenizer for {domain!r}; write --config=configs/tokenizers/rooms128.py:NAME with one of "
            f"{', '.join(DOMAINS)}"
        )
    config = rooms.get_config(domain)
    config.model.image_size = (128, 128)
    config.train.init_from = f"data_pipelines/rooms/tokenizers/{domain}.safetensors"
    config.train.total = "300 steps"
    config.train.autoencoder_steps = 0
    config.codebook.kmeans = False
    # A learning rate of 5e-4, a quarter of what the shipped ones were trained with.
    config.train.global_batch = 8
    config.optimizer.blr = 0.016
    config.optimizer.warmup = "30 steps"
    config.optimizer.ema = 0.99
    pattern = "rooms:data/rooms128/rooms_{}*.zip"
    config.data.train, config.data.validation = pattern.format("train"), pattern.format("val")
    return config
