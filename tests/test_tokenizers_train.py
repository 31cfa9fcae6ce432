"""Tokenizer training on synthetic arrays: it learns, it is reproducible, and the command writes what it says."""

from __future__ import annotations

import sys
import types

import jax
import numpy as np
import pytest
from ml_collections import config_flags

from configs.tokenizers import rooms
from fm4m.tokenizers import io, preprocess, train
from fm4m.tokenizers.config import DOMAINS, VQConfig

NAMES = ("void", "wall", "floor", "lamp")


def small_config(domain: str):
    """The shipped configuration, shrunk to 16x16 images and a network that trains in a second or two."""
    config = rooms.get_config(domain)
    config.update({"steps": 120, "batch_size": 16, "warmup_steps": 10, "autoencoder_steps": 60, "learning_rate": 3e-3})
    config.model.update({
        "codebook_size": 32, "encoder_dim": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 32,
        "decoder_depth": 1, "decoder_heads": 2,
    })  # fmt: skip
    config.model.image_size = (4, 4) if domain == "features" else (16, 16)
    if domain == "features":
        config.model.channels = 12
    return config


def scenes(domain: str, count: int = 64) -> np.ndarray:
    """Two flat halves per image, split at a random row: few codes describe them."""
    rng = np.random.default_rng(0)
    side = 4 if domain == "features" else 16
    lower = np.arange(side)[None, :, None] >= rng.integers(1, side, (count, 1, 1))
    lower = np.broadcast_to(lower, (count, side, side))
    if domain == "depth":
        return np.where(lower, 2.0, 5.0 + rng.uniform(0, 0.1, (count, 1, 1))).astype(np.float32)
    if domain == "semseg":
        return np.where(lower, 2, 1).astype(np.uint8)
    if domain == "features":
        top, bottom = rng.normal(size=(2, 12))
        return np.where(lower[..., None], bottom, top).astype(np.float32)
    return np.where(lower[..., None], [128, 250, 128], [128, 128, 250]).astype(np.uint8)


@pytest.mark.parametrize("domain", DOMAINS)
def test_shipped_configuration_is_valid(domain):
    fields = rooms.get_config(domain).model.to_dict()
    if domain == "semseg":
        fields["num_classes"] = 48
    config = VQConfig.from_dict(fields)
    assert config.domain == domain
    assert config.grid == (8, 8)


def test_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="sound"):
        rooms.get_config("sound")


def test_unknown_override_is_refused():
    from absl import flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with pytest.raises(flags.UnrecognizedFlagError, match="stepz"):
        values(["program", f"--config={rooms.__file__}:rgb", "--config.stepz=3"])


def test_fit_learns_and_is_reproducible():
    config = small_config("rgb")
    model = VQConfig.from_dict(config.model.to_dict())
    arrays = scenes("rgb")
    tokenizer = train.fit(config, model, arrays)
    numbers = train.evaluate(tokenizer, arrays)
    flat = np.broadcast_to(arrays.mean((1, 2), keepdims=True), arrays.shape)
    error = np.mean((tokenizer.decode(tokenizer.encode(arrays)).astype(float) - arrays) ** 2)
    assert error < 0.5 * np.mean((flat.astype(float) - arrays) ** 2)
    assert 0 < numbers["codebook_use"] <= 1
    assert numbers["perplexity"] <= 32

    again = train.fit(config, model, arrays)
    for left, right in zip(jax.tree.leaves(tokenizer.params), jax.tree.leaves(again.params)):
        np.testing.assert_array_equal(left, right)


def test_fit_refuses_small_and_wrong_arrays():
    config = small_config("rgb")
    model = VQConfig.from_dict(config.model.to_dict())
    with pytest.raises(ValueError, match=r"5 arrays are fewer than config\.batch_size = 16"):
        train.fit(config, model, scenes("rgb", 5))
    with pytest.raises(ValueError, match="expects uint8"):
        train.fit(config, model, scenes("rgb").astype(np.float32))


def test_losses():
    rgb, depth = (VQConfig.from_dict(small_config(domain).model.to_dict()) for domain in ("rgb", "depth"))
    output, target = np.array([[0.0, 3.0]]), np.array([[0.5, 0.0]])
    assert float(train.reconstruction_loss(rgb, output, target)) == pytest.approx((0.25 + 9.0) / 2)
    assert float(train.reconstruction_loss(depth, output, target)) == pytest.approx((0.125 + 2.5) / 2)
    semseg = VQConfig.from_dict({**small_config("semseg").model.to_dict(), "num_classes": 4})
    loss = train.reconstruction_loss(semseg, np.zeros((1, 2, 2, 4)), np.zeros((1, 2, 2), np.int32))
    assert float(loss) == pytest.approx(np.log(4.0))


class FakePack:
    """The part of the reader's interface that training uses."""

    classes = NAMES
    palette = np.arange(12, dtype=np.uint8).reshape(4, 3)

    def __init__(self, path):
        self.count = 32 if "train" in str(path) else 18

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {domain: scenes(domain)[index] for domain in ("rgb", "depth", "normal", "semseg")}


@pytest.mark.parametrize(
    "domain", ["depth", *(pytest.param(name, marks=pytest.mark.slow) for name in ("normal", "semseg", "features"))]
)
def test_run_writes_weights_and_picture(domain, tmp_path, monkeypatch, capsys):
    from PIL import Image

    pack = types.ModuleType("data_pipelines.rooms.pack")
    pack.RoomsPack = FakePack
    features = types.ModuleType("data_pipelines.features")
    features.load_features = lambda path: scenes("features").astype(np.float16)
    monkeypatch.setitem(sys.modules, "data_pipelines.rooms.pack", pack)
    monkeypatch.setitem(sys.modules, "data_pipelines.features", features)
    config = small_config(domain)
    config.update({"steps": 6, "warmup_steps": 2, "autoencoder_steps": 3})
    out = tmp_path / f"{domain}.safetensors"
    numbers = train.run(config, str(out))
    expected = {"depth": "abs_rel", "normal": "angle_deg", "semseg": "miou", "features": "cosine"}[domain]
    assert expected in numbers
    assert f"{expected} " in capsys.readouterr().out
    assert Image.open(out.with_suffix(".png")).width == 8 * 16 * 2 * (2 if domain == "features" else 1)
    tokenizer = io.load(out)
    if domain == "semseg":
        assert tokenizer.config.class_names == NAMES
        assert tokenizer.config.palette[3] == (9, 10, 11)
    if domain == "features":
        assert tokenizer.stats.keys() == preprocess.STATS_SHAPES.keys()
