"""Training recipes that several configurations share."""

from __future__ import annotations

import ml_collections

from fm4m import config as config_lib


def mod7_pretraining(model: str) -> ml_collections.ConfigDict:
    """The recipe of the released 4M-7 models (reference implementation, CC12M runs) for a registered model.

    Batch 8,192, 128 visible and 128 predicted tokens, 500B tokens in all, of which 10B of warm-up; AdamW, cosine to 0.
    It names the mixture "mod7", which the user's own module registers (`c.data.modules`): the modalities of
    `fm4m.modality_sets.MOD7`; for half of the samples all inputs from rgb@224, for half from every modality with
    Dirichlet concentration 0.5; targets always with 0.5.
    """
    c = config_lib.default()
    c.model.name = model
    # 1,365, 2,730 and 5,461 hidden columns of the MLP are no multiple of a TPU's 128 lanes.
    c.model.mlp_multiple = 128
    c.data.mixture = "mod7"
    c.data.modules = ()
    c.data.num_inputs = 128
    c.data.num_targets = 128

    c.train.global_batch = 8192
    c.train.total = "500B tokens"
    c.train.epoch_samples = config_lib.REFERENCE_EPOCH_SAMPLES
    c.optimizer.blr = 1e-4
    c.optimizer.warmup = "10B tokens"

    c.checkpoint.every = 1220
    c.checkpoint.keep_period = 20 * 1220
    c.eval.every = 1220
    c.eval.samples = 49152
    return c


def rooms_pretraining() -> ml_collections.ConfigDict:
    """What runs on the built-in rooms have in common: small float32 models on CPUs; sizes and lengths are left open.

    The sample pictures are drawn by the tokenizers under ``data_pipelines/rooms/tokenizers``.
    """
    c = config_lib.default()
    c.data.mixture = "rooms"
    c.data.modules = ("data_pipelines.mixtures.rooms",)
    c.model.name = "fm_tiny_6e_6d_swiglu_nobias"
    # With sine-cosine positions, and queries and keys equal but of the usual size, the demo still predicts the average
    # room after its 550 steps (validation loss of depth 4.23 instead of 3.94, semantic classes 3.67 instead of 3.08).
    c.model.attention_init = "aligned"
    c.model.grid_positions = "fourier"
    # CPUs have no fast bfloat16 products.
    c.model.dtype = "float32"
    # The mean over tokens: the mean over modalities gives captions and boxes two sevenths of the loss for few targets.
    c.train.loss = "token"
    c.optimizer.clip_norm = 3.0
    c.eval.batch = 64
    c.log.picture_inputs = ("rgb@64",)
    folder = "data_pipelines/rooms/tokenizers"
    images = {"rgb": "rgb", "depth": "depth", "normal": "normal", "semseg": "semseg", "imnet": "features"}
    c.log.picture_tokenizers = (
        *(f"tok_{name}@64=image:{folder}/{file}.safetensors" for name, file in images.items()),
        f"caption=text:{folder}/text.json",
        f"det=boxes:{folder}/text.json",
    )
    return c
