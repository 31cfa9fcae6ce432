"""Masking recipes: round trips, and recipes that cannot work."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from masking_cases import EVERY, MIXED, PART, make_raw

from fm4m.masking import Masking, mask_batch
from fm4m.modalities import Modality, ModalitySet


def test_recipe_round_trip():
    masking = Masking((3, 30), 40, MIXED, refill=True)
    again = Masking.from_dict(json.loads(json.dumps(masking.to_dict())))
    assert again == masking and hash(again) == hash(masking)
    assert again != dataclasses.replace(masking, refill=False)
    with pytest.raises(ValueError, match="num_input.*num_inputs"):
        Masking.from_dict({"num_input": 3})
    with pytest.raises(ValueError, match="weigth.*weight"):
        Masking.from_dict({**masking.to_dict(), "tasks": {"*": [{"inputs": 1, "targets": 1, "weigth": 2}]}})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (PART({"depht": 1.0}, 1.0), ["'a'", "component 0", "depht", "'depth'"]),
        (PART({"normal": 1.0}, 1.0), ["inputs", "normal", "no input"]),
        (PART(1.0, {"global": 1.0}), ["targets", "global", "no target"]),
        (PART(1.0, {"rgb": 1.0}), ["rgb", "pixels", "cannot be predicted"]),
        (PART(1.0, {"t5": 1.0}), ["t5", "embedding", "cannot be predicted"]),
        (PART({"depth": -1.0}, 1.0), ["depth", "-1.0"]),
        (PART(float("nan"), 1.0), ["nan"]),
        (PART(1.0, 0.0), ["nothing to predict"]),
        (PART(1.0, 1.0, keep="some"), ["'some'", "random, all, binary"]),
        (PART(1.0, 1.0, keep={"depth": "all"}), ["depth", "grid"]),
        (PART(1.0, 1.0, keep={"capton": "all"}), ["capton", "caption"]),
        (PART(1.0, 1.0, weight=-1), ["weight", "-1"]),
        (PART(1.0, 1.0, weight=0), ["weights sum to 0"]),
    ],
)
def test_bad_components_are_refused(part, words):
    with pytest.raises(ValueError) as error:
        Masking(4, 4, {"*": (part,)}).validate(EVERY, ("a",))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bad", [0, -1, (5, 3), (-1, 3), (0, 0), 2.5, (1, 2, 3), True])
def test_bad_ranges_are_refused(bad):
    with pytest.raises(ValueError, match="num_inputs"):
        Masking(bad, 4, {"*": (PART(1, 1),)})


def test_bad_tasks_and_vocabularies_are_refused():
    good = PART(1.0, 1.0)
    with pytest.raises(ValueError, match="'taks'"):
        Masking(4, 4, {"taks": (good,), "*": (good,)}).validate(EVERY, ("task",))
    with pytest.raises(ValueError, match="'b'"):
        Masking(4, 4, {"a": (good,)}).validate(EVERY, ("a", "b"))
    with pytest.raises(ValueError, match="at least one component"):
        Masking(4, 4, {"a": ()}).validate(EVERY, ("a",))
    small = ModalitySet((Modality("text", "sequence", 10, max_tokens=20),))
    with pytest.raises(ValueError, match="'text'.*sentinels"):
        Masking(4, 4, {"*": (good,)}).validate(small, ("a",))
    raw = make_raw(EVERY, 2, 0)
    with pytest.raises(ValueError, match="different modality sets"):
        mask_batch(raw, Masking(4, 4, {"*": (good,)}), small, ("a",), jax.random.key(0), jnp.arange(2))
