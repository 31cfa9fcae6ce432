"""The reference implementation's keys as views of our parameters: shapes, and copies in both directions."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from small_model import MODALITIES

from fm4m.interop.layout import Layout
from fm4m.modality_sets import MOD7, MOD21, SETS
from fm4m.model import SIZES, ModelConfig, init_params, param_counts

SMALL = ModelConfig(32, 2, 3, num_heads=2, dtype="float32")
EVERYTHING = ModelConfig(
    32, 2, 1, num_heads=2, mlp_ratio=3.0, gated_mlp=True, activation="gelu", qkv_bias=True, mlp_bias=True,
    norm_bias=True, qk_norm=True, num_register_tokens=3, share_modality_embeddings=False, tied_heads=False,
    mlp_multiple=16, dtype="float32",
)  # fmt: skip


def params_of(config, modalities=MODALITIES, seed=0):
    return jax.tree.map(np.array, init_params(config, modalities, jax.random.key(seed)))


@pytest.mark.parametrize("config", [SMALL, EVERYTHING, dataclasses.replace(SMALL, proj_bias=True, tied_heads=False)])
def test_what_is_read_can_be_written_back(config):
    layout, params = Layout(config, MODALITIES), params_of(config)
    filled = layout.zeros()
    for key in layout.parameters:
        tensor = layout.get(params, key)
        assert tensor.shape == layout.shape(key) and tensor.flags.c_contiguous, key
        layout.set(filled, key, tensor)
    padding = sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(leaf.size for leaf in jax.tree.leaves(filled))
    assert padding == 0
    for key in layout.parameters:
        np.testing.assert_array_equal(layout.get(filled, key), layout.get(params, key), err_msg=key)
    # Rows and columns that only pad stay zero; everything else is there.
    counted = sum(math.prod(layout.shape(key)) for key in layout.parameters if key not in layout.aliases)
    tied = sum(MODALITIES[n].vocab_size for n in MODALITIES.outputs) * config.dim if config.tied_heads else 0
    assert counted - tied == param_counts(config, MODALITIES)["total"]


def test_the_hidden_width_is_the_true_one_and_padding_stays_zero():
    assert EVERYTHING.mlp_dim == 64 and dataclasses.replace(EVERYTHING, mlp_ratio=2.5).mlp_dim == 53
    config = dataclasses.replace(EVERYTHING, mlp_ratio=2.5)
    layout, params = Layout(config, MODALITIES), params_of(config)
    assert params["encoder"]["mlp"]["up"]["kernel"].shape == (2, 32, 64)
    assert layout.shape("encoder.1.mlp.fc1.weight") == layout.shape("encoder.1.mlp.fc3.weight") == (53, 32)
    assert layout.shape("encoder.1.mlp.fc2.weight") == (32, 53) and layout.shape("encoder.1.mlp.fc1.bias") == (53,)
    assert not params["encoder"]["mlp"]["up"]["kernel"][..., 53:].any()
    assert not params["encoder"]["mlp"]["down"]["kernel"][:, 53:].any()


def test_packed_projections_are_query_key_value_from_the_top():
    layout, params = Layout(SMALL, MODALITIES), params_of(SMALL)
    own = params["decoder"]["cross_attention"]
    packed = layout.get(params, "decoder.2.cross_attn.kv.weight")
    np.testing.assert_array_equal(packed, np.concatenate([own[n]["kernel"][2].T for n in ("key", "value")]))


def test_unknown_keys_and_wrong_shapes_are_named():
    layout, params = Layout(SMALL, MODALITIES), params_of(SMALL)
    with pytest.raises(KeyError, match=r"Did you mean 'encoder.0.attn.qkv.weight'"):
        layout.get(params, "encoder.0.attn.qkw.weight")
    with pytest.raises(ValueError, match=r"mask_token has shape \(32,\), but this model's is \(1, 1, 32\)"):
        layout.set(params, "mask_token", np.zeros(32, np.float32))


@needs_fixtures
def test_keys_and_shapes_are_the_references():
    zoo = json.loads((FIXTURES / "parity" / "model_zoo.json").read_text())
    assert zoo["state_dict_shapes"]
    for case, listed in zoo["state_dict_shapes"].items():
        name, modalities = case.split("/")
        layout = Layout(dataclasses.replace(SIZES[name], tied_heads=False), SETS[modalities])
        ours = {key: list(layout.shape(key)) for key in (*layout.parameters, *layout.buffers)}
        assert ours == listed, case


def test_released_sets_have_the_references_kinds():
    keys = {name: Layout(SIZES["fm_tiny_6e_6d_swiglu_nobias"], m) for name, m in SETS.items()}
    assert keys["mod7"].shape("encoder_embeddings.rgb@224.proj.weight") == (384, 768)
    assert keys["mod21"].shape("encoder_embeddings.t5_caption.emb_proj.weight") == (384, 4096)
    assert "decoder_embeddings.tok_dinov2_global.pos_emb" in keys["mod21"].parameters
    assert keys["mod7_sr"].shape("decoder_embeddings.tok_rgb@448.pos_emb") == (1, 784, 384)
    assert len(MOD7) == 8 and len(MOD21) == 19
