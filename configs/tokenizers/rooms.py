"""Tokenizers of the built-in rooms data set; the argument is the domain.

Command:  python -m fm4m.tokenizers.train --config=configs/tokenizers/rooms.py:depth --out=tokenizers/depth.safetensors
          (depth, normal, semseg, rgb or features), and once, for captions and boxes,
          python -m fm4m.tokenizers.train_text --pack=data_pipelines/rooms/pack/rooms_train.zip --out=text.json
Cost:     two to six minutes each on two CPU cores.
Expect:   on the 128 held-out samples, as printed by these commands: depth AbsRel 0.049 (scale and shift aligned),
          normals 11.0 degrees, semantic classes mIoU 0.54 and 89.6 % of the pixels, rgb 21.5 dB, features cosine 0.64;
          between 95 and 100 % of the codes in use.
"""

from __future__ import annotations

import ml_collections

CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 1, "features": 320}
# Steps in all, and how many of them train a plain autoencoder before codes are chosen from its latents.
STEPS = {"rgb": (1200, 300), "features": (1000, 250)}


def get_config(domain: str) -> ml_collections.ConfigDict:
    """Training of one tokenizer: rgb, depth, normal, semseg or features."""
    if domain not in CHANNELS:
        raise ValueError(
            f"no tokenizer for {domain!r}; write --config=configs/tokenizers/rooms.py:NAME with one of "
            f"{', '.join(CHANNELS)}"
        )
    config = ml_collections.ConfigDict()
    config.train_pack = "data_pipelines/rooms/pack/rooms_train.zip"
    config.val_pack = "data_pipelines/rooms/pack/rooms_val.zip"
    config.seed = 0
    config.steps, config.autoencoder_steps = STEPS.get(domain, (1500, 400))
    config.batch_size = 16
    config.learning_rate = 2e-3
    config.warmup_steps = 100
    config.weight_decay = 0.05
    config.ema_decay = 0.99
    config.commitment_weight = 1.0
    config.codebook_decay = 0.95
    config.dead_code_coefficient = 8.0
    config.flip = True
    config.store_dtype = "float16"

    model = config.model = ml_collections.ConfigDict()
    model.domain = domain
    model.image_size = (64, 64)
    model.patch_size = 8
    model.channels = CHANNELS[domain]
    model.codebook_size = 1024 if domain in ("rgb", "features") else 128
    model.latent_dim = 32
    model.norm_latents = True
    model.mlp_ratio = 3.0
    model.encoder_dim = 128
    model.encoder_depth = 1 if domain == "features" else 2
    model.encoder_heads = 4
    model.decoder_dim = 128
    model.decoder_depth = 3
    model.decoder_heads = 4
    if domain == "semseg":
        model.class_dim = 16
    if domain == "features":
        model.image_size = (8, 8)
        model.patch_size = 1
    return config
