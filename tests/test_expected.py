from __future__ import annotations

import jax
import numpy as np
import pytest

from fm4m import config as config_lib
from fm4m import recipes
from fm4m.config_file import ConfigError
from fm4m.expected import expected_targets, loss_slots
from fm4m.loss import target_counts
from fm4m.masking import Masking, MaskingComponent, mask_batch
from fm4m.modality_sets import MOD7
from fm4m.synthetic import RandomStream


@pytest.fixture(scope="module")
def mod7():
    config = config_lib.default()
    config.data.mixture, config.data.num_inputs, config.data.num_targets = "mod7", 64, 64
    return recipes.without_data(config)


def test_expectation_is_what_masking_does(mod7):
    modalities, masking, tasks = mod7
    stream, samples = RandomStream(modalities, masking, tasks), 512
    raw = next(stream.batches(position=0, global_batch=samples))

    @jax.jit
    def counts(raw):
        batch = mask_batch(raw, masking, modalities, tasks, jax.random.key(0), np.arange(samples))
        return target_counts(batch, modalities)

    drawn = np.asarray(counts(raw)) / samples
    mean, deviation = expected_targets(*mod7)
    for name in modalities.outputs:
        if modalities[name].grid:  # texts are shorter than their maximum
            error = 4 * deviation[name] / np.sqrt(samples)
            assert abs(drawn[modalities.index(name)] - mean[name]) < error, name
    texts = [n for n in modalities.outputs if not modalities[n].grid]
    assert texts and all(0 < mean[n] < 64 / 7 for n in texts)


def test_grids_share_a_small_budget_as_the_dirichlet_does(mod7):
    modalities = mod7[0]
    mean, deviation = expected_targets(*mod7)
    for name in modalities.outputs:
        if modalities[name].grid:
            assert mean[name] == pytest.approx(64 / 7, rel=0.1)
            # A Dirichlet share of 7 with concentration 0.5 has the variance (1/7) (6/7) / 4.5.
            assert deviation[name] == pytest.approx(64 * (6 / 49 / 4.5) ** 0.5, rel=0.1)


def test_targets_stop_at_what_the_inputs_leave_of_a_grid():
    everything = MaskingComponent(inputs={"rgb@224": 1.0}, targets={"tok_rgb@224": 1.0})
    assert expected_targets(MOD7, Masking(128, 1024, {"*": (everything,)}), ("a",))[0]["tok_rgb@224"] == 196
    half = MaskingComponent(inputs={"tok_rgb@224": 1.0}, targets={"tok_rgb@224": 1.0})
    assert expected_targets(MOD7, Masking(96, 1024, {"*": (half,)}), ("a",))[0]["tok_rgb@224"] == 100


def test_slots_follow_the_recipe_and_what_was_measured(mod7):
    slots = loss_slots(*mod7, samples=256)
    assert set(slots) == set(mod7[0].outputs)
    assert all(count % 128 == 0 and count > 0 for count in slots.values())
    less = loss_slots(*mod7, samples=256, measured=("caption=1.5",))
    assert less == {**slots, "caption": 256 * 3 // 2 // 128 * 128}
    with pytest.raises(ConfigError, match="train.expected_targets: .*captoin.*caption"):
        loss_slots(*mod7, samples=256, measured=("captoin=1",))
    with pytest.raises(ConfigError, match="'caption=many' is not NAME=NUMBER"):
        loss_slots(*mod7, samples=256, measured=("caption=many",))
