"""Validation on fixed masks, and the token-frequency baseline that a model has to beat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fm4m import loss as loss_lib
from fm4m import model as model_lib
from fm4m import sharding, step
from fm4m.batch import PackedBatch, RawBatch
from fm4m.masking import Masking, mask_batch
from fm4m.modalities import ModalitySet
from fm4m.stream import Stream

# The masks of validation sample i depend on this and on i alone, so that losses of different steps, runs, batch sizes
# and seeds are of the same targets.
MASK_SEED = 4


class Evaluator:
    """Mean loss of every output modality over a finite stream.

    Args:
      config: the model's configuration.
      stream: one pass over the validation split, not shuffled.
      masking: the recipe, its widths included.
      mesh: the devices.
      batch: rows of a batch over all devices, of validation as of training data for the baseline.
      samples: at most so many; 0 for all.
      method: see `cross_entropy_sums`.
    """

    def __init__(
        self, config: Any, stream: Stream, masking: Masking, mesh: Mesh, *, batch: int, samples: int = 0, method: str
    ):
        self._stream, self._masking, self._mesh, self._batch = stream, masking, mesh, batch
        self._samples = min(samples, stream.size) if samples else stream.size
        self._modalities: ModalitySet = stream.modalities
        specs = sharding.param_specs(
            jax.eval_shape(lambda: model_lib.init_params(config, stream.modalities, jax.random.key(0))), mesh
        )
        rows = stream.modalities.output_rows

        def sums(params: Any, packed: PackedBatch) -> tuple[jax.Array, jax.Array]:
            stacks, gathered, _ = step.weights_at_use(params, config, mesh)
            own = step.local_loss_sums({**gathered, **stacks}, config, stream.modalities, packed, mesh, method=method)
            return jax.lax.psum((own, loss_lib.target_counts(packed, stream.modalities)), sharding.BATCH_AXES)

        def histogram(packed: PackedBatch) -> jax.Array:
            # Slots without a target are counted in one row past the end, which is dropped.
            row = jnp.where(packed.decoder.valid, packed.target, rows)
            counts = jnp.zeros(rows, jnp.int32).at[row.reshape(-1)].add(1, mode="drop")
            return jax.lax.psum(counts, sharding.BATCH_AXES)

        def mask(key: jax.Array, raw: RawBatch, position: jax.Array) -> PackedBatch:
            return mask_batch(raw, masking, stream.modalities, stream.tasks, key, position)

        # Masking is the longest of the three to compile, so that it is a program of its own, which all uses share.
        batch = sharding.BATCH
        self._mask = jax.jit(sharding.local_rows(mask, mesh, in_specs=(P(), batch, batch), out_specs=batch))
        self._sums = jax.jit(sharding.local_rows(sums, mesh, in_specs=(specs, batch), out_specs=P()))
        self._compiled: Any = None
        self._histogram = jax.jit(sharding.local_rows(histogram, mesh, in_specs=(batch,), out_specs=P()))

    def __call__(self, params: Any) -> dict[str, float]:
        """Mean loss in nats a target of every output modality; NaN where the split has no target of it.

        ``params`` must have the same layout in every call.
        """
        totals = np.zeros((2, len(self._modalities)), np.float64)
        pending = None
        for packed in self._packed(self._stream, jax.random.key(MASK_SEED), self._samples):
            if self._compiled is None:
                self._compiled = self._sums.lower(params, packed).compile()
                sharding.wait_for_all("validation is compiled")
            sums = self._compiled(params, packed)
            if pending is not None:
                totals += jax.device_get(pending)
            pending = sums
        if pending is not None:
            totals += jax.device_get(pending)
        return {name: _ratio(*totals[:, self._modalities.index(name)]) for name in self._modalities.outputs}

    def frequency_baseline(self, train: Stream, *, seed: int, batches: int) -> dict[str, float]:
        """Loss on the same validation targets of predicting every token by its frequency among training targets.

        Frequencies are counted over the first ``batches`` batches of the training stream, masked as in training with
        ``seed``, plus one for every token, and normalised within each modality.
        """
        training = itertools.islice(self._packed(train, step.mask_key(seed), None), batches)
        seen, wanted = np.zeros((2, self._modalities.output_rows), np.float64)
        for packed in training:
            seen += jax.device_get(self._histogram(packed))
        for packed in self._packed(self._stream, jax.random.key(MASK_SEED), self._samples):
            wanted += jax.device_get(self._histogram(packed))
        out = {}
        for name in self._modalities.outputs:
            start, stop = self._modalities.output_ranges[self._modalities.index(name)]
            log_p = np.log((seen[start:stop] + 1) / (seen[start:stop] + 1).sum())
            out[name] = _ratio(-(wanted[start:stop] * log_p).sum(), wanted[start:stop].sum())
        return out

    def _packed(self, stream: Stream, key: jax.Array, limit: int | None) -> Iterator[PackedBatch]:
        source = sharding.device_batches(stream, self._mesh, position=0, global_batch=self._batch, limit=limit)
        return (self._mask(key, raw, position) for raw, position in source)


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else math.nan
