"""Attention on TPU: Pallas kernels for the forward and the backward pass, 8 to 1,024 tokens on either side.

One grid step takes a few samples and one block of 128 lanes (two heads of width 64) in the layout [batch, tokens, dim],
so nothing is laid out anew, and keeps whole rows in VMEM. What shapes the code, in VLIW bundles of TPU v4 for a sample
and a lane block at 256 x 256 tokens, bfloat16:

* Logits are held transposed, [keys, queries]: maximum, sum and normalisation of a query are then [1, queries] rows, 2
  registers instead of 32. The projections' side is transposed instead, which is 128 wide.
* A matrix unit takes 16 cycles for 16 rows and 8 to load 16 rows of weights, so products of 64 rows with a [keys,
  queries] matrix as the weights waste nothing; only the two products over one head's 64 lanes leave half the unit idle.
  The bound of the matrix units is 416 bundles forward and 896 backward.
* The bundles are those of one instruction stream that waits for its results: several samples a step, and stages issued
  so that the next product stands before the softmax of the one before, fill the gaps (forward 1,060 -> 756, backward
  1,590 -> 1,236).
* The rule of visibility becomes an additive float32 bias once a sample (269 bundles), in VMEM, and all lane blocks of
  the sample reuse it.
* The backward pass reads the forward pass's log-sum-exp; taking maximum and sum again costs 22 % more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
HEAD_DIMS = (32, 64, 128)
MAX_TOKENS = 1024
SUBLANES = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float32): 8}

# A hidden key's logit; the maximum of a query that sees nothing is raised to FLOOR, which makes its weights 0.
HIDDEN, FLOOR = -1e30, -1e29
TINY = 1e-30
LOG2_E = math.log2(math.e)

# Samples a grid step: as many as keep their logits within this many elements, and at most 8.
STEP_LOGITS = 4 * 256 * 256
STEP_SAMPLES = 8

NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_rule: tuple[jax.Array, jax.Array],
    key_rule: tuple[jax.Array, jax.Array],
    num_heads: int,
    interpret: bool = False,
) -> jax.Array:
    """Multi-head attention by the kernels; `fm4m.attention.attention` is the door to it and checks shapes.

    Args:
      query: [B, T, num_heads * head_dim], bfloat16 or float32; the softmax is float32. A TPU multiplies float32 as
        bfloat16 unless told otherwise, here as in XLA's products.
      key, value: [B, S, num_heads * head_dim] in the dtype of ``query``.
      query_rule: int32 [B, T] twice, the group whose keys a query sees and the last order it sees.
      key_rule: int32 [B, S] twice, the group of a key (negative: nobody sees it) and its order.
      num_heads: number of heads; ``num_heads * head_dim`` is a multiple of 128.
      interpret: run as plain jax operations, on any device. For tests.

    Returns:
      [B, T, num_heads * head_dim] in the dtype of ``query``; zeros where a query sees no key. Kept for the backward
      pass under the name "attention", with 2 / head_dim of its size in float32 beside it.

    Raises ValueError for what `unsupported` names.
    """
    head_dim = query.shape[-1] // num_heads
    reason = unsupported(query.shape[1], key.shape[1], head_dim, num_heads, query.dtype)
    if reason:
        raise ValueError(reason)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    tokens, rows = query.shape[1], SUBLANES[query.dtype]
    more, more_keys = -tokens % rows, -key.shape[1] % rows
    query_rules = _rows(jnp.where(query_rule[0] < 0, -2, query_rule[0]), query_rule[1], more, -2)
    key_rules = _rows(jnp.where(key_rule[0] < 0, -1, key_rule[0]), key_rule[1], more_keys, -1)
    query, key, value = (_pad(x, n) for x, n in ((query, more), (key, more_keys), (value, more_keys)))
    return _attention(query, key, value, query_rules, key_rules, head_dim, interpret)[:, :tokens]


def unsupported(num_queries: int, num_keys: int, head_dim: int, num_heads: int, dtype: jnp.dtype) -> str:
    """Why the kernels cannot compute this, as a sentence; "" when they can."""
    if head_dim not in HEAD_DIMS:
        return f"the TPU attention kernel takes heads of width {HEAD_DIMS}, not {head_dim}; use implementation 'einsum'"
    if num_heads * head_dim % LANES:
        return (
            f"the TPU attention kernel takes whole blocks of {LANES} lanes: {num_heads} heads of width {head_dim} are "
            f"{num_heads * head_dim} lanes; change the number of heads or use implementation 'einsum'"
        )
    if jnp.dtype(dtype) not in SUBLANES:
        return f"the TPU attention kernel computes in {' or '.join(map(str, SUBLANES))}, not {jnp.dtype(dtype)}"
    if max(num_queries, num_keys) > MAX_TOKENS:
        return (
            f"the TPU attention kernel holds at most {MAX_TOKENS} tokens of a side in memory, not {num_queries} "
            f"queries and {num_keys} keys; use implementation 'einsum'"
        )
    return ""


def step_samples(batch: int, num_queries: int, num_keys: int) -> int:
    """Samples of one grid step. Both cores of a v4 or v5p chip get the same number of steps where that is possible."""
    most = min(STEP_SAMPLES, STEP_LOGITS // (num_queries * num_keys))
    return next((n for n in (8, 4, 2) if n <= most and batch % (2 * n) == 0), 1)


def _pad(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0))) if rows else x


def _rows(group: jax.Array, order: jax.Array, more: int, fill: int) -> jax.Array:
    """int32 [B, 8, N]: group and order as the first two of 8 rows, the smallest tile that can be transposed."""
    group = jnp.pad(group.astype(jnp.int32), ((0, 0), (0, more)), constant_values=fill)
    order = jnp.pad(order.astype(jnp.int32), ((0, 0), (0, more)))
    return jnp.pad(jnp.stack([group, order], 1), ((0, 0), (0, 6), (0, 0)))


# ---- differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(query, key, value, query_rules, key_rules, head_dim, interpret):
    return _forward(query, key, value, query_rules, key_rules, head_dim, interpret)[0]


def _forward(query, key, value, query_rules, key_rules, head_dim, interpret):
    batch, tokens, dim = query.shape
    sums = jax.ShapeDtypeStruct((batch, dim // LANES, LANES // head_dim, tokens), jnp.float32)
    inputs = (query, key, value, query_rules, key_rules)
    outputs = (jax.ShapeDtypeStruct(query.shape, query.dtype), sums)
    out, sums = _call(_forward_kernel, "attention_forward", 2, head_dim, interpret, inputs, outputs)
    # Named here and not by the caller: a name outside would be put on a copy, and the kernel run again for the sums.
    out, sums = checkpoint_name(out, "attention"), checkpoint_name(sums, "attention")
    return out, (query, key, value, query_rules, key_rules, out, sums)


def _backward(head_dim, interpret, residuals, gradient):
    query, key, value, query_rules, key_rules, out, sums = residuals
    inputs = (query, key, value, query_rules, key_rules, out, gradient.astype(query.dtype), sums)
    outputs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
    gradients = _call(_backward_kernel, "attention_backward", 5, head_dim, interpret, inputs, outputs)
    return (*gradients, None, None)


_attention.defvjp(_forward, _backward)


# Compiled once for all layers of a model that call it: unrolled, they would each trace and lower their kernels.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 6))
def _call(
    kernel: Callable, name: str, products: int, head_dim: int, interpret: bool, inputs: tuple, outputs: tuple
) -> tuple[jax.Array, ...]:
    """Runs a kernel over (samples, lane blocks). ``products``: its matrix products of T x S x head_dim a head."""
    (batch, tokens, dim), keys = inputs[0].shape, inputs[1].shape[1]
    samples = step_samples(batch, tokens, keys)
    # One buffer a window where two do not fit beside the logits: the next block is then not fetched ahead.
    large = tokens * keys * inputs[0].dtype.itemsize > 2 * 1024 * 1024
    block = functools.partial(pl.BlockSpec, pipeline_mode=pl.Buffered(1) if large else None)

    def window(x) -> pl.BlockSpec:
        if x.ndim == 4:  # log-sum-exp [B, lane blocks, heads of a block, T]
            return block((samples, None, *x.shape[2:]), lambda b, j: (b, j, 0, 0))
        if x.dtype == jnp.int32:
            return block((samples, *x.shape[1:]), lambda b, j: (b, 0, 0))
        return block((samples, x.shape[1], LANES), lambda b, j: (b, 0, j))

    cost = pl.CostEstimate(
        flops=2 * products * batch * tokens * keys * dim,
        transcendentals=batch * (dim // head_dim) * tokens * keys,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *outputs)),
    )
    return pl.pallas_call(
        functools.partial(kernel, head_dim),
        grid=(batch // samples, dim // LANES),
        in_specs=[window(x) for x in inputs],
        out_specs=[window(x) for x in outputs],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((samples, keys, tokens), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*inputs)


# ---- kernels


def _forward_kernel(head_dim, query, key, value, query_rules, key_rules, out, sums, bias):
    """out = softmax(query @ key.T + bias) @ value of a lane block; sums: log2 of the softmax's denominators."""
    _set_bias(query_rules, key_rules, bias)
    samples, tokens, _ = query.shape
    heads, dtype = _head_masks(head_dim), query.dtype
    ones = jnp.ones((SUBLANES[dtype], key.shape[1]), dtype)

    def head(i: int, tile: slice, a: int, scaled: jax.Array, value_t: jax.Array, outs: list) -> Iterator[None]:
        logits = _dot(key[i], jnp.where(heads[a], scaled, 0), NT) + bias[i, :, tile]
        largest = jnp.maximum(logits.max(0, keepdims=True), FLOOR)
        yield
        weights = jnp.exp2(logits - largest).astype(dtype)
        yield
        # The rows of ones give the sum of the rounded weights, which the matrix unit adds up in float32.
        both = jnp.concatenate([value_t[_head_rows(a, head_dim)], ones])
        both = _dot(both, weights, NN)
        log_sum = jnp.log2(jnp.maximum(both[head_dim : head_dim + 1], TINY))
        outs.append(both[:head_dim] * jnp.exp2(-log_sum))
        sums[i, a : a + 1, tile] = largest + log_sum
        yield
        if len(outs) == len(heads):
            out[i, tile] = jnp.concatenate(outs).astype(dtype).T

    def stages() -> Iterator[Iterator[None]]:
        for i in range(samples):
            value_t = value[i].T
            for tile in _tiles(tokens, 256 if key.shape[1] * dtype.itemsize <= 2048 else 128):
                scaled, outs = _scaled(query[i, tile], head_dim), []
                for a in range(len(heads)):
                    yield head(i, tile, a, scaled, value_t, outs)

    _staggered(stages())


