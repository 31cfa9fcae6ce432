from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm4m import collectives


@pytest.mark.parametrize("rows", [collectives.FEW_ROWS, 300])
def test_lookup_clips_and_its_gradient_is_the_sum_over_lookups(rows):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(rows, 8)).astype(np.float32)
    index = rng.integers(0, rows + 20, (5, 7)).astype(np.int32)
    weight = rng.normal(size=(5, 7, 8)).astype(np.float32)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda t: (collectives.take_rows(t, index) * weight).sum(), has_aux=False)
    )(table)
    clipped = np.minimum(index, rows - 1)
    np.testing.assert_allclose(value, (table[clipped] * weight).sum(), rtol=1e-4)
    expected = np.zeros_like(table)
    np.add.at(expected, clipped, weight)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [collectives.FEW_ROWS, 300])
def test_lookups_of_bfloat16_tables_are_added_up_in_float32(rows):
    # 1000 equal terms: a sum in bfloat16 ends at 256.
    table, index = jnp.zeros((rows, 4), jnp.bfloat16), jnp.full((1000,), 3)
    gradient = jax.jit(jax.grad(lambda t: collectives.take_rows(t, index).astype(jnp.float32).sum()))(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[3].astype(np.float32), 1000.0)
    assert not gradient[4].any()


def test_nothing_happens_outside_of_a_mesh():
    x = jnp.arange(6.0)
    assert collectives.axis_size("tensor") == 1
    for same in (collectives.enter_split(x), collectives.leave_split(x), collectives.gather(x, "fsdp", 0)):
        assert same is x
