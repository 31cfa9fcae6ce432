"""Tokenizers of the built-in rooms data set at 64 pixels; the argument is the domain.

Prepare:  4,000 rooms beside the 1,024 shipped ones (the furniture catalogues are in Debian's package
          sweethome3d-furniture):
          python -m data_pipelines.rooms.generate --out=data/packs --count=4000 --seed=1 --processes=2
          or train on the shipped ones: --config.data.train=rooms:data_pipelines/rooms/pack/rooms_train.zip
Command:  python -m fm4m.tokenizers.train --config=configs/tokenizers/rooms.py:depth --out=tokenizers/depth.safetensors
          (depth, normal, semseg, rgb or features), and once, for captions and boxes,
          python -m fm4m.tokenizers.train_text --pack=data_pipelines/rooms/pack/rooms_train.zip --out=text.json
Cost:     ten to twenty minutes each on one busy core.
Expect:   on the 128 held-out samples, as printed by these commands: depth AbsRel 0.044 (scale and shift aligned),
          normals 10.2 degrees, semantic classes mIoU 0.56 and 90.5 % of the pixels, rgb 22.0 dB, features cosine 0.64;
          between 95 and 100 % of the codes in use.
"""

from __future__ import annotations

import ml_collections

from fm4m.tokenizers import train_config

PACK = "data_pipelines/rooms/pack"
CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 1, "features": 320}
# What differs from domain to domain: of the model, then steps in all and those that train a plain autoencoder before
# codes are chosen from its latents.
MODEL = {
    "rgb": {"out_conv": True},
    "depth": {"out_conv": True},
    "normal": {"out_conv": True},
    "semseg": {"class_dim": 16},
    "features": {"image_size": (8, 8), "patch_size": 1, "encoder_depth": 1},
}
STEPS = {"features": (1000, 250)}


def get_config(domain: str) -> ml_collections.ConfigDict:
    """Training of one tokenizer: rgb, depth, normal, semseg or features."""
    if domain not in CHANNELS:
        raise ValueError(
            f"no tokenizer for {domain!r}; write --config=configs/tokenizers/rooms.py:NAME with one of "
            f"{', '.join(CHANNELS)}"
        )
    shape = {
        "image_size": (64, 64),
        "patch_size": 8,
        "latent_dim": 32,
        "norm_latents": True,
        "mlp_ratio": 3.0,
        "encoder_dim": 128,
        "encoder_depth": 2,
        "encoder_heads": 4,
        "decoder_dim": 128,
        "decoder_depth": 3,
        "decoder_heads": 4,
    }
    config = train_config.default(
        domain=domain,
        channels=CHANNELS[domain],
        codebook_size=1024 if domain in ("rgb", "features") else 128,
        **shape | MODEL.get(domain, {}),
    )
    config.data.train = f"rooms:{PACK}/rooms_train.zip"
    if domain != "features":
        config.data.train += ",data/packs/rooms_train-*.zip"
    config.data.validation = f"rooms:{PACK}/rooms_val.zip"
    steps, autoencoder = STEPS.get(domain, (2000, 400))
    config.train.total = f"{steps} steps"
    config.train.autoencoder_steps = autoencoder
    config.train.global_batch = 16
    config.codebook.kmeans = True
    config.codebook.decay = 0.95
    config.codebook.dead_code_coefficient = 8.0
    config.codebook.restart_until = 0.9
    # A learning rate of 2e-3.
    config.optimizer.blr = 0.032
    config.optimizer.warmup = "100 steps"
    config.optimizer.ema = 0.99 if domain == "features" else 0.999
    config.optimizer.ema_warmup = True
    config.loss.name = "l1" if domain == "depth" else ""
    config.log.pictures_every = 500
    config.store_dtype = "float16"
    return config
