from __future__ import annotations

import jax
import pytest

from fm4m import flops
from fm4m.modalities import Modality, ModalitySet
from fm4m.sizes import ModelConfig, model_config

GRID = ModalitySet((Modality("grid", "tokens", vocab_size=100, grid=(4, 4)),))


def test_count_by_hand():
    config = ModelConfig(dim=8, encoder_depth=1, decoder_depth=1, num_heads=2, mlp_ratio=3.0)  # an MLP of 16, gated
    n, m = 3, 2
    encoder = 2 * n * (4 * 64 + 3 * 8 * 16) + 2 * 2 * n * n * 8
    self_attention = 2 * m * 4 * 64 + 2 * 2 * m * m * 8
    cross_attention = 2 * m * 2 * 64 + 2 * n * 2 * 64 + 2 * 2 * m * n * 8
    context, mlp = 2 * n * 64, 2 * m * 3 * 8 * 16
    assert flops.trunk_flops(config, GRID, n, m) == 3 * (encoder + self_attention + cross_attention + mlp + context)
    assert flops.head_flops(config, GRID, {"grid": 5}) == 3 * 2 * 5 * 8 * 100


def test_pixels_need_no_gradient():
    pixels = ModalitySet((Modality("image", "pixels", grid=(2, 2), patch_size=2, channels=3), *GRID.modalities))
    config = ModelConfig(dim=8, encoder_depth=1, decoder_depth=1, num_heads=2)
    extra = flops.trunk_flops(config, pixels, 3, 2) - flops.trunk_flops(config, GRID, 3, 2)
    assert extra == 2 * 2 * (4 * 12 * 8)


def test_base_model_is_six_times_parameters_and_tokens_plus_attention():
    # 198.8M parameters of the trunk, 256 tokens a side: 304 GFLOP of weights and 22 of attention scores a sample.
    got = flops.trunk_flops(model_config("fm_base_12e_12d_swiglu_nobias"), GRID, 256, 256)
    assert got == pytest.approx(327e9, rel=0.005)


def test_count_agrees_with_the_compiler_on_one_forward_pass():
    # XLA counts the matrix products of an unrolled forward pass and some elementwise work on top.
    import jax.numpy as jnp

    from fm4m import model
    from fm4m.batch import PackedBatch, Tokens

    config = ModelConfig(128, 2, 2, 4, scan_group=0, dtype="float32")
    params = jax.eval_shape(lambda k: model.init_params(config, GRID, k), jax.random.key(0))

    def side(n):
        i32, flag = jax.ShapeDtypeStruct((2, n), jnp.int32), jax.ShapeDtypeStruct((2, n), jnp.bool_)
        return Tokens(i32, i32, i32, flag)

    batch = PackedBatch(side(24), side(16), jax.ShapeDtypeStruct((2, 16), jnp.int32), {})
    lowered = jax.jit(lambda p, b: model.forward(p, config, GRID, b)).lower(params, batch)
    compiler = lowered.compile().cost_analysis()["flops"]
    assert compiler == pytest.approx(2 * flops.trunk_flops(config, GRID, 24, 16) / 3, rel=0.05)


def test_peak_of_a_cpu_is_measured_and_says_so():
    peak, source = flops.peak_flops()
    assert 1e8 < peak < 1e15 and "measured" in source


@pytest.mark.parametrize(
    ("kind", "each"),
    [("TPU v3", 61.5e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)  # fmt: skip
def test_peak_table(monkeypatch, kind, each):
    device = type("Device", (), {"device_kind": kind, "platform": "tpu"})()
    monkeypatch.setattr(flops.jax, "devices", lambda: [device] * 4)
    assert flops.peak_flops()[0] == 4 * each