def _backward_kernel(
    head_dim, query, key, value, query_rules, key_rules, out, gradient, sums, d_query, d_key, d_value, bias
):
    """The gradients of a lane block's query, key and value from the gradient of its output."""
    _set_bias(query_rules, key_rules, bias)
    samples, tokens, _ = query.shape
    heads, dtype = _head_masks(head_dim), query.dtype
    scale = head_dim**-0.5

    def head(i: int, tile: slice, a: int, sides: tuple, d_queries: list, d_keys: list, d_values: list):
        scaled, query_t, gradient_t, key_t, means = sides
        rows = _head_rows(a, head_dim)
        yield
        logits = _dot(key[i], jnp.where(heads[a], scaled, 0), NT)
        d_weights = _dot(value[i], jnp.where(heads[a], gradient[i, tile], 0), NT)
        yield
        weights = jnp.exp2(logits + bias[i, :, tile] - sums[i, a : a + 1, tile])
        d_logits = (weights * (d_weights - means[rows].sum(0, keepdims=True))).astype(dtype)
        weights = weights.astype(dtype)
        yield
        d_values[a] += _dot(gradient_t[rows], weights, NT)
        d_keys[a] += _dot(query_t[rows], d_logits, NT)
        d_queries.append(_dot(key_t[rows], d_logits, NN))
        yield
        if len(d_queries) == len(heads):
            d_query[i, tile] = (jnp.concatenate(d_queries) * scale).astype(dtype).T
            if tile.stop == tokens:
                d_key[i] = (jnp.concatenate(d_keys) * scale).astype(dtype).T
                d_value[i] = jnp.concatenate(d_values).astype(dtype).T

    def stages() -> Iterator[Iterator[None]]:
        for i in range(samples):
            key_t = key[i].T
            d_keys, d_values = [0.0] * len(heads), [0.0] * len(heads)
            # At 1,024 keys, tiles of 256 queries no longer fit the 16 MiB of VMEM that v4 has.
            for tile in _tiles(tokens, 256 if key.shape[1] * dtype.itemsize <= 1024 else 128):
                g, d_queries = gradient[i, tile], []
                means = (out[i, tile].astype(jnp.float32) * g.astype(jnp.float32)).T
                sides = _scaled(query[i, tile], head_dim), query[i, tile].T, g.T, key_t, means
                for a in range(len(heads)):
                    yield head(i, tile, a, sides, d_queries, d_keys, d_values)

    _staggered(stages())


