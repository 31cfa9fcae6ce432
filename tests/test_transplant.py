"""A run that starts from another model's weights, with other modalities and another layout of the tables."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import MODALITIES, TinyStream, tiny_config

from fm4m import config as config_lib
from fm4m import plan, train
from fm4m.interop import ml4m
from fm4m.interop.layout import Layout
from fm4m.loading import LoadedModel
from fm4m.modalities import Modality, ModalitySet
from fm4m.model import ModelConfig, init_params
from fm4m.transplant import transplant

CONFIG = ModelConfig(32, 1, 2, num_heads=2, dtype="float32")
MORE = ModalitySet((Modality("shape", "tokens", vocab_size=7, grid=(4, 4)), *reversed(MODALITIES.modalities)))


def model(config=CONFIG, modalities=MODALITIES, seed=0):
    return LoadedModel(config, modalities, init_params(config, modalities, jax.random.key(seed)), {})


def test_known_modalities_come_along_and_new_ones_stay_fresh(caplog):
    caplog.set_level("INFO", "fm4m")
    old = model()
    new = dataclasses.replace(CONFIG, mlp_multiple=64, tied_heads=False, share_modality_embeddings=False)
    fresh = init_params(new, MORE, jax.random.key(1))
    params = transplant(old, new, MORE, fresh)
    layout, source = Layout(new, MORE), Layout(CONFIG, MODALITIES)
    taken = 0
    for key in layout.parameters:
        ours = layout.get(params, key)
        if key in source.parameters:
            np.testing.assert_array_equal(ours, source.get(old.params, key), err_msg=key)
            taken += 1
        else:
            assert ".shape." in key
            np.testing.assert_array_equal(ours, layout.get(fresh, key), err_msg=key)
    assert taken == len(source.parameters)
    assert "fresh tables: shape; left behind: none" in caplog.text
    transplant(LoadedModel(new, MORE, params, {}), CONFIG, MODALITIES, old.params)
    assert "fresh tables: none; left behind: shape" in caplog.text


def test_what_differs_there_cannot_be_one_here():
    apart = dataclasses.replace(CONFIG, tied_heads=False, share_modality_embeddings=False)
    for option in ("tied_heads", "share_modality_embeddings"):
        config = dataclasses.replace(apart, **{option: True})
        with pytest.raises(ValueError, match=rf"differ in the model to start from.* set model.{option}=False"):
            transplant(model(apart), config, MODALITIES, init_params(config, MODALITIES, jax.random.key(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_depth": 2}, "has no encoder.1.norm1.weight"),
        ({"decoder_depth": 1}, "also has decoder.1.context_norm.weight"),
        ({"num_heads": 4}, r"the model to start from has num_heads = 2, here model.num_heads = 4"),
        ({"grid_positions": "fourier"}, "has grid_positions = 'sincos', here model.grid_positions = 'fourier'"),
        ({"dim": 64}, r"mask_token has shape \(1, 1, 32\) in the model to start from, here \(1, 1, 64\)"),
    ],
)
def test_other_layers_are_refused(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        transplant(model(), config, MODALITIES, init_params(config, MODALITIES, jax.random.key(0)))


def test_a_run_starts_from_a_file(tmp_path, caplog):
    config = tiny_config(train__total="4 steps", optimizer__blr=1e-12)
    old = model(dataclasses.replace(plan.make_model_config(config)), seed=5)
    ml4m.save(tmp_path / "model", old.config, MODALITIES, old.params)
    config.train.init_from = str(tmp_path / "model")
    result = train.train(config, tmp_path / "run", TinyStream())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result.state["params"], dict(old.params))
    config.train.init_from = str(tmp_path / "absent")
    with pytest.raises(config_lib.ConfigError, match=r"train.init_from = .*absent.* is no model"):
        train.train(config, tmp_path / "other", TinyStream())
