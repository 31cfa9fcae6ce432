"""Cross-attention of few queries, without keys and values of the context.

Every step on a grid encodes anew, so its keys and values serve once: 2 * S * D^2 multiplications a layer for a context
[S, D], 12 % of all that 4M-B needs for depth from RGB in 8 guided steps of 25 cells. Instead the queries go through the
projection of the keys, and what they gather of the context through that of the values: the same products in another
order, as multi-head latent attention does when it generates (DeepSeek-V2, 2024, section 2.1.2: weights that are
"absorbed").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fm4m.attention import Visibility, attention, dense
from fm4m.layers import Attention, DecoderLayer


class FewQueries(DecoderLayer):
    """A `DecoderLayer` that absorbs the projections of the context where that takes fewer multiplications."""

    def attend_context(self, x: jax.Array, context: jax.Array, cross: Visibility) -> jax.Array:
        """x [B, T, D], context [B, S, D], both normalised -> [B, T, D]."""
        module = self.cross_attention
        # A norm of the keys is not linear: it needs them one by one.
        if module.key_norm is not None or not fewer(x.shape[1], context.shape[1], x.shape[2], module.head_dim):
            return super().attend_context(x, context, cross)
        return attend(module, x, context, cross)


def fewer(queries: int, keys: int, dim: int, head_dim: int) -> bool:
    """Whether `attend` takes fewer multiplications than keys and values do.

    For a long context it does below ``dim / (heads - 1)`` queries, which is 70 for 4M-B.
    """
    projected = 2 * keys * dim * dim + 2 * queries * keys * dim
    absorbed = 2 * queries * dim * dim + 2 * queries * keys * dim * (dim // head_dim)
    return absorbed < projected


def attend(module: Attention, x: jax.Array, context: jax.Array, visibility: Visibility) -> jax.Array:
    """What ``module(x, context, visibility)`` gives, up to rounding: x [B, T, D], context [B, S, D] -> [B, T, D].

    A bias of the keys adds the same to all logits of a query, so it is left out; one of the values is added once.
    """

    def per_head(kernel: jax.Array) -> jax.Array:
        return kernel.astype(x.dtype).reshape(kernel.shape[0], -1, module.head_dim)

    width = context.shape[-1]
    query = module.queries(x)
    # The heads become queries of one head as wide as the context, which is its keys and values; its scale is another.
    scaled = (query.astype(jnp.float32) * (width / module.head_dim) ** 0.5).astype(x.dtype)
    heads = scaled.reshape(*x.shape[:2], -1, module.head_dim)
    absorbed = jnp.einsum("bthd,chd->bthc", heads, per_head(module.key.kernel[...]))
    seen = visibility._replace(
        query_group=jnp.repeat(visibility.query_group, heads.shape[2], axis=1),
        query_limit=jnp.repeat(visibility.query_limit, heads.shape[2], axis=1),
    )
    gathered = attention(absorbed.reshape(x.shape[0], -1, width), context, context, seen, num_heads=1)
    gathered = gathered.reshape(absorbed.shape)
    value = jnp.einsum("bthc,chd->bthd", gathered, per_head(module.value.kernel[...])).reshape(query.shape)
    if module.value.bias is not None:
        bias = module.value.bias[...].astype(x.dtype)
        value += jnp.where(dense(visibility).any(-1, keepdims=True), bias, jnp.zeros((), x.dtype))
    return module.out(value, joins=True)
