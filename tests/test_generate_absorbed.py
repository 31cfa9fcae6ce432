"""Cross-attention with absorbed projections: the same numbers as with keys and values, for fewer multiplications."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CONFIG

from fm4m.attention import all_valid
from fm4m.generate import absorbed
from fm4m.layers import Attention, DecoderLayer, apply_module, init_module

BATCH, DIM = 3, CONFIG.dim
HEAD_DIM = CONFIG.head_dim


def drawn(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape, jnp.float32)


def module(kind=Attention, **changes):
    """A module all of whose parameters are drawn, norms and biases too."""
    config = dataclasses.replace(CONFIG, **changes)
    params = init_module(kind, (config,), jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    leaves = [x + 0.3 * drawn(*x.shape, key=i) for i, x in enumerate(leaves)]
    return apply_module(kind, (config,), jax.tree.unflatten(tree, leaves))


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (4, 9), (9, 4)])
def test_it_is_the_attention_of_the_module(biases, queries, keys):
    m = module(qkv_bias=biases, proj_bias=biases)
    x, context = drawn(BATCH, queries, DIM), drawn(BATCH, keys, DIM, key=7)
    # All keys, some of them, none.
    valid = jnp.arange(keys) < jnp.array([[keys], [keys // 2], [0]])
    visibility = all_valid(valid, queries)
    np.testing.assert_allclose(
        absorbed.attend(m, x, context, visibility), m(x, context, visibility), rtol=1e-4, atol=1e-4
    )


def test_half_precision_rounds_as_much_as_the_module_does():
    m, x, context = module(), drawn(BATCH, 4, DIM), drawn(BATCH, 40, DIM, key=7)
    visibility = all_valid(jnp.ones((BATCH, 40), bool), 4)
    exact = m(x, context, visibility)
    halves = x.astype(jnp.bfloat16), context.astype(jnp.bfloat16), visibility
    theirs, ours = m(*halves), absorbed.attend(m, *halves)
    assert ours.dtype == jnp.bfloat16
    error, usual = (float(jnp.abs(y.astype(jnp.float32) - exact).mean()) for y in (ours, theirs))
    assert error < 1.5 * usual


@pytest.mark.parametrize("keys", [30, 300])
def test_fewer_is_what_the_compiler_counts(keys):
    """The switch lies where the compiled programs take equally many operations, within a query or two."""
    m, context = module(), drawn(1, keys, DIM)

    def saved(queries):
        x, visibility = drawn(1, queries, DIM), all_valid(jnp.ones((1, keys), bool), queries)
        plain = flops(lambda x, c: m.out(m(x, c, visibility)), x, context)
        return plain - flops(lambda x, c: m.out(absorbed.attend(m, x, c, visibility)), x, context)

    last = max(q for q in range(1, keys) if absorbed.fewer(q, keys, DIM, HEAD_DIM))
    assert 1 < last < DIM // (DIM // HEAD_DIM - 1)
    assert saved(max(last - 2, 1)) > 0 > saved(last + 3)


@pytest.mark.parametrize(
    ("changes", "queries", "absorbs"), [({}, 1, True), ({}, 40, False), ({"qk_norm": True}, 1, False)]
)
def test_a_layer_absorbs_where_that_is_fewer_and_there_is_no_norm_of_keys(changes, queries, absorbs):
    plain, few = (module(kind, **changes) for kind in (DecoderLayer, absorbed.FewQueries))
    x, context = drawn(BATCH, queries, DIM), drawn(BATCH, 40, DIM, key=7)
    everything = all_valid(jnp.ones((BATCH, queries), bool), queries), all_valid(jnp.ones((BATCH, 40), bool), queries)
    np.testing.assert_allclose(few(x, context, *everything), plain(x, context, *everything), rtol=1e-4, atol=1e-4)
    count = [flops(lambda x, c, m=m: m(x, c, *everything), x, context) for m in (plain, few)]
    assert (count[1] < count[0]) == absorbs
