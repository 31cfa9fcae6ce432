"""Attention: who sees whom, and the implementations that compute it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fm4m.modalities import unknown_name

# "einsum" runs everywhere and is what the others are compared with. "pallas" is `fm4m.attention_tpu`, "cudnn" the
# flash attention of NVIDIA's library.
IMPLEMENTATIONS = ("einsum", "pallas", "cudnn")

# The kernels of "pallas" as plain jax operations: how tests run them without a TPU.
INTERPRETED = "pallas_interpret"

ANY_ORDER = jnp.iinfo(jnp.int32).max
CUDNN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
# What cuDNN takes on every GPU that has its flash attention; from Hopper on it takes 256.
CUDNN_HEAD_DIM = 128


class Visibility(NamedTuple):
    """Which keys a query sees, as numbers a token instead of an array of queries times keys.

    Query t sees key s if ``query_group[t] == key_group[s]`` and ``key_order[s] <= query_limit[t]``. A key whose group
    is negative is seen by nobody: invalid keys have group -1.

    Attributes:
      query_group: int32 [B, T], the group of keys that a query sees.
      query_limit: int32 [B, T], the last order that it sees.
      key_group: int32 [B, S].
      key_order: int32 [B, S].
    """

    query_group: jax.Array
    query_limit: jax.Array
    key_group: jax.Array
    key_order: jax.Array


def all_valid(valid: jax.Array, num_queries: int) -> Visibility:
    """Every one of ``num_queries`` queries sees every valid key; ``valid`` is bool [B, S]."""
    queries = (valid.shape[0], num_queries)
    return Visibility(
        query_group=jnp.zeros(queries, jnp.int32),
        query_limit=jnp.full(queries, ANY_ORDER, jnp.int32),
        key_group=jnp.where(valid, 0, -1).astype(jnp.int32),
        key_order=jnp.zeros(valid.shape, jnp.int32),
    )


def dense(visibility: Visibility) -> jax.Array:
    """bool [B, T, S]: the rule of `Visibility` written out."""
    group, order = visibility.key_group[:, None, :], visibility.key_order[:, None, :]
    same = (visibility.query_group[:, :, None] == group) & (group >= 0)
    return same & (order <= visibility.query_limit[:, :, None])


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    num_heads: int,
    implementation: str = "einsum",
) -> jax.Array:
    """Multi-head dot-product attention.

    Args:
      query: [B, T, num_heads * head_dim].
      key, value: [B, S, num_heads * head_dim].
      visibility: which keys each query sees.
      num_heads: number of heads.
      implementation: one of `IMPLEMENTATIONS`, or "pallas_interpret" to run the TPU kernels without a TPU.

    Returns:
      [B, T, num_heads * head_dim] in the dtype of ``value``, zeros for a query that sees no key. The softmax is
      float32. For `jax.checkpoint` the result has the name "attention".

    Raises KeyError for an unknown implementation, ValueError for shapes that do not belong together and for what an
    implementation cannot compute.
    """
    if implementation not in (*IMPLEMENTATIONS, INTERPRETED):
        raise KeyError(unknown_name(implementation, IMPLEMENTATIONS, "implementation of attention"))
    _check_shapes(query, key, value, visibility, num_heads)
    if implementation == "einsum":
        return checkpoint_name(_einsum(query, key, value, visibility, num_heads), "attention")
    if implementation == "cudnn":
        return checkpoint_name(_cudnn(query, key, value, visibility, num_heads), "attention")
    from fm4m import attention_tpu  # imports Pallas, a tenth of the start of a process that has no use for it

    queries, keys = tuple(visibility[:2]), tuple(visibility[2:])
    return attention_tpu.attention(query, key, value, queries, keys, num_heads, implementation == INTERPRETED)


def best_implementation(platform: str, head_dim: int, num_heads: int, dtype: jnp.dtype, num_tokens: int = 1024) -> str:
    """The fastest implementation that can compute this on a platform.

    Args:
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu", as JAX names them.
      head_dim: width of a head.
      num_heads: number of heads.
      dtype: of query, key and value.
      num_tokens: the larger number of tokens of the two sides.

    Raises KeyError for an unknown platform.
    """
    platforms = ("cpu", "gpu", "cuda", "rocm", "tpu")
    if platform not in platforms:
        raise KeyError(unknown_name(platform, platforms, "platform"))
    if platform == "tpu":
        from fm4m import attention_tpu

        if not attention_tpu.unsupported(num_tokens, num_tokens, head_dim, num_heads, dtype):
            return "pallas"
    if platform in ("gpu", "cuda") and not _cudnn_unsupported(head_dim, dtype):
        return "cudnn"
    return "einsum"


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, num_heads: int) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim != 3 or key.shape != value.shape or (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[-1]):
        raise ValueError(f"attention takes query [B, T, D], key [B, S, D] and value [B, S, D], not {shapes}")
    if query.shape[2] % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the width {query.shape[2]} of {shapes}")
    for name, array in visibility._asdict().items():
        expected = (query if name.startswith("query") else key).shape[:2]
        if array.shape != expected:
            raise ValueError(f"visibility's {name} must be {list(expected)} for {shapes}, not {list(array.shape)}")


def _einsum(query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, num_heads: int) -> jax.Array:
    head_dim = query.shape[-1] // num_heads
    seen = dense(visibility)

    def heads(x):
        return x.reshape(*x.shape[:2], num_heads, head_dim)

    # Scaling the query costs T * head_dim products instead of T * S, and rounds once, as the query itself was.
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    logits = jnp.einsum("bthd,bshd->bhts", heads(scaled), heads(key), preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    y = jnp.einsum("bhts,bshd->bthd", weights, heads(value)).reshape(query.shape)
    # A query that sees nothing has had the average of all values. The products before stay as they are for all others.
    return jnp.where(seen.any(-1, keepdims=True), y, jnp.zeros((), y.dtype))


# ---- cuDNN


def _cudnn_unsupported(head_dim: int, dtype: jnp.dtype) -> str:
    if jnp.dtype(dtype) not in CUDNN_DTYPES:
        return f"cuDNN's attention computes in bfloat16 or float16, not {jnp.dtype(dtype)}; use implementation 'einsum'"
    if head_dim % 8 or head_dim > CUDNN_HEAD_DIM:
        return (
            f"cuDNN's attention takes heads of a width that 8 divides, up to {CUDNN_HEAD_DIM}, not {head_dim}; use "
            "implementation 'einsum'"
        )
    return ""


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, num_heads: int, library: str = "cudnn"
) -> jax.Array:
    """``library`` is what `jax.nn.dot_product_attention` calls its implementation; it has the same call in XLA."""
    head_dim = query.shape[-1] // num_heads
    reason = _cudnn_unsupported(head_dim, query.dtype) if library == "cudnn" else ""
    if reason:
        raise ValueError(reason)
    tokens, keys = query.shape[1], key.shape[1]
    # A mask becomes a bias, and with a bias cuDNN has gradients only for even numbers of tokens.
    seen = jnp.pad(dense(visibility), ((0, 0), (0, tokens % 2), (0, keys % 2)))
    any_seen = seen.any(-1, keepdims=True)

    def heads(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0))).reshape(x.shape[0], -1, num_heads, head_dim)

    # A row without any visible key would divide by a sum of underflows: it sees everything, and its result is dropped,
    # which also makes its gradients zero.
    y = jax.nn.dot_product_attention(
        heads(query), heads(key), heads(value), mask=(seen | ~any_seen)[:, None], implementation=library
    )
    y = y.reshape(y.shape[0], y.shape[1], -1)
    return jnp.where(any_seen, y, jnp.zeros((), y.dtype))[:, :tokens].astype(value.dtype)
