"""The transformer's layers: flax.nnx modules that hold parameters and static sizes, nothing else.

Every weight is a matrix stored (in, out), with query, key, value, gate and up projections separate: on TPU v4 a small
axis in the middle of a weight, or a packed weight that is split afterwards, costs relayout copies (12-30 % of a layer).
Activations keep the layout [batch, tokens, dim] throughout.

The layers are written for one device. Where matrices are split over the mesh axis ``tensor``, each device holds some of
the heads and of the hidden units, and `fm4m.collectives` says where that begins and ends.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fm4m.attention import Visibility, attention
from fm4m.collectives import enter_split, leave_split

if TYPE_CHECKING:
    from fm4m.sizes import ModelConfig

NORM_EPSILON = 1e-6

# What is kept for the backward pass, by name; everything else is computed again. The names are those given to
# `checkpoint_name` below and, for the output of attention, by `fm4m.attention`. From the most memory to the least:
# "none" keeps everything, "dots" the results of matrix multiplications with weights, "projections" those of the
# attention blocks, "residual" the residual stream alone.
_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attention")
    ),
    "projections": _policies.save_only_these_names("projection", "attention", "residual"),
    "residual": _policies.save_only_these_names("attention", "residual"),
    "full": _policies.nothing_saveable,
}

# attention_init="aligned": how much larger query and key kernels start, and how much smaller the projection of the
# encoder's output into the decoder. See `fm4m.sizes.ModelConfig`.
ALIGNED_GAIN = 3.0
ALIGNED_CONTEXT = 0.3

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class Linear(nnx.Module):
    """``x @ kernel (+ bias)`` in the dtype of ``x``; Xavier-uniform kernel [in, out], zero bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.nn.initializers.xavier_uniform()(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array, *, joins: bool = False) -> jax.Array:
        """x [..., inputs] -> [..., outputs]; ``joins``: the inputs are split over devices, the outputs are whole."""
        y = x @ self.kernel[...].astype(x.dtype)
        if joins:
            y = leave_split(y)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32, with the mean subtracted and epsilon 1e-6."""

    def __init__(self, dim: int, bias: bool, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array, *, split: bool = False) -> jax.Array:
        """x [..., dim]; ``split``: other devices normalise other parts of the same tokens (their heads)."""
        enter = enter_split if split else lambda weight: weight
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + NORM_EPSILON) * enter(self.scale[...])
        if self.bias is not None:
            y = y + enter(self.bias[...])
        # Without the barrier XLA normalises again in the prologue of every matrix multiplication that reads the result:
        # with it an XL step goes from 80.0 to 83.2 % of its bound on TPU v4.
        return jax.lax.optimization_barrier(y.astype(x.dtype))


class Attention(nnx.Module):
    """Attention of a sequence to itself or to a context, with an optional per-head norm of queries and keys.

    The norm (Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters", section 2) has one scale of
    width head_dim that all heads share.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.head_dim, self.implementation = config.head_dim, config.attention
        self.query = Linear(config.dim, config.dim, config.qkv_bias, rngs=rngs)
        self.key = Linear(config.dim, config.dim, config.qkv_bias, rngs=rngs)
        if config.attention_init == "aligned":
            self.query.kernel = nnx.Param(ALIGNED_GAIN * self.query.kernel[...])
            self.key.kernel = nnx.Param(self.query.kernel[...])
        self.value = Linear(config.dim, config.dim, config.qkv_bias, rngs=rngs)
        self.out = Linear(config.dim, config.dim, config.proj_bias, rngs=rngs)
        self.query_norm = LayerNorm(config.head_dim, config.norm_bias, rngs=rngs) if config.qk_norm else None
        self.key_norm = LayerNorm(config.head_dim, config.norm_bias, rngs=rngs) if config.qk_norm else None

    def _per_head(self, norm: LayerNorm | None, x: jax.Array) -> jax.Array:
        if norm is None:
            return x
        return norm(x.reshape(*x.shape[:2], -1, self.head_dim), split=True).reshape(x.shape)

    def queries(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D], of the heads of this device."""
        return self._per_head(self.query_norm, checkpoint_name(self.query(x), "projection"))

    def keys_values(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """context [B, S, D] -> keys and values [B, S, D], of the heads of this device."""
        key = self._per_head(self.key_norm, checkpoint_name(self.key(context), "projection"))
        return key, checkpoint_name(self.value(context), "projection")

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility) -> jax.Array:
        """Attention and output projection."""
        heads = query.shape[-1] // self.head_dim  # of this device
        return self.out(attention(query, key, value, visibility, heads, self.implementation), joins=True)

    def __call__(self, x: jax.Array, context: jax.Array, visibility: Visibility) -> jax.Array:
        """x [B, T, D], context [B, S, D] -> [B, T, D]. A token that sees nothing gets zeros before the output
        projection, as from the reference implementation when nothing at all is visible (where other samples of its
        batch have tokens, it averages their padding instead)."""
        x, context = (enter_split(x),) * 2 if x is context else (enter_split(x), enter_split(context))
        return self.attend(self.queries(x), *self.keys_values(context), visibility)


@jax.custom_vjp
def silu_gate(gate: jax.Array, x: jax.Array) -> jax.Array:
    """``silu(gate) * x`` (SwiGLU), whose backward pass makes both gradients at once, in float32.

    Left to itself, XLA:TPU makes the gradient of ``x`` again in each matrix multiplication that reads it: a layer's MLP
    of B takes 2.50 instead of 2.30 ms forward and backward on v4, one of XL 15.1 instead of 14.7 (64 x 256 tokens, by
    the compiler's schedule).
    """
    return jax.nn.silu(gate) * x


def _silu_gate_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, x, g32 = (a.astype(jnp.float32) for a in (*residuals, g))
    sigmoid = jax.nn.sigmoid(gate)
    act = gate * sigmoid
    d_gate, d_x = g32 * x * (sigmoid + act - act * sigmoid), g32 * act
    return jax.lax.optimization_barrier((d_gate.astype(g.dtype), d_x.astype(g.dtype)))


silu_gate.defvjp(lambda gate, x: (silu_gate(gate, x), (gate, x)), _silu_gate_backward)


class Mlp(nnx.Module):
    """``down(act(up x))``, or gated (Shazeer 2020, "GLU variants ..."): ``down(act(gate x) * up x)``.

    Drawn at the true hidden width, then padded with zeros to ``config.padded_mlp_dim``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        gated = config.gated_mlp
        self.gate = Linear(config.dim, config.mlp_dim, config.mlp_bias, rngs=rngs) if gated else None
        self.up = Linear(config.dim, config.mlp_dim, config.mlp_bias, rngs=rngs)
        self.down = Linear(config.mlp_dim, config.dim, config.mlp_bias, rngs=rngs)
        extra = config.padded_mlp_dim - config.mlp_dim
        if extra:
            for layer in (self.up, self.gate) if gated else (self.up,):
                layer.kernel = nnx.Param(jnp.pad(layer.kernel[...], ((0, 0), (0, extra))))
                if layer.bias is not None:
                    layer.bias = nnx.Param(jnp.pad(layer.bias[...], (0, extra)))
            self.down.kernel = nnx.Param(jnp.pad(self.down.kernel[...], ((0, extra), (0, 0))))

    def __call__(self, x: jax.Array) -> jax.Array:
        act, x = ACTIVATIONS[self.activation], enter_split(x)
        if self.gate is None:
            hidden = act(self.up(x))
        elif self.activation == "silu":
            hidden = silu_gate(self.gate(x), self.up(x))
        else:
            hidden = act(self.gate(x)) * self.up(x)
        return self.down(hidden, joins=True)


class EncoderLayer(nnx.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.dim, config.norm_bias, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.dim, config.norm_bias, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        """x [B, N, D] -> [B, N, D]."""
        y = self.attention_norm(x)
        x = checkpoint_name(x + self.attention(y, y, visibility), "residual")
        return x + self.mlp(self.mlp_norm(x))


class DecoderLayer(nnx.Module):
    """Pre-norm self-attention, cross-attention with its own norm of the context, and MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.self_attention_norm = LayerNorm(config.dim, config.norm_bias, rngs=rngs)
        self.self_attention = Attention(config, rngs=rngs)
        self.query_norm = LayerNorm(config.dim, config.norm_bias, rngs=rngs)
        self.context_norm = LayerNorm(config.dim, config.norm_bias, rngs=rngs)
        self.cross_attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.dim, config.norm_bias, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, own: Visibility, cross: Visibility) -> jax.Array:
        """x [B, M, D], context [B, N, D]; who sees whom in ``x`` and in ``context`` -> [B, M, D]."""
        y = self.self_attention_norm(x)
        x = checkpoint_name(x + self.self_attention(y, y, own), "residual")
        y = self.attend_context(self.query_norm(x), self.context_norm(context), cross)
        x = checkpoint_name(x + y, "residual")
        return x + self.mlp(self.mlp_norm(x))

    def attend_context(self, x: jax.Array, context: jax.Array, cross: Visibility) -> jax.Array:
        """The cross-attention, of normalised inputs: x [B, M, D], context [B, N, D] -> [B, M, D]."""
        return self.cross_attention(x, context, cross)


# ---- modules as functions of nested dicts of arrays


def init_module(kind: type[nnx.Module], args: tuple, key: jax.Array) -> dict:
    """The parameters of ``kind(*args)`` as a nested dict, drawn from ``key``."""
    return nnx.to_pure_dict(nnx.state(kind(*args, rngs=nnx.Rngs(params=key))))


def apply_module(kind: type[nnx.Module], args: tuple, params: dict) -> nnx.Module:
    """The callable module ``kind(*args)`` holding these parameters; ``args`` must be hashable."""
    return nnx.merge(_structure(kind, args), params)


@functools.lru_cache(maxsize=64)
def _structure(kind: type[nnx.Module], args: tuple) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: kind(*args, rngs=nnx.Rngs(params=0))))
