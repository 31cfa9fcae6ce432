"""A trained tokenizer as an object: arrays to codes, codes to arrays, arrays to pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.tokenizers import preprocess, quantize, vqvae_model
from fm4m.tokenizers.config import DIFFUSION_DECODERS, VQConfig

# Largest batch given to the network at once; longer inputs are cut into chunks of this size.
MAX_CHUNK = 64
# Accelerators' fast matrix products would move codes: one file, one result.
PRECISION = "highest"

Grid = tuple[int, int]


class Tokenizer:
    """Encoder, quantizer and decoder of one modality.

    Args:
      config: static shape.
      params: network parameters, f32 (see `vqvae_model`).
      codebook: see `quantize`.
      stats: arrays the preprocessing needs (features and vectors only, see `preprocess`).
      origin: what an imported tokenizer's file said beyond our fields, kept for writing it again (see
        `fm4m.interop.ml4m_tokenizers`): {"metadata": {name: text}, "positions": {key: f32 array}}.
    """

    def __init__(
        self,
        config: VQConfig,
        params: vqvae_model.Params,
        codebook: quantize.Codebook,
        stats: preprocess.Stats | None = None,
        origin: Mapping[str, Any] | None = None,
    ):
        self.config = config
        self.params = params
        self.codebook = codebook
        self.stats = stats or {}
        self.origin = origin

    @property
    def name(self) -> str:
        """Name used in messages."""
        return self.config.name

    @property
    def vocab_size(self) -> int:
        """Number of codes; codes are 0..vocab_size-1."""
        return self.config.codebook_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of codes; codes are row-major."""
        return self.config.grid

    @property
    def num_tokens(self) -> int:
        """Codes of one array: rows x columns x codebooks."""
        return self.config.num_tokens

    def _tokens(self, grid: Grid) -> int:
        return grid[0] * grid[1] * self.config.num_codebooks

    def encode(self, array, grid: Grid | None = None) -> np.ndarray:
        """Stored arrays [B, H, W(, C)] or vectors [B, C] to codes int32 [B, n].

        Args:
          array: a batch in the stored form (see `preprocess`).
          grid: rows and columns of codes, for arrays of another size than the configured one; positions are then
            interpolated.

        Returns codes in row-major order (memcodes: the codebooks of each cell one after the other).

        Raises:
          ValueError: shape, dtype or values do not fit the tokenizer (see `preprocess.check_array`).
        """
        grid = tuple(grid or self.grid)
        array = preprocess.check_array(self.config, array, grid)
        if not len(array):
            return np.zeros((0, self._tokens(grid)), np.int32)
        codes = _in_chunks(lambda x: _encode(self.config, self.params, self.codebook, self.stats, x), array)
        return codes.reshape(len(array), -1)

    def decode(self, codes, grid: Grid | None = None, seed: int = 0, steps: int | None = None) -> np.ndarray:
        """Codes int [B, n] to arrays in the stored form (depth: relative, not metres).

        Args:
          codes: as `encode` returns them.
          grid: rows and columns of codes if not the configured ones.
          seed: of the noise that a diffusion decoder starts from; row i of a call has its own noise, whatever the
            other rows are.
          steps: evaluations of a diffusion decoder; its configured number if None.

        Raises:
          ValueError: not [B, n], not integers, a code outside 0..vocab_size-1, or steps without a diffusion decoder.
        """
        codes, grid = np.asarray(codes), tuple(grid or self.grid)
        diffusion = self.config.decoder in DIFFUSION_DECODERS
        if steps is not None and not diffusion:
            raise ValueError(f"tokenizer {self.name!r} decodes in one go: leave out steps")
        self._check_codes(codes, grid)
        # An empty batch still has to have the right trailing shape and dtype, so one dummy row is decoded and dropped.
        padded = codes if len(codes) else np.zeros((1, codes.shape[1]), np.int32)
        model = self.config, self.params, self.codebook, self.stats
        if diffusion:
            key = jax.random.key(seed)
            arrays = _in_chunks(
                lambda x, rows: _denoise(*model, x, rows, key, grid, steps), padded.astype(np.int32),
                np.arange(len(padded), dtype=np.int32),
            )  # fmt: skip
        else:
            arrays = _in_chunks(lambda x: _decode(*model, x, grid), padded.astype(np.int32))
        return arrays[: len(codes)]

    def _check_codes(self, codes: np.ndarray, grid: Grid) -> None:
        tokens = self._tokens(grid)
        if codes.ndim != 2 or codes.shape[1] != tokens:
            raise ValueError(
                f"tokenizer {self.name!r} decodes codes [batch, {tokens}] (a {grid[0]}x{grid[1]} grid), "
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

    def to_picture(self, array) -> np.ndarray:
        """Arrays in the stored form [B, H, W(, C)] to pictures uint8 [B, H, W, 3]."""
        return preprocess.to_picture(self.config, self.stats, array)


def _in_chunks(function: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
    """Applies a jitted function by chunks; sizes are powers of two, so few shapes are ever compiled."""
    results = []
    with jax.default_matmul_precision(PRECISION):
        for start in range(0, len(arrays[0]), MAX_CHUNK):
            chunks = [array[start : start + MAX_CHUNK] for array in arrays]
            count = len(chunks[0])
            size = 1 << (count - 1).bit_length()
            padded = [np.concatenate([chunk, np.repeat(chunk[-1:], size - count, axis=0)]) for chunk in chunks]
            results.append(np.asarray(function(*padded))[:count])
    return np.concatenate(results)


# Jitted once per configuration and batch size, not per object: reading a file again compiles nothing.
@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, codebook, stats, array):
    latents = vqvae_model.encode(config, params, preprocess.to_input(config, stats, array))
    return quantize.encode(config, params, codebook, latents)


def _rows(config, params, codebook, codes, grid):
    if config.quantizer == "memcodes":
        codes = codes.reshape(len(codes), grid[0] * grid[1], config.num_codebooks)
    return quantize.lookup(config, params, codebook, codes)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _decode(config, params, codebook, stats, codes, grid):
    output = vqvae_model.decode(config, params, _rows(config, params, codebook, codes, grid), grid)
    return preprocess.from_output(config, stats, output)


@functools.partial(jax.jit, static_argnums=(0, 7, 8))
def _denoise(config, params, codebook, stats, codes, numbers, key, grid, steps):
    from fm4m.tokenizers import divae_model

    def one(rows, number):
        key_of_row = jax.random.fold_in(key, number)
        return divae_model.decode(config, params, rows[None], key_of_row, grid=grid, steps=steps)[0]

    output = jax.vmap(one)(_rows(config, params, codebook, codes, grid), jnp.asarray(numbers))
    return preprocess.from_output(config, stats, output)