def _set_bias(query_rules, key_rules, bias) -> None:
    """Writes float32 [samples, keys, queries], 0 where the query sees the key, at a sample's first lane block."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        for i in range(bias.shape[0]):
            columns = key_rules[i].T
            seen = (columns[:, :1] == query_rules[i, :1]) & (columns[:, 1:2] <= query_rules[i, 1:2])
            bias[i] = jnp.where(seen, 0.0, HIDDEN)


def _staggered(units: Iterator[Iterator[None]]) -> None:
    """Emits stage k of a unit after stage k + 1 of the unit before: products first, then what waits for products."""
    running: list[Iterator[None]] = []
    done = object()
    while True:
        unit = next(units, None)
        if unit is None and not running:
            return
        if unit is not None:
            running.insert(0, unit)
        running = [u for u in running if next(u, done) is not done]


def _tiles(tokens: int, size: int) -> list[slice]:
    """Slices of ``size`` tokens; what is left and fills no block of lanes goes to the last one."""
    count = max(1, tokens // size + (tokens % size > LANES))
    return [slice(k * size, tokens if k == count - 1 else (k + 1) * size) for k in range(count)]


def _head_masks(head_dim: int) -> list[jax.Array]:
    """bool [1, 128] for each head of a lane block."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return [(lane >= start) & (lane < start + head_dim) for start in range(0, LANES, head_dim)]


def _head_rows(head: int, head_dim: int) -> slice:
    return slice(head * head_dim, (head + 1) * head_dim)


def _scaled(query: jax.Array, head_dim: int) -> jax.Array:
    """The query times head_dim^-0.5 log2(e): exp2 costs one instruction where exp costs two."""
    return (query.astype(jnp.float32) * (head_dim**-0.5 * LOG2_E)).astype(query.dtype)


def _dot(a: jax.Array, b: jax.Array, dimensions: tuple) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
