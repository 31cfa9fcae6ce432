"""The run of `benchmarks.soak`: a model of a second's compilation on random samples, with everything switched on.

Command: python -m benchmarks.soak --minutes=30 --workdir=runs/soak
"""

from __future__ import annotations

from fm4m import config


def get_config():
    """The configuration."""
    c = config.default()
    c.data.mixture, c.data.modules = "random", ()
    c.model.dim, c.model.encoder_depth, c.model.decoder_depth, c.model.num_heads = 64, 2, 2, 2
    c.model.dtype = "float32"
    c.train.global_batch, c.train.total = 32, "1M steps"
    c.optimizer.schedule, c.optimizer.warmup = "constant", "100 steps"
    c.optimizer.clip_norm, c.optimizer.ema = 1.0, 0.99
    c.checkpoint.every = 100
    # Enough that some are whole when the newest were damaged one after the other.
    c.checkpoint.keep = 4
    c.eval.every, c.eval.batch, c.eval.baseline_batches = 1000, 32, 0
    c.log.every, c.log.progress_bar = 5, False
    return c
