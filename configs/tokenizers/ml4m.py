"""The recipes by which 4M's released tokenizers were trained (the reference implementation's configurations).

Command:  python -m fm4m.tokenizers.train --config=configs/tokenizers/ml4m.py:rgb --out=tokenizers/rgb.safetensors \
              --config.data.train=images:PICTURES/train --config.data.validation=images:PICTURES/val
          and, from the file of that, the stage with images of 224 to 448 pixels:
          python -m fm4m.tokenizers.train --config=configs/tokenizers/ml4m.py:rgb-stage2 --out=rgb_448.safetensors \
              --config.train.init_from=tokenizers/rgb.safetensors --config.data.train=... --config.data.validation=...
Names:    rgb, depth, normal, canny, semseg, clip, dinov2, imagebind, dinov2-global, imagebind-global, pose, sam,
          rgb-percept, rgb-uvit; all but pose and sam also with "-stage2".
Cost:     50 passes over some ten million pictures for rgb: days on a group of accelerators.

Where they differ from the reference: batches are those of eight devices; bfloat16 stands for float16; feature maps and
vectors come from a file (features:FILE.npy), standardised per channel, so that they cannot be cropped, and are made
for the larger images in stage 2, whose maps are resized, by 28 pixels where patches have 14; a mask's loss is the
logistic one; and the perceptual loss sees EfficientNet-lite0 unless --config.loss.perceptual names another network,
such as CLIP at its blocks 2, 5, 8 and 11.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from fm4m.tokenizers import config as vq
from fm4m.tokenizers import diffusion_config, train_config

DEVICES = 8
VIT = vq.preset("encoder", "vit_b")
VIT_DECODER = vq.preset("decoder", "vit_b")
MLP = vq.preset("encoder", "BottleneckMLP/B_6-Wi_1024") | vq.preset("decoder", "BottleneckMLP/B_6-Wi_1024")
PICTURE = {"image_size": (224, 224), "patch_size": 16, "latent_dim": 32, **VIT}


def _unet(loss: str = "mse") -> dict[str, Any]:
    return {"decoder": "unet", "diffusion": diffusion_config.preset("unet_patched", loss=loss)}


def _features(channels: int, patch: int) -> dict[str, Any]:
    return PICTURE | VIT_DECODER | {
        "domain": "features", "channels": channels, "patch_size": patch, "patch_proj": False, "codebook_size": 8192,
    }  # fmt: skip


def _vector(channels: int, books: int, codes: int) -> dict[str, Any]:
    return MLP | {
        "domain": "vector", "channels": channels, "image_size": (1, 1), "patch_size": 1, "quantizer": "memcodes",
        "num_codebooks": books, "codebook_size": codes, "latent_dim": 1024,
    }  # fmt: skip


_UVIT = diffusion_config.preset("uvit_b_p4_f16", prediction="v_prediction", schedule="shifted_cosine:0.5")
_UVIT = diffusion_config.DiffusionConfig.from_dict(
    _UVIT.to_dict() | {"uvit": _UVIT.to_dict()["uvit"] | {"dropout": 0.2}}
)

MODELS: dict[str, dict[str, Any]] = {
    "rgb": PICTURE | _unet() | {"domain": "rgb", "channels": 3, "codebook_size": 16384},
    "depth": PICTURE | _unet("smooth_l1") | {"domain": "depth", "channels": 1, "codebook_size": 8192},
    "normal": PICTURE | _unet() | {"domain": "normal", "channels": 3, "codebook_size": 8192},
    "canny": PICTURE | _unet("smooth_l1") | {"domain": "edges", "channels": 1, "codebook_size": 8192},
    "semseg": PICTURE | VIT_DECODER | {"domain": "semseg", "channels": 1, "num_classes": 134, "codebook_size": 4096},
    "clip": _features(512, 16),
    "dinov2": _features(768, 14),
    "imagebind": _features(1280, 14),
    "dinov2-global": _vector(768, 16, 8192),
    "imagebind-global": _vector(1280, 16, 8192),
    "pose": _vector(207, 8, 1024),
    "sam": PICTURE | VIT_DECODER | {
        "domain": "mask", "channels": 1, "image_size": (64, 64), "codebook_size": 1024, "latent_dim": 1024,
        "out_conv": True,
    },
    "rgb-percept": PICTURE | VIT_DECODER | {"domain": "rgb", "channels": 3, "codebook_size": 1024},
    "rgb-uvit": PICTURE | {
        "domain": "rgb", "channels": 3, "codebook_size": 1024, "decoder": "uvit", "diffusion": _UVIT,
    },
}  # fmt: skip

# Passes, base learning rate, passes of warm-up, and batch of a device: of the first stage, and of the second.
STAGES: dict[str, tuple[tuple[float, float, float, int], ...]] = {
    "rgb": ((50, 1e-4, 5, 64), (5, 5e-5, 1, 16)),
    "depth": ((20, 1e-4, 5, 64), (1, 1e-4, 0.1, 16)),
    "normal": ((20, 1e-4, 5, 64), (1, 5e-5, 0.1, 16)),
    "canny": ((50, 5e-5, 5, 64), (1, 5e-5, 0.1, 64)),
    "semseg": ((20, 1e-4, 5, 80), (1, 5e-5, 0.1, 10)),
    "clip": ((20, 1e-4, 5, 128), (1, 5e-5, 0.1, 16)),
    "dinov2": ((20, 1e-4, 5, 64), (1, 5e-5, 0.1, 16)),
    "imagebind": ((20, 1e-4, 5, 128), (1, 5e-5, 0.1, 16)),
    "dinov2-global": ((15, 1e-4, 1, 64), (1, 5e-5, 0.1, 64)),
    "imagebind-global": ((15, 1e-4, 1, 64), (1, 5e-5, 0.1, 64)),
    "pose": ((15, 1e-4, 1, 64),),
    "sam": ((24, 1e-4, 1, 384),),
    "rgb-percept": ((50, 1e-4, 5, 64), (1, 5e-5, 0.1, 16)),
    "rgb-uvit": ((50, 1e-4, 5, 64), (5, 5e-5, 1, 8)),
}
# Moving average of the weights where it is not 0.99, as it is for decoders that regress.
EMA = {"rgb": 0.9999, "depth": 0.9999, "normal": 0.9999, "canny": 0.9999, "rgb-uvit": 0.9999, "sam": 0.0}
NAMES = tuple(n + s for n in MODELS for s in ("", "-stage2")[: len(STAGES[n])])


def get_config(name: str) -> ml_collections.ConfigDict:
    """The training of one released tokenizer, by one of `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"no tokenizer {name!r}; write ml4m.py:NAME with one of {', '.join(NAMES)}")
    name, second = name.removesuffix("-stage2"), name.endswith("-stage2")
    model = dict(MODELS[name])
    vector, cell = model["domain"] == "vector", model["patch_size"]
    grows = second and not vector
    if not vector and name != "sam":
        # Both stages resize the positions of 448 pixels, as the size of the released files says.
        model |= {"encoder_size": (448, 448), "image_size": (448, 448) if grows else (224, 224)}
        model |= {"decoder_size": (448, 448)} if "diffusion" not in model else {}
    config = train_config.default(**model)

    where = "features:FEATURES/{}.npy" if model["domain"] in ("features", "vector") else "images:PICTURES/{}"
    config.data.train, config.data.validation = where.format("train"), where.format("validation")
    config.data.flip = not vector and name != "sam"
    if where.startswith("images") and name != "sam":
        config.data.crop_scale = (0.8, 1.0)

    passes, rate, warmup, batch = STAGES[name][second]
    config.train.total, config.optimizer.warmup = f"{passes} epochs", f"{warmup} epochs"
    config.train.global_batch, config.optimizer.blr = DEVICES * batch, rate
    config.train.dtype = "bfloat16"
    if grows:
        config.train.min_size = 224
        config.train.size_step = 28 if cell == 14 else 32
    if second:
        config.train.init_from = f"tokenizers/{name}.safetensors"
    if name == "rgb-uvit":
        config.train.init_from = config.train.init_from or "tokenizers/rgb-percept.safetensors"
        config.train.freeze_encoder = True
    if vector:
        config.loss.name = "smooth_l1" if name == "pose" else "cosine_1d"
    if name == "rgb-percept":
        config.loss.perceptual = "data_pipelines.features.perceptual:lite0"
    config.optimizer.ema = EMA.get(name, 0.99)
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.checkpoint.every, config.eval.every, config.log.pictures_every = 5000, 10000, 10000
    return config
