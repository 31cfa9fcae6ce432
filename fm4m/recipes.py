"""Training recipes that several configurations share."""

from __future__ import annotations

from typing import Any

import ml_collections

from fm4m import config as config_lib
from fm4m.masking_recipe import Masking, MaskingComponent
from fm4m.modalities import ModalitySet, unknown_name
from fm4m.modality_sets import MOD7, MOD21


def mod7_masking() -> Masking:
    """The released recipe of 4M-7 (reference implementation, ``mix_mod7_all2all_rgb2all_a0.5``), 128 + 128 tokens.

    Half of the samples show pixels only, half draw inputs from every modality; targets are drawn from all.
    """
    pixels = MaskingComponent(inputs={"rgb@224": 1.0}, targets=0.5)
    return Masking(128, 128, {"*": (pixels, MaskingComponent(inputs=0.5, targets=0.5))})


def mod21_masking() -> Masking:
    """The released recipe of 4M-21 (reference implementation, ``mix_mod21_all2allmix_rgb2all_capT5bias``), 256 + 256.

    T5 embeddings of captions are no target here: they have no decoder, and the reference loses the tokens that it
    gives them. Every component is for the samples with images; text alone needs a task of its own.
    """
    outputs = dict.fromkeys(MOD21.outputs, 0.5)
    biased = dict.fromkeys(MOD21.inputs, 0.05)
    palette = {"color_palette": "binary"}
    parts = [MaskingComponent(inputs=a, targets=a, keep=palette) for a in (0.01, 0.1, 1.0, 10.0)]
    parts.append(MaskingComponent(inputs={"rgb@224": 1.0}, targets=0.5, keep=palette))
    for text, other in (("caption", "t5_caption"), ("t5_caption", "caption")):
        inputs = {**biased, text: 5.0, other: 0.0}
        targets = {name: alpha for name, alpha in outputs.items() if name != text}
        parts.append(MaskingComponent(inputs, targets, keep={**palette, text: "all"}, weight=0.5))
    return Masking(256, 256, {"*": tuple(parts)})


# What the mixtures of the released models consist of; their data is the user's.
RELEASED = {"mod7": (MOD7, mod7_masking), "mod21": (MOD21, mod21_masking)}


def without_data(config: Any) -> tuple[ModalitySet, Masking, tuple[str, ...]]:
    """Modalities, masking recipe (with the configuration's numbers of tokens) and tasks of a released model's mixture.

    They are all that compiling or timing a step needs. Raises ConfigError for a mixture that is not in `RELEASED`.
    """
    name = config.data.mixture
    if name not in RELEASED:
        raise config_lib.ConfigError(
            f"data.mixture: {unknown_name(name, RELEASED, 'mixture that is known without its data')}. "
            "Name the module that registers it in data.modules"
        )
    modalities, masking = RELEASED[name]
    return modalities, config_lib.budgets(config, masking()), (name,)


def mod7_pretraining(model: str) -> ml_collections.ConfigDict:
    """The recipe of the released 4M-7 models (reference implementation, CC12M runs) for a registered model.

    Batch 8,192, 128 visible and 128 predicted tokens, 500B tokens in all, of which 10B of warm-up; AdamW, cosine to 0.
    It names the mixture "mod7", which the user's own module registers (`c.data.modules`): the modalities of
    `fm4m.modality_sets.MOD7`, masked by `mod7_masking`.
    """
    return _pretraining(model, "mod7", tokens=128, batch=8192)


def mod21_pretraining(model: str) -> ml_collections.ConfigDict:
    """The recipe of the released 4M-21 models (reference implementation), which start from 4M-7 (`train.init_from`).

    Batch 4,096, 256 visible and 256 predicted tokens, 500B tokens in all, of which 10B of warm-up; AdamW, cosine to 0;
    the decoder has modality embeddings of its own. It names the mixture "mod21", which the user's own module registers
    (`c.data.modules`): the modalities of `fm4m.modality_sets.MOD21`, masked by `mod21_masking`.
    """
    c = _pretraining(model, "mod21", tokens=256, batch=4096)
    c.model.share_modality_embeddings = False
    return c


# What differs between the sizes beyond their sizes, by the second part of a model's name. Memory is that of a v4-128 at
# the released batch of 4M-7, of 30.75 GiB a chip, as `fm4m.aot` says.
HOW_SIZES_RUN = {
    # Everything is kept (12.6 GiB for B), and unrolled layers are the fastest once compiled.
    "tiny": {"model": {"scan_group": 0}},
    "small": {"model": {"scan_group": 0}},
    "base": {"model": {"scan_group": 0}},
    # Keeping everything does not fit.
    "large": {"model": {"scan_group": 0, "remat": "dots"}},
    # Two passes (27.4 GiB; on a v4-256 one pass does). Unrolled, it needs over 20 GiB of the compiling host's memory.
    "xlarge": {
        "model": {"scan_group": 8, "remat": "dots"},
        "train": {"accumulation": 2},
        "optimizer": {"blr": 2e-5, "clip_norm": 3.0},
    },
}


def _pretraining(model: str, mixture: str, *, tokens: int, batch: int) -> ml_collections.ConfigDict:
    c = config_lib.default()
    c.model.name = model
    # 1,365, 2,730 and 5,461 hidden columns of the MLP are no multiple of a TPU's 128 lanes.
    c.model.mlp_multiple = 128
    c.data.mixture = mixture
    c.data.modules = ()
    c.data.num_inputs = tokens
    c.data.num_targets = tokens

    c.train.global_batch = batch
    c.train.total = "500B tokens"
    c.train.epoch_samples = config_lib.REFERENCE_EPOCH_SAMPLES
    c.optimizer.blr = 1e-4
    c.optimizer.warmup = "10B tokens"
    c.update(HOW_SIZES_RUN[model.split("_")[1]])

    epoch = config_lib.REFERENCE_EPOCH_SAMPLES // batch
    c.checkpoint.every = epoch
    c.checkpoint.keep_period = 20 * epoch
    c.eval.every = epoch
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
    # room after its 550 steps (with earlier tokenizers, validation loss of depth 4.23 instead of 3.94, of semantic
    # classes 3.67 instead of 3.08).
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
