"""The reference implementation's UViT as plain float64 numpy, from tensors by its names; pictures are [B, C, H, W].

Nothing of fm4m is used in it: tests compare fm4m's network and its reading of such tensors with this one. Dropout, and
sides that are no multiples of the network's stride, are left out.
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf)


def draw(leaves, key):
    """`fm4m.tokenizers.conv_layers.draw` in numpy: its program takes seconds to compile."""
    import jax

    rng = np.random.default_rng(0)
    fill = lambda leaf: leaf.constant + leaf.bound * rng.uniform(-1, 1, leaf.shape)  # noqa: E731
    return jax.tree.map(lambda leaf: fill(leaf).astype(np.float32), leaves)


def _silu(x):
    return x / (1 + np.exp(-x))


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _nearest(x, size):
    """[..., H, W] -> [..., *size]."""
    rows, columns = (np.floor(np.arange(n) * old / n).astype(int) for old, n in zip(x.shape[-2:], size, strict=True))
    return x[..., rows[:, None], columns]


class UViT:
    """The network.

    Args:
      tensors: by the reference's names, without "decoder.".
      layers, levels, heads: residual blocks per level, levels, and heads of the attention.
    """

    def __init__(self, tensors, layers, levels, heads):
        self.t = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
        self.layers, self.levels, self.heads = layers, levels, heads
        self.depth = len({key.split(".")[2] for key in tensors if key.startswith("mid_block.mid_block.")})

    def linear(self, name, x):
        return x @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]

    def layer_norm(self, name, x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def group_norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        y = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
        scale, bias = (self.t[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return y.reshape(x.shape) * scale + bias

    def conv(self, name, x, stride=1, pad=1):
        kernel = self.t[f"{name}.weight"]
        size = kernel.shape[-1]
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), (size, size), axis=(2, 3)
        )[:, :, ::stride, ::stride]
        y = np.einsum("bihwrc,oirc->bohw", windows, kernel, optimize=True)
        return y + self.t[f"{name}.bias"][:, None, None]

    def resnet(self, name, x, time):
        y = self.conv(f"{name}.conv1", _silu(self.group_norm(f"{name}.norm1", x)))
        y = y + self.linear(f"{name}.time_emb_proj", _silu(time))[:, :, None, None]
        y = self.conv(f"{name}.conv2", _silu(self.group_norm(f"{name}.norm2", y)))
        return y + (self.conv(f"{name}.conv_shortcut", x, pad=0) if f"{name}.conv_shortcut.weight" in self.t else x)

    def upsample(self, name, x):
        return self.conv(name, x.repeat(2, axis=2).repeat(2, axis=3))

    def embed(self, name, numbers, width):
        angle = np.asarray(numbers, np.float64)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
        features = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        return self.linear(f"{name}.linear_2", _silu(self.linear(f"{name}.linear_1", features)))

    def attend(self, q, k, v, hidden=None):
        split = lambda x: x.reshape(len(x), -1, self.heads, x.shape[-1] // self.heads).swapaxes(1, 2)  # noqa: E731
        q, k, v = split(q), split(k), split(v)
        scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
        if hidden is not None:
            scores = np.where(hidden[:, None, None], -1e300, scores)
        return (_softmax(scores) @ v).swapaxes(1, 2).reshape(len(q), q.shape[2], -1)

    def block(self, number, x, time, context, hidden, skip):
        name = f"mid_block.mid_block.{number}"
        if skip is not None:
            x = self.linear(f"{name}.skip_linear", np.concatenate([x, skip], axis=-1))
        parts = 2 if context is None else 3
        modulation = np.split(self.linear(f"{name}.adaLN_modulation", _silu(time))[:, None], 2 * parts, axis=-1)
        gates = np.split(self.linear(f"{name}.adaLN_gate", _silu(time))[:, None], parts, axis=-1)
        normed = lambda norm, i, x: (  # noqa: E731
            self.layer_norm(f"{name}.{norm}", x) * (1 + modulation[2 * i + 1]) + modulation[2 * i]
        )
        own = f"{name}.attn" if context is None else f"{name}.self_attn"
        q, k, v = np.split(self.linear(f"{own}.qkv", normed("norm1", 0, x)), 3, axis=-1)
        x = x + gates[0] * self.linear(f"{own}.proj", self.attend(q, k, v))
        if context is not None:
            q = self.linear(f"{name}.cross_attn.q", normed("query_norm", 1, x))
            seen = self.layer_norm(f"{name}.context_norm", context)
            k, v = np.split(self.linear(f"{name}.cross_attn.kv", seen), 2, axis=-1)
            x = x + gates[1] * self.linear(f"{name}.cross_attn.proj", self.attend(q, k, v, hidden))
        y = self.linear(f"{name}.mlp.fc1", normed("norm2", parts - 1, x))
        y = 0.5 * y * (1 + _erf(y / np.sqrt(2)))
        return x + gates[-1] * self.linear(f"{name}.mlp.fc2", y)

    def middle(self, x, time, latents, mask, bicubic):
        """``bicubic`` resizes the position table [1, D, H, W] to a grid."""
        grid = x.shape[2:]
        tokens = lambda x: x.reshape(*x.shape[:2], -1).swapaxes(1, 2)  # noqa: E731
        y, context, hidden = self.linear("mid_block.mid_proj_in", tokens(x)), None, None
        table = self.t["mid_block.mid_pos_emb"]
        if "mid_block.mid_cond_proj.weight" in self.t:
            condition = self.linear("mid_block.mid_cond_proj", tokens(_nearest(latents, grid)))
            masked = _nearest(mask, grid).reshape(len(x), -1, 1)
            y = y + np.where(masked, self.t["mid_block.mask_token"], condition) + tokens(bicubic(table, grid))
        else:
            context, hidden = tokens(latents), mask.reshape(len(x), -1)
            y = y + tokens(_nearest(table, grid))
        kept = []
        for number in range(self.depth):
            has_skip = f"mid_block.mid_block.{number}.skip_linear.weight" in self.t
            y = self.block(number, y, time, context, hidden, kept.pop() if has_skip else None)
            if number < self.depth // 2:
                kept.append(y)
        return self.linear("mid_block.mid_proj_out", y).swapaxes(1, 2).reshape(x.shape)

    def __call__(self, x, t, latents, mask, size, bicubic):
        """The prediction for x [B, C, H, W] at levels t; mask bool [B, h, w]; size [B, 2] or None."""
        patch, width = self.t["conv_in.weight"].shape[-1], len(self.t["conv_in.weight"])
        time = self.embed("time_embedding", t, width)
        if size is not None and "height_embedding.linear_1.weight" in self.t:
            time = time + self.embed("height_embedding", size[:, 0], width)
            time = time + self.embed("width_embedding", size[:, 1], width)
        y = self.conv("conv_in", np.asarray(x, np.float64), stride=patch, pad=0)
        skips = [y]
        for level in range(self.levels):
            for i in range(self.layers):
                y = self.resnet(f"down_blocks.{level}.resnets.{i}", y, time)
                skips.append(y)
            if level < self.levels - 1:
                y = self.conv(f"down_blocks.{level}.downsamplers.0.conv", y, stride=2)
                skips.append(y)
        extra = "downsample_mid.conv.weight" in self.t
        y = self.conv("downsample_mid.conv", y, stride=2) if extra else y
        y = self.middle(y, time, np.asarray(latents, np.float64), mask, bicubic)
        y = self.upsample("upsample_mid.conv", y) if extra else y
        for level in range(self.levels):
            for i in range(self.layers + 1):
                y = self.resnet(f"up_blocks.{level}.resnets.{i}", np.concatenate([y, skips.pop()], axis=1), time)
            if level < self.levels - 1:
                y = self.upsample(f"up_blocks.{level}.upsamplers.0.conv", y)
        y = _silu(self.group_norm("conv_norm_out", y))
        cells = np.einsum("bdhw,dorc->bohrwc", y, self.t["conv_out.weight"])
        y = cells.reshape(*cells.shape[:2], cells.shape[2] * patch, -1)
        return y + self.t["conv_out.bias"][:, None, None]
