"""The masks that training draws for chosen samples, taken apart again by modality."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import grain
import jax
import numpy as np

from data_pipelines.loader import MixtureStream
from fm4m import evaluate, step
from fm4m.batch import PackedBatch, RawBatch, Tokens
from fm4m.masking import mask_batch
from fm4m.modalities import ModalitySet

BATCH = 64


@dataclasses.dataclass(frozen=True)
class SampleMask:
    """One sample's inputs and targets by modality; a modality without any is not among them.

    Grids have cell numbers. Sequences have ids as the model reads them: inputs with a sentinel for every masked run;
    targets with a sentinel before every run, the last one closing. Embeddings have the numbers of their vectors,
    ``max_tokens`` for a masked run.

    Attributes:
      position: in the stream.
      task: name of the sample's task.
      inputs, targets: int32 arrays by modality.
      filled: slots used of the encoder's and of the decoder's.
      widths: slots there are.
    """

    position: int
    task: str
    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]
    filled: tuple[int, int]
    widths: tuple[int, int]


def draw_masks(
    stream: MixtureStream, positions: Sequence[int], progress: Callable = lambda n: None
) -> list[SampleMask]:
    """The masks of the samples at ``positions``.

    For an endless stream they are those of a training run with the stream's seed; else those of validation, which are
    the same for all runs. ``progress`` is called with the number of samples done.
    """
    key = step.mask_key(stream.seed) if stream.num_epochs is None else jax.random.key(evaluate.MASK_SEED)
    chosen = dataclasses.replace(stream, samples=grain.MapDataset.source(_At(stream.samples, positions)), num_epochs=1)
    size, out = min(BATCH, len(positions)), []
    for start, raw in zip(range(0, len(positions), size), chosen.batches(position=0, global_batch=size)):
        here = positions[start : start + size]
        # Position is uint32 on the device, and the last batch is filled up.
        padded = np.array([p % 2**32 for p in here] + [0] * (size - len(here)), np.uint32)
        sides = jax.device_get(_masked(raw, key, padded, stream.masking, stream.modalities, stream.tasks))
        for row, position in enumerate(here):
            task = stream.tasks[int(raw.task[row])]
            out.append(take_apart(*jax.tree.map(lambda x: x[row], sides), stream.modalities, position, task))  # noqa: B023
        progress(len(here))
    return out


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _masked(raw: RawBatch, key, position, masking, modalities, tasks) -> tuple[dict, dict]:
    packed: PackedBatch = mask_batch(raw, masking, modalities, tasks, key, position)

    def side(tokens: Tokens) -> dict:
        return {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}

    return side(packed.encoder), side(packed.decoder) | {"target": packed.target}


class _At:
    def __init__(self, samples: Sequence, positions: Sequence[int]):
        self._samples, self._positions = samples, list(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int):
        return self._samples[self._positions[index]]


def take_apart(
    encoder: Mapping[str, np.ndarray],
    decoder: Mapping[str, np.ndarray],
    modalities: ModalitySet,
    position: int,
    task: str,
) -> SampleMask:
    """The slots of one sample by modality.

    Args:
      encoder, decoder: fields of `fm4m.batch.Tokens`, [slots] each; the decoder has ``"target"`` beside them.
      modalities: the layout of the packed batch.
      position, task: of the sample.
    """
    inputs, targets = {}, {}
    for index, m in enumerate(modalities.modalities):
        here = encoder["valid"] & (encoder["modality"] == index)
        if here.any():
            start = {**modalities.input_offset, **modalities.continuous_offset}[m.name]
            cells = encoder["position"][here] - modalities.position_offset[m.name]
            inputs[m.name] = cells if m.grid else encoder["row"][here] - start
        here = decoder["valid"] & (decoder["modality"] == index)
        if here.any():
            start = modalities.output_offset[m.name]
            if m.grid:
                targets[m.name] = decoder["position"][here] - modalities.position_offset[m.name]
            else:  # every slot predicts the next token; the first one is given
                targets[m.name] = np.append(decoder["row"][here][:1], decoder["target"][here]) - start
    filled = int(encoder["valid"].sum()), int(decoder["valid"].sum())
    return SampleMask(position, task, inputs, targets, filled, (len(encoder["valid"]), len(decoder["valid"])))


def count_masks(masks: Sequence[SampleMask], modalities: ModalitySet) -> dict:
    """Fill rates of the budgets, and what share of all inputs and of all predictions belongs to each modality.

    Returns:
      ``{"samples", "budgets": {"encoder", "decoder": {"width", "fill_mean", "fill_p5"}}, "shares": {"inputs",
      "targets": {modality: share}}}``.
    """
    budgets, shares = {}, {}
    for side, name in enumerate(("encoder", "decoder")):
        width = masks[0].widths[side]
        fill = np.array([m.filled[side] for m in masks]) / width
        budgets[name] = {"width": width, "fill_mean": float(fill.mean()), "fill_p5": float(np.percentile(fill, 5))}
    for side in ("inputs", "targets"):
        count = dict.fromkeys(modalities.names, 0)
        for mask in masks:
            for name, tokens in getattr(mask, side).items():
                # The first of a sequence's target tokens is given, not predicted.
                count[name] += len(tokens) - (side == "targets" and modalities[name].grid is None)
        total = max(sum(count.values()), 1)
        shares[side] = {name: n / total for name, n in count.items()}
    return {"samples": len(masks), "budgets": budgets, "shares": shares}
