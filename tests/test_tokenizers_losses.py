"""Losses against numbers worked out by hand, and the perceptual loss with a made-up network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.tokenizers import losses, perceptual
from fm4m.tokenizers.config import VQConfig

RGB = VQConfig("rgb", (8, 8), 4, 3)
DEPTH = VQConfig("depth", (8, 8), 4, 1)
SEMSEG = VQConfig("semseg", (8, 8), 4, 1, num_classes=4)
MASK = VQConfig("mask", (8, 8), 4, 1)


def test_of_values():
    output, target = jnp.array([[0.0, 3.0]]), jnp.array([[0.5, 0.0]])
    assert float(losses.mse(output, target)) == pytest.approx((0.25 + 9.0) / 2)
    assert float(losses.l1(output, target)) == pytest.approx((0.5 + 3.0) / 2)
    assert float(losses.smooth_l1(output, target)) == pytest.approx((0.125 + 2.5) / 2)


def test_of_classes():
    logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    expected = (np.log(4.0) + np.log(np.exp(3.0) + 3.0)) / 2
    assert float(losses.cross_entropy(logits, jnp.array([2, 1]))) == pytest.approx(expected, rel=1e-6)


def test_of_masks():
    """The logistic loss: -log sigmoid(z) for yes, -log sigmoid(-z) for no, 0 for what is sure and right."""
    z, p = jnp.array([0.0, 2.0, -3.0, 90.0, -90.0]), jnp.array([1.0, 1.0, -1.0, 1.0, -1.0])
    one_by_one = np.log1p(np.exp([0.0, -2.0, -3.0, -90.0, -90.0]))
    assert float(losses.binary_cross_entropy(z, p)) == pytest.approx(one_by_one.mean(), rel=1e-6)
    # The gradient is that of a probability, and does not vanish where the network is sure and wrong.
    gradient = jax.grad(losses.binary_cross_entropy)(jnp.array([50.0]), jnp.array([-1.0]))
    assert float(gradient[0]) == pytest.approx(1.0)


def test_cosines():
    a = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])  # two positions, two channels
    b = jnp.array([[[3.0, 0.0], [4.0, 0.0]]])
    assert float(losses.cosine_1d(a, b)) == pytest.approx(0.5)
    # Channel 0 is (1, 0) against (3, 4), channel 1 is (0, 2) against nothing.
    assert float(losses.cosine(a, b)) == pytest.approx(1.0 - 0.6 / 2)
    assert np.isfinite(jax.grad(losses.cosine_1d)(jnp.zeros((1, 2, 2)), b)).all()


def test_by_name():
    assert float(losses.by_name("", DEPTH)(jnp.array([3.0]), jnp.array([0.0]))) == pytest.approx(2.5)
    assert float(losses.by_name("", RGB)(jnp.array([3.0]), jnp.array([0.0]))) == pytest.approx(9.0)
    half = losses.by_name("l1", RGB)(jnp.array([0.1], jnp.bfloat16), jnp.array([0.0]))
    assert half.dtype == jnp.float32
    for name, model, message in [
        ("hinge", RGB, "must be one of mse"), ("mse", SEMSEG, "only cross"), ("cross_entropy", RGB, "class ids"),
        ("mse", MASK, "a mask's output is a logit"), ("binary_cross_entropy", RGB, "it is for masks"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            losses.by_name(name, model)


def halves():
    """An extractor of the picture and of its right half."""
    return lambda images: [images, images[:, :, images.shape[2] // 2 :]]


def test_perceptual():
    extractor = perceptual.load("test_tokenizers_losses:halves")
    target = jnp.zeros((2, 4, 4, 3)).at[:, :, :, 0].set(1.0)
    output = target.at[:, :, 2:, 0].set(-1.0)
    # All of the right half is opposite: half of the first map, all of the second.
    assert float(perceptual.make_loss(extractor, "cosine")(output, target)) == pytest.approx((1.0 + 2.0) / 2)
    assert float(perceptual.make_loss(extractor, "l1", (1,))(output, target)) == pytest.approx(2.0 / 3)
    assert float(perceptual.make_loss(extractor, "mse", (-1,))(output, target)) == pytest.approx(4.0 / 3)
    # The mean of a batch is that of its rows.
    single = perceptual.make_loss(extractor, "mse")(output[:1], target[:1])
    assert float(perceptual.make_loss(extractor, "mse")(output, target)) == pytest.approx(float(single))
    grey = perceptual.make_loss(extractor, "l1")(jnp.ones((1, 4, 4, 1)), jnp.zeros((1, 4, 4, 1)))
    assert float(grey) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="gives 2 feature maps"):
        perceptual.make_loss(extractor, layers=(2,))(output, target)
    with pytest.raises(ValueError, match="must be one of cosine"):
        perceptual.make_loss(extractor, "dot")
    for name, message in [("halves", "module:function"), ("no_such_module:f", "cannot be had"), ("math:f", "had")]:
        with pytest.raises(ValueError, match=message):
            perceptual.load(name)


def test_lite0_gives_the_maps_of_the_network():
    from data_pipelines.features import efficientnet_lite, weights
    from data_pipelines.features import perceptual as of_lite0

    try:
        state = weights.load_state_dict(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 64, 3)).astype(np.uint8)
    maps = jax.jit(of_lite0.lite0())(pixels / 127.5 - 1.0)
    assert [m.shape[1:] for m in maps] == [(16, 32, 16), (8, 16, 24), (4, 8, 40), (2, 4, 112), (1, 2, 320)]
    x = (pixels.astype(np.float32) - 127.0) / 128.0
    whole = jax.jit(efficientnet_lite.forward)(efficientnet_lite.fold_state_dict(state), x)
    np.testing.assert_allclose(maps[-1], whole.features, atol=1e-3)
