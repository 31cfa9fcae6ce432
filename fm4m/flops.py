"""Counted matrix-multiplication FLOPs of a training step, and what the devices could do: together, the MFU.

A multiplication and an addition are two operations. Only matrix products are counted, and only those the mathematics of
the model needs: recomputed activations and scores of other modalities' heads do not count, whatever the program does.
XLA's own cost analysis counts what the program does, and is not used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fm4m.masking_recipe import Masking
from fm4m.modalities import ModalitySet

# Peak dense bfloat16 FLOP/s of a chip, from the vendors' data sheets, and devices that JAX shows for one chip.
# Searched in order for a prefix of `Device.device_kind`.
PEAKS: tuple[tuple[str, float, int], ...] = (
    ("TPU v3", 123e12, 2),
    ("TPU v4", 275e12, 1),
    ("TPU v5 lite", 197e12, 1),
    ("TPU v5e", 197e12, 1),
    ("TPU v5p", 459e12, 1),
    ("TPU v5", 459e12, 1),
    ("TPU v6 lite", 918e12, 1),
    ("TPU v6e", 918e12, 1),
    ("NVIDIA H200", 989e12, 1),
    ("NVIDIA H100 PCIe", 756e12, 1),
    ("NVIDIA H100", 989e12, 1),
    ("NVIDIA A100", 312e12, 1),
)


def chip_peak(device_kind: str) -> float:
    """Peak bfloat16 FLOP/s of a chip that JAX calls so. Raises KeyError for one that is not in `PEAKS`."""
    for prefix, peak, _ in PEAKS:
        if device_kind.startswith(prefix):
            return peak
    raise KeyError(f"no peak is known of {device_kind!r}: add it to PEAKS in fm4m/flops.py")


def trunk_flops(config: Any, modalities: ModalitySet, num_inputs: int, num_targets: int) -> float:
    """FLOPs of forward and backward passes through everything but the output heads, for one sample.

    With N = num_inputs encoder slots, M = num_targets decoder slots (filled or not: padding is computed too, and shows
    up as utilisation instead), width D, MLP width H and g = 3 matrices in a gated MLP or 2 in a plain one, a forward
    pass is

    * encoder layer: 2 N (4 D^2 + g D H) + 4 N^2 D
    * decoder layer: 2 M (6 D^2 + g D H) + 2 N (2 D^2) + 4 M^2 D + 4 M N D
    * context projection: 2 N D^2

    where attention scores are counted in full, the decoder's between modalities included, and a backward pass is twice
    a forward pass. Continuous inputs of R vectors of width P add 2 R P D forward and the same for the weights'
    gradient; the pixels themselves need none. Token tables are gathers and count nothing.
    """
    n, m, d, h = num_inputs, num_targets, config.dim, config.mlp_dim
    gates = 3 if config.gated_mlp else 2
    encoder = 2 * n * (4 * d * d + gates * d * h) + 4 * n * n * d
    decoder = 2 * m * (6 * d * d + gates * d * h) + 4 * n * d * d + 4 * m * m * d + 4 * m * n * d
    forward = config.encoder_depth * encoder + config.decoder_depth * decoder + 2 * n * d * d
    patches = sum(modalities[name].max_tokens * modalities[name].patch_dim for name in modalities.continuous)
    return 3.0 * forward + 2 * 2.0 * patches * d


def head_flops(config: Any, modalities: ModalitySet, targets: Mapping[str, float]) -> float:
    """FLOPs of forward and backward passes of the output heads, for ``targets`` predicted tokens of every modality.

    Every token goes through the head of its own modality only: 3 * 2 * D * V of it, without the rows that pad V.
    """
    return sum(6.0 * config.dim * modalities[name].vocab_size * count for name, count in targets.items())


def step_flops(
    config: Any, modalities: ModalitySet, masking: Masking, samples: float, counts: Sequence[float]
) -> float:
    """FLOPs of ``samples`` samples of which ``counts`` [num modalities] tokens were predicted: trunk and heads."""
    targets = {name: counts[modalities.index(name)] for name in modalities.outputs}
    trunk = trunk_flops(config, modalities, masking.input_range[1], masking.target_range[1])
    return samples * trunk + head_flops(config, modalities, targets)


def peak_flops() -> tuple[float, str]:
    """Peak FLOP/s of all devices of the run together, and where the number comes from, as text.

    A device that is not in the table (a CPU) is measured by a float32 matrix product of half a second; the devices that
    one CPU process shows share its cores, so one measurement stands for a process.
    """
    device = jax.devices()[0]
    for prefix, peak, per_chip in PEAKS:
        if device.device_kind.startswith(prefix):
            count = len(jax.devices())
            return (
                peak / per_chip * count,
                f"{count} x {device.device_kind}, {peak / per_chip / 1e12:g} TFLOP/s bfloat16 each",
            )
    measured = _measure()
    total = measured * (jax.process_count() if device.platform == "cpu" else len(jax.devices()))
    return total, f"{device.device_kind}, measured by a float32 matrix product: {measured / 1e9:.0f} GFLOP/s"


def _measure(size: int = 1024, seconds: float = 0.4) -> float:
    a = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
