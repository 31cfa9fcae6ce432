from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m.batch import IMAGENET_MEAN, IMAGENET_STD, PackedBatch, RawBatch, Tokens, check_raw, patchify
from fm4m.modalities import Modality, ModalitySet

SET = ModalitySet(
    (
        Modality("rgb", "pixels", grid=(2, 2), patch_size=4, channels=3),
        Modality("depth", "tokens", 20, (2, 2)),
        Modality("caption", "sequence", 40, max_tokens=5),
    )
)


def raw(batch=3):
    return RawBatch(
        np.zeros((batch, 9), np.uint16),
        np.tile(np.array([4, 4, 2], np.int16), (batch, 1)),
        np.zeros(batch, np.uint8),
        {"rgb": np.zeros((batch, 8, 8, 3), np.uint8)},
    )


def test_constructors_check_dtype_and_shape():
    good = raw()
    with pytest.raises(TypeError, match=r"RawBatch.tokens has dtype int32, expected uint16"):
        dataclasses.replace(good, tokens=good.tokens.astype(np.int32))
    with pytest.raises(ValueError, match=r"RawBatch.length has shape \(2, 3\)"):
        dataclasses.replace(good, length=good.length[:2])
    tokens = Tokens(*(jnp.zeros((2, 5), jnp.int32) for _ in range(3)), jnp.zeros((2, 5), bool))
    with pytest.raises(TypeError, match="Tokens.valid"):
        dataclasses.replace(tokens, valid=jnp.zeros((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="PackedBatch.target"):
        PackedBatch(tokens, tokens, jnp.zeros((2, 4), jnp.int32), {})


def test_batches_are_pytrees():
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), raw())
    assert isinstance(doubled, RawBatch) and doubled.size == 6
    assert jax.jit(lambda r: r)(raw()).dense["rgb"].shape == (3, 8, 8, 3)
    assert jax.eval_shape(lambda: jax.tree.map(jnp.asarray, raw())).tokens.shape == (3, 9)


def test_check_raw_names_the_modality():
    check_raw(raw(), SET)
    bad = raw()
    bad.tokens[1, 3] = 20
    with pytest.raises(ValueError, match=r"'depth': token 20 in row 1 .* 0\.\.19"):
        check_raw(bad, SET)
    bad = raw()
    bad.length[2, 2] = 6
    with pytest.raises(ValueError, match="'caption': a length of 6"):
        check_raw(bad, SET)
    with pytest.raises(ValueError, match="'rgb'"):
        check_raw(dataclasses.replace(raw(), dense={}), SET)
    with pytest.raises(ValueError, match="different modality sets"):
        check_raw(dataclasses.replace(raw(), tokens=np.zeros((3, 8), np.uint16)), SET)


def test_patchify_is_row_column_channel():
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    patches = np.asarray(patchify(jnp.asarray(images), 4))
    assert patches.shape == (2, 4, 48)
    # Patch 1 is the upper right one; its element (row 2, column 1, channel 2).
    want = (images[1, 2, 5, 2] / 255 - IMAGENET_MEAN[2]) / IMAGENET_STD[2]
    np.testing.assert_allclose(patches[1, 1, 2 * 12 + 1 * 3 + 2], want, rtol=1e-5)
