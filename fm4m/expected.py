"""How many tokens of each modality a masking recipe is expected to predict: what static shapes are planned with."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fm4m.config_file import ConfigError
from fm4m.loss import target_slots
from fm4m.masking_recipe import Masking, MaskingComponent
from fm4m.modalities import ModalitySet, unknown_name

DRAWS = 4096

# How full texts are thought to be: slots of the loss for targets that are not there are computed in every batch, those
# that are missing cost little.
TEXT_FILLED = 0.25


@functools.lru_cache(maxsize=16)
def expected_targets(
    modalities: ModalitySet, masking: Masking, tasks: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation of the number of predicted tokens of each modality in a sample that lacks none.

    Tasks are equally often. Numbers are Dirichlet shares of the target budget, none over what is there: of a grid, what
    the inputs leave; of a text, `TEXT_FILLED` of its maximum. With ``refill``, scaled up to the whole budget.
    """
    rng = np.random.default_rng(0)
    ms = modalities.modalities
    most = np.array([m.max_tokens * (1.0 if m.grid else TEXT_FILLED) for m in ms])
    grid = np.array([m.grid is not None for m in ms])
    mean, square = np.zeros(len(ms)), np.zeros(len(ms))

    def draw(component: MaskingComponent, side: str, budget: tuple[int, int]) -> np.ndarray:
        alpha = np.array(list(component.concentration(side, modalities).values()))
        shares = np.zeros((DRAWS, len(alpha)))
        if (alpha > 0).any():
            shares[:, alpha > 0] = rng.dirichlet(alpha[alpha > 0], DRAWS)
        return shares * (sum(budget) / 2)

    for task in tasks:
        components = masking.components(task)
        weights = np.array([c.weight for c in components]) / len(tasks)
        for component, weight in zip(components, weights / sum(c.weight for c in components)):
            inputs = np.minimum(draw(component, "inputs", masking.input_range), most)
            tokens = np.minimum(draw(component, "targets", masking.target_range), most - inputs * grid)
            if masking.refill:
                tokens *= sum(masking.target_range) / 2 / np.maximum(tokens.sum(1, keepdims=True), 1)
            mean += weight * tokens.mean(0)
            square += weight * (tokens**2).mean(0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    outputs = [(modalities.index(name), name) for name in modalities.outputs]
    return {n: float(mean[k]) for k, n in outputs}, {n: float(deviation[k]) for k, n in outputs}


def corrected(expected: Mapping[str, float], measured: Sequence[str]) -> dict[str, float]:
    """Expected targets of a sample with some replaced by measured means.

    ``measured`` is the configuration's ``train.expected_targets``: texts like "caption=11.5". Raises ConfigError for
    one that cannot be read or names no output modality.
    """
    expected = dict(expected)
    for text in measured:
        name, _, number = text.partition("=")
        if name not in expected:
            raise ConfigError(f"train.expected_targets: {unknown_name(name, expected, 'output modality')}")
        try:
            expected[name] = float(number)
        except ValueError:
            expected[name] = math.nan
        if not 0 <= expected[name] < math.inf:
            raise ConfigError(f"train.expected_targets: {text!r} is not NAME=NUMBER, as in 'caption=11.5'")
    return expected


def loss_slots(
    modalities: ModalitySet, masking: Masking, tasks: tuple[str, ...], samples: int, measured: Sequence[str] = ()
) -> dict[str, int]:
    """Static rows of the loss for each output modality, for ``samples`` samples of a device in one pass.

    ``measured`` as in `corrected`.
    """
    return target_slots(corrected(expected_targets(modalities, masking, tasks)[0], measured), samples)
