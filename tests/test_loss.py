from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_model import MODALITIES, random_batch, without_tokens

from fm4m import loss as loss_lib
from fm4m import recipes
from fm4m.batch import PackedBatch, RawBatch, Tokens
from fm4m.loss import block_lengths, cross_entropy_sums, modality_weights, multiplied_rows, target_counts, target_slots
from fm4m.masking import mask_batch
from fm4m.modalities import ModalitySet

DIM = 16
# Masking takes long to compile: one number of targets for each set.
SLOW_MIX = pytest.param("mod21", 256, marks=pytest.mark.slow)
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


@pytest.mark.parametrize(
    "options", [{"block_size": 1}, {"block_size": 64}, {"slots": {"depth": 20, "caption": 128}}, {}], ids=str
)
def test_blocked_equals_dense_in_value_and_gradient(batch, options):
    hidden, head = arrays()

    def loss(hidden, head, method):
        options_of = {} if method == "dense" else options
        sums, counts = cross_entropy_sums(hidden, head, batch, MODALITIES, method, **options_of)
        return (modality_weights(counts, MODALITIES) * sums).sum()

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
        sums, counts = jax.jit(lambda *a, m=method: cross_entropy_sums(*a, fewer, m))(hidden, head, batch)
        caption = np.arange(len(fewer)) == fewer.index("caption")
        np.testing.assert_array_equal(np.asarray(sums) > 0, caption)
        np.testing.assert_array_equal(np.asarray(counts) > 0, caption)


@pytest.mark.parametrize("method", ["dense", "blocked"])
def test_a_batch_of_padding_has_zero_loss_and_zero_gradient(batch, method):
    hidden, head = arrays()

    def loss(hidden, head):
        sums, counts = cross_entropy_sums(hidden, head, without_tokens(batch), MODALITIES, method)
        return (modality_weights(counts, MODALITIES) * sums).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
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
    with pytest.raises(KeyError, match="Did you mean 'depth'"):
        cross_entropy_sums(hidden, head, batch, MODALITIES, slots={"dept": 128})


# ---- slots and loops

SHAPE = (4, 48)
SLOTS = {"depth": 24, "caption": 40, "global": 0, "absent": 8}
LENGTHS = (8, 16, 32)


def batch_of_mix(counts, seed):
    """A batch of SHAPE with so many targets of each output, in random places."""
    rng = np.random.default_rng(seed)
    modality, target = np.zeros((2, *SHAPE), np.int32)
    valid = np.zeros(SHAPE, bool)
    places = rng.permutation(modality.size)
    for index, own in zip(OUTPUTS, np.split(places, np.cumsum(counts)), strict=False):
        modality.flat[own], valid.flat[own] = index, True
        target.flat[own] = rng.integers(*MODALITIES.output_ranges[index], len(own))
    zeros = jnp.zeros(SHAPE, jnp.int32)
    tokens = Tokens(zeros, jnp.asarray(modality), zeros, jnp.asarray(valid))
    return PackedBatch(tokens, tokens, jnp.asarray(target), {})


