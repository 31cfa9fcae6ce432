"""A tiny run for the tests: a made-up stream that needs no files, and a command line that trains on it.

``python tests/tiny_run.py WORKDIR OUT.npz [KEY=VALUE ...]`` trains (or continues) and writes the final parameters to
OUT.npz. Keys are those of the configuration, ``pause=SECONDS`` (how long the source waits before each batch), and
``hang_at=STEP`` or ``raise_at=STEP``: from that step's batch on the source of the last process hangs, or fails.
"""

from __future__ import annotations

import sys
import time

import jax
import numpy as np

from fm4m import config as config_lib
from fm4m.batch import RawBatch
from fm4m.errors import DataError
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality, ModalitySet

MODALITIES = ModalitySet(
    (
        Modality("image", "pixels", grid=(4, 4), patch_size=2, channels=3),
        Modality("colour", "tokens", vocab_size=24, grid=(4, 4)),
        Modality("words", "sequence", vocab_size=60, max_tokens=12),
    )
)


class TinyStream:
    """Pictures of one colour with a word for it: `fm4m.stream.Stream` as a function of (seed, position)."""

    def __init__(self, *, split="train", seed=0, size=100, finite=False, rate=1.0, pause=0.0, modalities=MODALITIES,
                 hang_at=0, raise_at=0):  # fmt: skip
        self.name, self.split, self.seed, self.size = "tiny", split, seed, size
        self.modalities, self.tasks = modalities, ("tiny",)
        self.masking = Masking(10, 8, {"*": (MaskingComponent(inputs=1.0, targets=1.0),)})
        self.resolved = {"name": "tiny", "split": split, "tasks": {"tiny": {"rate": rate, "size": size}}}
        self._finite, self._pause = finite, pause
        self._hang_at, self._raise_at = hang_at, raise_at

    def batches(self, *, position, global_batch, shard=0, shards=1):
        if global_batch % shards:
            raise ValueError(f"batch {global_batch} is not divisible by {shards} shards")
        rows = global_batch // shards
        while not self._finite or position < self.size:
            time.sleep(self._pause)
            if jax.process_index() == jax.process_count() - 1:
                while 0 < self._hang_at <= 1 + position // global_batch:
                    time.sleep(1)
                if 0 < self._raise_at <= 1 + position // global_batch:
                    raise DataError("tiny/train/words/00000.array_record, record 7 cannot be read: it is gone")
            yield self._batch(position + shard * rows + np.arange(rows))
            position += global_batch

    def _batch(self, positions):
        tokens = np.zeros((len(positions), self.modalities.num_slots), np.uint16)
        length = np.zeros((len(positions), len(self.modalities)), np.int16)
        image = np.zeros((len(positions), 8, 8, 3), np.uint8)
        for row, position in enumerate(positions):
            if self._finite and position >= self.size:
                continue
            index = position % self.size
            rng = np.random.default_rng([self.seed, index, self.split == "train"])
            colour = rng.integers(20)
            image[row] = colour * 12
            words = int(rng.integers(4, 13))
            codes = {"colour": colour + rng.integers(0, 2, 16), "words": 20 + (colour + np.arange(words)) % 40}
            for m, value in codes.items():
                start = self.modalities.slot_offset[m]
                tokens[row, start : start + len(value)] = value
            length[row, :3] = 16, 16, words
        return RawBatch(tokens, length, np.zeros(len(positions), np.uint8), {"image": image})


def tiny_config(**overrides):
    """A configuration of seconds: 24 steps of 16 samples, a checkpoint every 5. Overrides: ``train__total=...``."""
    c = config_lib.default()
    c.data.mixture, c.data.modules = "tiny", ()
    c.model.dim, c.model.encoder_depth, c.model.decoder_depth, c.model.num_heads = 32, 1, 1, 2
    c.model.mlp_ratio, c.model.dtype = 3.0, "float32"  # an MLP of 64, which meshes can split
    c.train.global_batch, c.train.total = 16, "24 steps"
    c.optimizer.warmup, c.optimizer.blr = "4 steps", 0.05
    c.checkpoint.every, c.eval.every, c.log.every, c.eval.baseline_batches = 5, 0, 6, 3
    c.eval.batch = 16
    c.log.tensorboard = False
    for key, value in overrides.items():
        section = c
        *path, name = key.split("__")
        for part in path:
            section = section[part]
        section[name] = value
    return c


def save_params(path, params):
    """Writes every parameter of this process as raw arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    np.savez(path, **{jax.tree_util.keystr(p): np.asarray(jax.device_get(x)) for p, x in leaves})


def picture_of(params, step):
    """A picture hook, which gets all of every parameter on one device, whatever the mesh."""
    for x in jax.tree.leaves(params):
        assert x.is_fully_addressable and x.sharding.num_devices == 1, x.sharding
    colour = np.clip(np.asarray(params["decoder_norm"]["scale"][:3]) * 100, 0, 255).astype(np.uint8)
    return {"norm": np.broadcast_to(colour, (2, 2, 3))}


def main():
    import logging

    from fm4m import sharding, train

    workdir, out, *pairs = sys.argv[1:]
    options = dict(pair.split("=", 1) for pair in pairs)
    given = {name: float(options.pop(name, 0)) for name in ("pause", "hang_at", "raise_at")}
    numbers = {k.replace(".", "__"): int(v) if v.lstrip("-").isdigit() else v for k, v in options.items()}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    config = tiny_config(**numbers)

    def run():
        evaluation = TinyStream(split="validation", size=40, finite=True)
        result = train.train(config, workdir, TinyStream(**given), evaluation, picture_of)
        mesh = sharding.make_mesh(**config.mesh)
        whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(result.state["params"])
        if jax.process_index() == 0:
            save_params(out, whole)
        return result

    code = train.exit_code(config, workdir, run)
    if jax.process_count() > 1 and code in (0, 75):
        jax.distributed.shutdown()
    return code


if __name__ == "__main__":
    from fm4m import processes

    processes.run(main)
