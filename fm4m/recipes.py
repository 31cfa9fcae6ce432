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
