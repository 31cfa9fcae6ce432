from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import MODALITIES, random_batch, without_tokens

from fm4m.loss import cross_entropy_sums, modality_weights, target_counts
from fm4m.modalities import ModalitySet

DIM = 16
OUTPUTS = [MODALITIES.index(name) for name in MODALITIES.outputs]


@pytest.fixture(scope="module")
def batch():
    return random_batch(3, 6, 8, 50)


def arrays(modalities=MODALITIES, dtype=jnp.float32):
    hidden = jax.random.normal(jax.random.key(0), (6, 50, DIM), dtype)
    return hidden, 0.3 * jax.random.normal(jax.random.key(1), (modalities.output_rows, DIM), jnp.float32)


def by_hand(hidden, head, batch, modalities):
    sums, counts = np.zeros((2, len(modalities)))
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    for b, i in zip(*np.nonzero(batch.decoder.valid), strict=True):
        m = int(batch.decoder.modality[b, i])
        start, stop = modalities.output_ranges[m]
        if start == stop:
            continue
        logits = head[start:stop] @ hidden[b, i]
        sums[m] += np.log(np.exp(logits).sum()) - logits[int(batch.target[b, i]) - start]
        counts[m] += 1
    return sums, counts


@pytest.mark.parametrize("method", ["dense", "blocked"])
def test_sums_and_counts_equal_a_loop_over_tokens(batch, method):
    hidden, head = arrays()
    sums, counts = jax.jit(lambda *a: cross_entropy_sums(*a, MODALITIES, method))(hidden, head, batch)
    expected = by_hand(hidden, head, batch, MODALITIES)
    np.testing.assert_allclose(sums, expected[0], rtol=1e-5)
    np.testing.assert_array_equal(counts, expected[1])
    assert counts[MODALITIES.index("absent")] == 0 and (counts[jnp.array(OUTPUTS[:3])] > 0).all()


@pytest.mark.parametrize("block_size", [1, 8, 64, 1024, None])
@pytest.mark.parametrize("loss_type", ["mod", "token"])
def test_blocked_equals_dense_in_value_and_gradient(batch, block_size, loss_type):
    hidden, head = arrays()

    def loss(hidden, head, method):
        size = None if method == "dense" else block_size
        sums, counts = cross_entropy_sums(hidden, head, batch, MODALITIES, method, block_size=size)
        return (modality_weights(counts, MODALITIES, loss_type) * sums).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    dense, blocked = (jax.jit(both, static_argnums=2)(hidden, head, m) for m in ("dense", "blocked"))
    np.testing.assert_allclose(blocked[0], dense[0], rtol=1e-6)
    for a, b in zip(blocked[1], dense[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    assert not np.asarray(blocked[1][0])[~np.asarray(batch.decoder.valid)].any()
    start = MODALITIES.output_offset["absent"]
    assert not np.asarray(blocked[1][1])[start:].any()
    padding = slice(MODALITIES.output_ranges[1, 1], MODALITIES.output_offset["caption"])
    assert not np.asarray(blocked[1][1])[padding].any()


def test_each_sum_has_its_own_gradient(batch):
    """The Jacobian of all sums, so that a cotangent sent to the wrong modality shows."""
    hidden, head = arrays()

    def sums(hidden, head, method):
        return cross_entropy_sums(hidden, head, batch, MODALITIES, method)[0]

    jacobian = jax.jit(jax.jacrev(sums, argnums=(0, 1)), static_argnums=2)
    jacobians = [jacobian(hidden, head, m) for m in ("dense", "blocked")]
    for a, b in zip(*jacobians, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16(batch):
    hidden, head = arrays(dtype=jnp.bfloat16)

    def loss(hidden, head, method):
        return cross_entropy_sums(hidden, head, batch, MODALITIES, method)[0].sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    results = [jax.jit(both, static_argnums=2)(hidden, head, m) for m in ("dense", "blocked")]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-3)
    assert results[1][1][0].dtype == jnp.bfloat16 and results[1][1][1].dtype == jnp.float32
    np.testing.assert_allclose(results[0][1][1], results[1][1][1], atol=0.05)


def test_modalities_that_are_not_outputs_carry_no_loss(batch):
    fewer = ModalitySet(MODALITIES.modalities, outputs=("caption",))
    hidden, head = arrays(fewer)
    start, vocab = MODALITIES.output_offset["caption"], 300
    target = jnp.clip(batch.target - start, 0, vocab - 1)
    batch = dataclasses.replace(batch, target=target)
    for method in ("dense", "blocked"):
        sums, counts = cross_entropy_sums(hidden, head, batch, fewer, method)
        caption = np.arange(len(fewer)) == fewer.index("caption")
        np.testing.assert_array_equal(np.asarray(sums) > 0, caption)
        np.testing.assert_array_equal(np.asarray(counts) > 0, caption)


@pytest.mark.parametrize("method", ["dense", "blocked"])
def test_a_batch_of_padding_has_zero_loss_and_zero_gradient(batch, method):
    hidden, head = arrays()

    def loss(hidden, head):
        sums, counts = cross_entropy_sums(hidden, head, without_tokens(batch), MODALITIES, method)
        return (modality_weights(counts, MODALITIES) * sums).sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert value == 0 and not any(np.asarray(g).any() for g in gradients)


def test_weights():
    counts = jnp.zeros(len(MODALITIES)).at[jnp.array(OUTPUTS[:2])].set(jnp.array([10.0, 30.0]))
    mod = modality_weights(counts, MODALITIES, "mod")
    # Four outputs, two of them without targets.
    np.testing.assert_allclose(mod[jnp.array(OUTPUTS)], [1 / 40, 1 / 120, 0, 0], rtol=1e-6)
    token = modality_weights(counts, MODALITIES, "token")
    np.testing.assert_allclose(token[jnp.array(OUTPUTS)], [1 / 40, 1 / 40, 0, 0], rtol=1e-6)
    with pytest.raises(KeyError, match="Did you mean 'token'"):
        modality_weights(counts, MODALITIES, "tokens")


def test_micro_batches_add_up(batch):
    hidden, head = arrays()
    sums_and_counts = jax.jit(lambda hidden, batch: cross_entropy_sums(hidden, head, batch, MODALITIES))
    whole = sums_and_counts(hidden, batch)
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        micro = jax.tree.map(lambda x, part=part: x[part], batch)
        parts.append(sums_and_counts(hidden[part], micro))
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-5)
    np.testing.assert_array_equal(parts[0][1] + parts[1][1], whole[1])
    np.testing.assert_array_equal(target_counts(batch, MODALITIES), whole[1])


def test_wrong_arguments(batch):
    hidden, head = arrays()
    with pytest.raises(KeyError, match="Did you mean 'blocked'"):
        cross_entropy_sums(hidden, head, batch, MODALITIES, "block")
    with pytest.raises(ValueError, match="go together"):
        cross_entropy_sums(hidden, head, batch, MODALITIES, batch_axes=("data",))


def test_eight_devices_compute_what_one_does():
    here = pathlib.Path(__file__).resolve().parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    result = subprocess.run([sys.executable, here / "eight_devices.py"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["Auto", "Explicit"]
