"""A trained VQ-VAE as an object: arrays to codes, codes to arrays, arrays to pictures."""

from __future__ import annotations

import functools

import jax
import numpy as np

from fm4m.tokenizers import preprocess, quantize, vqvae_model
from fm4m.tokenizers.config import VQConfig

# Largest batch given to the network at once; longer inputs are cut into chunks of this size.
MAX_CHUNK = 64


class Tokenizer:
    """Encoder, codebook and decoder of one modality.

    Args:
      config: static shape.
      params: network parameters, f32 (see `vqvae_model`).
      codebook: {"embed", "cluster_size"} (see `quantize`).
      stats: arrays the preprocessing needs (features only, see `preprocess`).
    """

    def __init__(
        self,
        config: VQConfig,
        params: vqvae_model.Params,
        codebook: quantize.Codebook,
        stats: preprocess.Stats | None = None,
    ):
        self.config = config
        self.params = params
        self.codebook = codebook
        self.stats = stats or {}

    @property
    def name(self) -> str:
        """Name used in messages."""
        return self.config.name

    @property
    def vocab_size(self) -> int:
        """Number of codes; codes are 0..vocab_size-1."""
        return self.config.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes; codes are row-major."""
        return self.config.grid

    def encode(self, array) -> np.ndarray:
        """Stored arrays [B, H, W(, C)] to codes int32 [B, h*w], row-major.

        Raises:
          ValueError: shape, dtype or values do not fit the tokenizer (see `preprocess.check_array`).
        """
        array = preprocess.check_array(self.config, array)
        if not len(array):
            return np.zeros((0, self.grid[0] * self.grid[1]), np.int32)
        return self._in_chunks(lambda x: _encode(self.config, self.params, self.codebook, self.stats, x), array)

    def decode(self, codes) -> np.ndarray:
        """Codes int [B, h*w] to arrays in the stored form (depth: relative, not metres).

        Raises:
          ValueError: not [B, h*w], not integers, or a code outside 0..vocab_size-1.
        """
        codes = np.asarray(codes)
        tokens = self.grid[0] * self.grid[1]
        if codes.ndim != 2 or codes.shape[1] != tokens:
            raise ValueError(
                f"tokenizer {self.name!r} decodes codes [batch, {tokens}] (a {self.grid[0]}x{self.grid[1]} grid), "
                f"got {list(codes.shape)}"
            )
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"tokenizer {self.name!r}: codes must be integers, got {codes.dtype}")
        outside = (codes < 0) | (codes >= self.vocab_size)
        if outside.any():
            row, position = np.argwhere(outside)[0]
            raise ValueError(
                f"tokenizer {self.name!r}: code {codes[row, position]} at row {row}, position {position} is outside "
                f"0..{self.vocab_size - 1}; was it written by another tokenizer?"
            )
        # An empty batch still has to have the right trailing shape and dtype, so one dummy row is decoded and dropped.
        padded = codes if len(codes) else np.zeros((1, tokens), np.int32)
        arrays = self._in_chunks(
            lambda x: _decode(self.config, self.params, self.codebook, self.stats, x), padded.astype(np.int32)
        )
        return arrays[: len(codes)]

    def to_picture(self, array) -> np.ndarray:
        """Arrays in the stored form [B, H, W(, C)] to pictures uint8 [B, H, W, 3]."""
        return preprocess.to_picture(self.config, self.stats, array)

    @staticmethod
    def _in_chunks(function, array: np.ndarray) -> np.ndarray:
        """Applies a jitted function by chunks; sizes are powers of two, so few shapes are ever compiled."""
        results = []
        for start in range(0, len(array), MAX_CHUNK):
            chunk = array[start : start + MAX_CHUNK]
            size = 1 << (len(chunk) - 1).bit_length()
            padding = np.repeat(chunk[-1:], size - len(chunk), axis=0)
            results.append(np.asarray(function(np.concatenate([chunk, padding])))[: len(chunk)])
        return np.concatenate(results)


# Jitted once per configuration and batch size, not per object: reading a file again compiles nothing.
@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, codebook, stats, array):
    latents = vqvae_model.encode(config, params, preprocess.to_input(config, stats, array))
    return quantize.nearest(codebook, latents)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, codebook, stats, codes):
    output = vqvae_model.decode(config, params, quantize.lookup(codebook, codes))
    return preprocess.from_output(config, stats, output)