@pytest.fixture(scope="module", params=[LENGTHS, (16,)], ids=["three lengths", "one length"])
def both_methods(request):
    """Jitted (hidden, head, batch, weights) -> (sums, gradients), dense and blocked with SLOTS and in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_lib, "block_lengths", lambda *_: request.param)
        patch.setattr(loss_lib, "LOGITS_BYTES", 16 * 384 * 4)  # 40 slots of caption make parts of 16, 16 and 8

        def loss(hidden, head, batch, weights, method):
            options = {} if method == "dense" else {"slots": SLOTS}
            sums, _ = cross_entropy_sums(hidden, head, batch, MODALITIES, method, **options)
            return (weights * sums).sum(), sums

        both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=4)
        args = *example_arrays(), batch_of_mix([1, 1, 1, 1], 0), jnp.ones(len(MODALITIES))
        for method in ("dense", "blocked"):
            both(*args, method)
        yield both


def example_arrays():
    hidden = jax.random.normal(jax.random.key(2), (*SHAPE, DIM))
    return hidden, 0.3 * jax.random.normal(jax.random.key(3), (MODALITIES.output_rows, DIM))


@st.composite
def mixes(draw):
    left, counts = SHAPE[0] * SHAPE[1], []
    for name in MODALITIES.outputs:
        near = [SLOTS[name] + extra for extra in (-1, 0, 1, 4, 5, 31, 32, 33)]
        count = draw(st.one_of(st.integers(0, left), st.sampled_from([0, left, *near])))
        counts.append(max(0, min(count, left)))
        left -= counts[-1]
    return tuple(counts)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(counts=mixes(), seed=st.integers(0, 99))
@example(counts=(0, 0, 0, 0), seed=0)
@example(counts=(192, 0, 0, 0), seed=0)
@example(counts=(0, 0, 192, 0), seed=0)
@example(counts=(24, 40, 0, 8), seed=0)
@example(counts=(25, 41, 1, 9), seed=0)
@example(counts=(24 + 64, 40 + 64, 0, 0), seed=0)
def test_every_mix_is_exact(both_methods, counts, seed):
    args = *example_arrays(), batch_of_mix(counts, seed), jnp.arange(1.0, 1.0 + len(MODALITIES))
    dense, blocked = (both_methods(*args, method) for method in ("dense", "blocked"))
    np.testing.assert_allclose(blocked[1], dense[1], rtol=1e-5)
    for a, b in zip(blocked[0], dense[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    assert blocked[1].sum() > 0 or not any(counts)


def test_multiplied_rows():
    rows = multiplied_rows([[24, 40, 0, 8], [25, 44, 3, 0], [56, 45, 37, 9]], np.array(list(SLOTS.values())), LENGTHS)
    np.testing.assert_array_equal(rows, [[24, 40, 0, 8], [32, 48, 8, 8], [56, 48, 40, 16]])
    assert block_lengths(16384) == (128, 256, 512) and block_lengths(8191) == (128,) and block_lengths(10) == (64,)
    assert block_lengths(16384, 32) == (32,)
    assert target_slots({"a": 3.99, "b": 4.0, "c": 0.5}, 64) == {"a": 128, "b": 256, "c": 0}


@pytest.mark.parametrize("name, targets", [("mod7", 128), SLOW_MIX])
def test_products_cost_at_most_15_percent_more_than_the_targets_own(name, targets):
    modalities, masking = recipes.RELEASED[name]
    counts = drawn_counts(modalities, dataclasses.replace(masking(), num_inputs=targets, num_targets=targets))
    vocab = np.array([modalities[output].vocab_size for output in modalities.outputs])
    padded = np.array([loss_lib.round_up(v) for v in vocab])
    for samples in (64, 128) if targets == 128 else (64,):
        expected = dict(zip(modalities.outputs, counts.mean(0), strict=True))
        slots = np.array(list(target_slots(expected, samples).values()))
        rng = np.random.default_rng(0)
        on_device = counts[rng.integers(0, len(counts), (200, samples))].sum(1)
        rows = multiplied_rows(on_device, slots, block_lengths(samples * targets))
        ratio = (rows @ padded).mean() / (on_device @ vocab).mean()
        assert 1 < ratio <= 1.15, (samples, ratio)


def drawn_counts(modalities, masking, samples=1024, at_once=128):
    """int [samples, outputs]: targets of each output, with full grids and texts of uniformly drawn lengths."""

    # Many runs of one program: LLVM's optimisation costs 2 s and saves 4 s of every run.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def count(length, position):
        task, tokens = jnp.zeros(at_once, jnp.uint8), jnp.zeros((at_once, modalities.num_slots), jnp.uint16)
        dense = {}
        for name in modalities.continuous:
            m = modalities[name]
            sides = (*(side * m.patch_size for side in m.grid), m.channels) if m.grid else (m.max_tokens, m.channels)
            dense[name] = jnp.zeros((at_once, *sides), jnp.uint8 if m.grid else jnp.float16)
        raw = RawBatch(tokens, length, task, dense)
        decoder = mask_batch(raw, masking, modalities, ("any",), jax.random.key(0), position).decoder
        outputs = jnp.array([modalities.index(name) for name in modalities.outputs])
        return ((decoder.modality[..., None] == outputs) & decoder.valid[..., None]).sum(1)

    rng, counts = np.random.default_rng(1), []
    longest = np.array([m.max_tokens for m in modalities.modalities])
    grid = np.array([m.grid is not None for m in modalities.modalities])
    for first in range(0, samples, at_once):
        length = np.where(grid, longest, rng.integers(1, longest + 1, (at_once, len(longest)))).astype(np.int16)
        counts.append(np.asarray(count(length, first + np.arange(at_once))))
    return np.concatenate(counts)


def largest_intermediate(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            sizes += [largest_intermediate(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


def test_no_logits_of_all_slots():
    """Nothing is as large as the logits of all slots with one head: at most those of one head's slots or block."""
    hidden = jnp.zeros((32, 64, DIM))
    head = jnp.zeros((MODALITIES.output_rows, DIM))
    batch = random_batch(0, 32, 4, 64)
    slots = {"depth": 512, "caption": 640, "global": 512}

    def loss(hidden, head, method):
        options = {} if method == "dense" else {"slots": slots}
        return cross_entropy_sums(hidden, head, batch, MODALITIES, method, **options)[0].sum()

    dense, blocked = (
        largest_intermediate(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(hidden, head, m).jaxpr)
        for m in ("dense", "blocked")
    )
    assert dense >= 2048 * 300 and blocked == 640 * 384
