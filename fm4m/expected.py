"""How many tokens of each modality a masking recipe is expected to predict: what static shapes are planned with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from fm4m.config import ConfigError
from fm4m.loss import target_slots
from fm4m.masking_recipe import Masking
from fm4m.modalities import ModalitySet, unknown_name

DRAWS = 4096


@functools.lru_cache(maxsize=16)
def expected_targets(
    masking: Masking, modalities: ModalitySet, tasks: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation of the number of predicted tokens of each modality in a sample that lacks none.

    Tasks are equally often. Numbers are Dirichlet shares of the target budget, none over the modality's length; with
    ``refill``, scaled up to the whole budget. Text is taken to be as long as its maximum.
    """
    rng = np.random.default_rng(0)
    most = np.array([m.max_tokens for m in modalities.modalities])
    budget = sum(masking.target_range) / 2
    mean, square = np.zeros(len(modalities)), np.zeros(len(modalities))
    for task in tasks:
        components = masking.components(task)
        weights = np.array([c.weight for c in components]) / len(tasks)
        for component, weight in zip(components, weights / sum(c.weight for c in components)):
            alpha = np.array(list(component.concentration("targets", modalities).values()))
            shares = np.zeros((DRAWS, len(alpha)))
            shares[:, alpha > 0] = rng.dirichlet(alpha[alpha > 0], DRAWS)
            tokens = np.minimum(shares * budget, most)
            if masking.refill:
                tokens *= budget / tokens.sum(1, keepdims=True)
            mean += weight * tokens.mean(0)
            square += weight * (tokens**2).mean(0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    outputs = [(modalities.index(name), name) for name in modalities.outputs]
    return {n: float(mean[k]) for k, n in outputs}, {n: float(deviation[k]) for k, n in outputs}


def loss_slots(
    masking: Masking, modalities: ModalitySet, tasks: tuple[str, ...], samples: int, measured: Sequence[str] = ()
) -> dict[str, int]:
    """Static rows of the loss for each output modality, for ``samples`` samples of a device in one pass.

    ``measured`` are corrections of the recipe's expectation, as the configuration's ``train.expected_targets`` has
    them. Raises ConfigError for one that cannot be read or names no output.
    """
    expected = dict(expected_targets(masking, modalities, tasks)[0])
    for text in measured:
        name, _, number = text.partition("=")
        if name not in expected:
            raise ConfigError(f"train.expected_targets: {unknown_name(name, expected, 'output modality')}")
        try:
            expected[name] = float(number)
        except ValueError:
            raise ConfigError(f"train.expected_targets: {text!r} is not NAME=NUMBER, as in 'caption=11.5'") from None
    return target_slots(expected, samples)
