from __future__ import annotations

import jax
import numpy as np
import pytest

from fm4m.batch import abstract_batch
from fm4m.modality_sets import MOD21
from fm4m.recipes import mod21_masking
from fm4m.sharding import batch_sharding, make_mesh
from fm4m.synthetic import RandomStream


def test_samples_depend_on_seed_and_position_alone():
    stream = RandomStream(MOD21, mod21_masking(), ("a", "b"))
    batches = stream.batches(position=0, global_batch=4)
    next(batches)
    second = next(batches)
    half = next(stream.batches(position=4, global_batch=4, shard=1, shards=2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), second, half)
    other = next(RandomStream(MOD21, mod21_masking(), ("a", "b"), seed=1).batches(position=4, global_batch=4))
    assert (other.tokens != second.tokens).any()
    with pytest.raises(ValueError, match="batch 4 is not divisible by 3 shards"):
        next(stream.batches(position=0, global_batch=4, shards=3))


def test_batches_are_as_described_and_codes_within_vocabularies():
    raw = next(RandomStream(MOD21, mod21_masking(), ("a",)).batches(position=7, global_batch=2))
    expected, _ = abstract_batch(MOD21, 2, batch_sharding(make_mesh(devices=jax.devices()[:1])))
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), raw, expected)
    for name, start in MOD21.slot_offset.items():
        codes = raw.tokens[:, start : start + MOD21[name].max_tokens]
        assert codes.max() < MOD21[name].vocab_size and codes.any()
    assert (raw.length > 0).all()
