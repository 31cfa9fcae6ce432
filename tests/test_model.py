from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from small_model import MODALITIES, random_batch, without_tokens

from fm4m.batch import PackedBatch
from fm4m.modalities import ModalitySet
from fm4m.modality_sets import MOD7, SETS
from fm4m.model import (
    SIZES,
    ModelConfig,
    decode,
    encode,
    forward,
    head_table,
    init_params,
    model_config,
    param_counts,
)

SMALL = ModelConfig(32, 2, 3, num_heads=2, dtype="float32")


@pytest.fixture(scope="module")
def batch():
    return random_batch(0, 4, 24, 20)


def run(config, batch, params=None, modalities=MODALITIES):
    params = init_params(config, modalities, jax.random.key(1)) if params is None else params
    return np.asarray(jax.jit(lambda p, b: forward(p, config, modalities, b))(params, batch), np.float32)


# ---- sizes

TRUNKS = {  # encoder, decoder side, trunk
    "fm_tiny_6e_6d_swiglu_nobias": (10_621_824, 14_313_600, 24_935_424),
    "fm_small_8e_8d_swiglu_nobias": (None, None, 59_000_832),
    "fm_base_12e_12d_swiglu_nobias": (84_953_856, 113_875_200, 198_829_056),
    "fm_large_24e_24d_swiglu_nobias": (301_990_912, 403_753_984, 705_744_896),
    "fm_xlarge_24e_24d_swiglu_nobias": (1_208_010_752, 1_614_960_640, 2_822_971_392),
    "fm_tiny_6e_6d_gelu": (None, None, 25_000_704),
    "fm_small_8e_8d_gelu": (None, None, 59_124_736),
    "fm_base_12e_12d_gelu": (None, None, 199_088_640),
    "fm_large_24e_24d_gelu": (None, None, 706_533_376),
    "fm_xlarge_24e_24d_gelu": (None, None, 2_824_450_048),
}
TOTALS = {  # tied, untied
    ("base_12e_12d", "mod7"): (360_791_040, 441_474_048),
    ("large_24e_24d", "mod7"): (921_694_208, 1_029_271_552),
    ("xlarge_24e_24d", "mod7"): (3_254_870_016, 3_470_024_704),
    ("base_12e_12d", "mod21"): (623_812_608, 834_404_352),
    ("large_24e_24d", "mod21"): (1_272_389_632, 1_553_178_624),
    ("xlarge_24e_24d", "mod21"): (3_956_260_864, 4_517_838_848),
    ("large_24e_24d", "mod7_sr"): (907_184_128, 953_321_472),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_trunk_sizes(name):
    counts = param_counts(SIZES[name], MOD7)
    for part, expected in zip(("encoder", "decoder", "trunk"), TRUNKS[name], strict=True):
        assert expected is None or counts[part] == expected, part


@pytest.mark.parametrize(("stem", "modalities"), TOTALS)
def test_total_sizes(stem, modalities):
    for tied, expected in zip((True, False), TOTALS[stem, modalities], strict=True):
        config = model_config(f"fm_{stem}_swiglu_nobias", tied_heads=tied)
        assert param_counts(config, SETS[modalities])["total"] == expected


@needs_fixtures
def test_sizes_of_all_registered_models():
    zoo = json.loads((FIXTURES / "parity" / "model_zoo.json").read_text())["counts"]
    assert {key.split("/")[0] for key in zoo} == set(SIZES)
    for key, expected in zoo.items():
        name, modalities = key.split("/")
        for field, tied in (("params_tied", True), ("params_untied", False)):
            config = model_config(name, tied_heads=tied)
            assert param_counts(config, SETS[modalities])["total"] == expected[field], key


def test_padding_rows_and_unused_rows_do_not_count():
    params = init_params(SMALL, MODALITIES, jax.random.key(0))
    leaves = sum(leaf.size for leaf in jax.tree.leaves(params))
    padding = 2 * (28 + 84 + 0 + 58)  # depth 100, caption 300, global 128, absent 70; both tables
    assert param_counts(SMALL, MODALITIES)["total"] == leaves - 32 * padding


# ---- configuration


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(KeyError, match="fm_base_12e_12d_swiglu_nobias"):
        model_config("fm_base_12e_12d_swiglu_nobiass")
    with pytest.raises(TypeError, match="num_heads"):
        model_config("fm_tiny_6e_6d_gelu", n_heads=3)
    with pytest.raises(ValueError, match="Did you mean 'silu'"):
        ModelConfig(32, 1, 1, 2, activation="sillu")
    with pytest.raises(ValueError, match="Known: dots"):
        ModelConfig(32, 1, 1, 2, remat="everything")
    with pytest.raises(ValueError, match="multiple"):
        ModelConfig(30, 1, 1, 2)
    with pytest.raises(ValueError, match="no outputs"):
        init_params(SMALL, ModalitySet((MODALITIES["pixels"],)), jax.random.key(0))


# ---- parameters


def test_initialisation():
    config = dataclasses.replace(SMALL, dim=64, num_register_tokens=3, norm_bias=True, mlp_bias=True)
    params = init_params(config, MODALITIES, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    inputs, outputs = params["encoder_embedding"]["tokens"], params["decoder_embedding"]["tokens"]
    for table, offsets in ((inputs, MODALITIES.input_offset), (outputs, MODALITIES.output_offset)):
        rows = np.zeros(len(table), bool)
        for name, start in offsets.items():
            rows[start : start + MODALITIES[name].vocab_size] = True
        assert not np.asarray(table)[~rows].any() and np.asarray(table)[rows].any(1).all()
    assert abs(np.std(inputs[:100]) - 0.02) < 0.001
    for name, start in MODALITIES.output_offset.items():  # tied: Xavier with each modality's own vocabulary
        vocab = MODALITIES[name].vocab_size
        bound = np.sqrt(6 / (vocab + 64))
        assert 0.98 * bound < np.abs(outputs[start : start + vocab]).max() <= bound
    for group, name in (("encoder", "attention"), ("decoder", "cross_attention")):
        kernel = params[group][name]["query"]["kernel"]
        assert kernel.shape == (getattr(config, f"{group}_depth"), 64, 64)
        assert 0.98 * np.sqrt(6 / 128) < np.abs(kernel).max() <= np.sqrt(6 / 128)
        assert (kernel[0] != kernel[1]).all()
    assert (params["encoder"]["mlp_norm"]["scale"] == 1).all() and not params["encoder"]["mlp_norm"]["bias"].any()
    assert not params["decoder"]["mlp"]["down"]["bias"].any()
    for path in ("modality", "positions", "registers"):
        assert 0.01 < np.std(params["encoder_embedding"][path]) < 0.03
    projections = params["encoder_embedding"]["projections"]
    assert set(projections["pixels"]) == {"kernel"} and set(projections["states"]) == {"kernel", "bias"}


def test_adding_a_modality_leaves_the_other_rows_alone():
    fewer = ModalitySet(tuple(m for m in MODALITIES.modalities if m.name != "depth"))
    a, b = (init_params(SMALL, m, jax.random.key(0))["decoder_embedding"]["tokens"] for m in (MODALITIES, fewer))
    i, j = MODALITIES.output_offset["caption"], fewer.output_offset["caption"]
    np.testing.assert_array_equal(a[i : i + 300], b[j : j + 300])


# ---- forward


def test_shapes_and_finiteness_of_every_variant(batch):
    for changes in (
        {"qk_norm": True},
        {"num_register_tokens": 3},
        {"gated_mlp": False, "activation": "gelu", "mlp_bias": True, "qkv_bias": True, "proj_bias": True},
        {"norm_bias": True},
        {"tied_heads": False},
        {"share_modality_embeddings": False},
        {"mlp_ratio": 3.0, "activation": "gelu"},
    ):
        config = dataclasses.replace(SMALL, **changes)
        params = init_params(config, MODALITIES, jax.random.key(0))
        encoded = jax.jit(encode, static_argnums=(1, 2))(params, config, MODALITIES, batch.encoder, batch.dense)
        registers = config.num_register_tokens
        assert encoded.hidden.shape == encoded.embedding.shape == (4, registers + 24, 32)
        assert encoded.valid[:, :registers].all() and not encoded.embedding[:, :registers].any()
        np.testing.assert_array_equal(encoded.valid[:, registers:], batch.encoder.valid)
        hidden = jax.jit(decode, static_argnums=(1, 2))(params, config, MODALITIES, encoded, batch.decoder)
        assert hidden.shape == (4, 20, 32) and np.isfinite(hidden).all()
        assert head_table(params, config).shape == (MODALITIES.output_rows, 32)
        assert ("head" in params) != config.tied_heads
        assert ("modality" in params["decoder_embedding"]) != config.share_modality_embeddings


@pytest.fixture(scope="module")
def gradient_of(batch):
    """A function of a configuration of 2 + 4 layers: a weighted sum of the hidden states, and its gradient."""
    config = dataclasses.replace(SMALL, decoder_depth=4)
    params = init_params(config, MODALITIES, jax.random.key(1))
    weights = jax.random.normal(jax.random.key(2), (4, 20, 32))

    @functools.cache
    def value_and_grad(**changes):
        changed = dataclasses.replace(config, **changes)
        return jax.jit(jax.value_and_grad(lambda p: (forward(p, changed, MODALITIES, batch) * weights).sum()))(params)

    return value_and_grad


@pytest.mark.parametrize("group, remat", [(0, "none"), (0, "dots"), (2, "projections"), (2, "full"), (1, "residual")])
def test_loops_over_layers_and_remat_policies_change_nothing(gradient_of, group, remat):
    value, gradient = gradient_of()
    other_value, other = gradient_of(scan_group=group, remat=remat)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), gradient, other)


def test_groups_that_do_not_divide_the_layers_are_refused():
    with pytest.raises(ValueError, match="scan_group 2 does not divide 2 and 3 layers"):
        dataclasses.replace(SMALL, scan_group=2)


def test_remat_policies_keep_what_they_say(batch):
    """From "full" to "none" more and more values are kept for the backward pass."""
    params = init_params(SMALL, MODALITIES, jax.random.key(1))
    kept = []
    for remat in ("full", "residual", "projections", "none"):
        config = dataclasses.replace(SMALL, remat=remat, scan_group=0)
        backward = jax.eval_shape(lambda p, c=config: jax.vjp(lambda p: forward(p, c, MODALITIES, batch), p)[1], params)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(backward)))
    assert kept == sorted(set(kept)), kept


def test_bfloat16_is_close_to_float32(batch):
    params = init_params(SMALL, MODALITIES, jax.random.key(1))
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    assert jax.eval_shape(lambda p: forward(p, config, MODALITIES, batch), params).dtype == jnp.bfloat16
    exact, rounded = (run(dataclasses.replace(SMALL, dtype=d), batch, params) for d in ("float32", "bfloat16"))
    valid = np.asarray(batch.decoder.valid)
    assert 0 < np.abs(exact - rounded)[valid].mean() < 0.02


def edited(batch: PackedBatch, side: str, **arrays) -> PackedBatch:
    return dataclasses.replace(batch, **{side: dataclasses.replace(getattr(batch, side), **arrays)})


def test_what_padding_slots_hold_does_not_matter(batch):
    reference = run(SMALL, batch)
    valid = np.asarray(batch.decoder.valid)
    garbage = batch
    for side in ("encoder", "decoder"):
        tokens = getattr(garbage, side)
        arrays = {f: jnp.where(tokens.valid, getattr(tokens, f), 1) for f in ("row", "modality", "position")}
        garbage = edited(garbage, side, **arrays)
    np.testing.assert_allclose(run(SMALL, garbage)[valid], reference[valid], atol=1e-5)


def test_decoder_slots_see_their_own_modality_and_sequences_only_the_past(batch):
    """Which outputs change when one decoder token changes."""
    params = init_params(SMALL, MODALITIES, jax.random.key(1))
    reference = run(SMALL, batch, params)
    modality, valid = np.asarray(batch.decoder.modality[0]), np.asarray(batch.decoder.valid[0])
    slot = np.arange(20)
    for name in ("caption", "depth"):
        index = MODALITIES.index(name)
        chosen = np.flatnonzero(valid & (modality == index))[1]
        row, position = (np.array(getattr(batch.decoder, f)) for f in ("row", "position"))
        row[0, chosen] += 1
        position[0, chosen] += 1
        changed = edited(batch, "decoder", row=jnp.asarray(row), position=jnp.asarray(position))
        moved = np.abs(run(SMALL, changed, params) - reference).max(-1) > 1e-6
        expected = valid & (modality == index) & ((slot >= chosen) | (name != "caption"))
        np.testing.assert_array_equal(moved[0] & valid, expected, err_msg=name)
        assert not moved[1:].any()


def test_the_content_of_an_image_token_is_hidden_from_the_decoder(batch):
    params = init_params(SMALL, MODALITIES, jax.random.key(1))
    image = np.asarray(batch.decoder.modality) == MODALITIES.index("depth")
    row = jnp.where(image, 0, batch.decoder.row)
    np.testing.assert_array_equal(run(SMALL, edited(batch, "decoder", row=row), params), run(SMALL, batch, params))


def test_every_visible_token_matters(batch):
    params = init_params(SMALL, MODALITIES, jax.random.key(1))
    weights = jax.random.normal(jax.random.key(2), (4, 20, 32))
    gradient = jax.jit(jax.grad(lambda p: (forward(p, SMALL, MODALITIES, batch) * weights).sum()))(params)
    embedding = gradient["encoder_embedding"]
    assert np.asarray(embedding["projections"]["pixels"]["kernel"]).any()
    assert np.asarray(embedding["projections"]["states"]["kernel"]).any()
    assert np.asarray(embedding["positions"]).any() and np.asarray(embedding["modality"]).any(1).all()
    discrete = ~MODALITIES.is_continuous[np.asarray(batch.encoder.modality)] & np.asarray(batch.encoder.valid)
    rows = np.unique(np.asarray(batch.encoder.row)[discrete])
    used = np.flatnonzero(np.asarray(embedding["tokens"]).any(1))
    np.testing.assert_array_equal(used, rows)


def test_padding_samples_give_finite_values(batch):
    for config in (SMALL, dataclasses.replace(SMALL, dtype="bfloat16", num_register_tokens=2, qk_norm=True)):
        params = init_params(config, MODALITIES, jax.random.key(1))
        padding = without_tokens(batch)
        square = jax.jit(
            jax.value_and_grad(lambda p, c=config, b=padding: jnp.square(forward(p, c, MODALITIES, b)).sum())
        )
        value, gradient = square(params)
        assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_only_continuous_inputs_and_only_learned_positions():
    pixels = MODALITIES["pixels"]
    modalities = ModalitySet((pixels, MODALITIES["depth"]), inputs=("pixels",))
    batch = random_batch(1, 2, 8, 8, modalities)
    params = init_params(SMALL, modalities, jax.random.key(0))
    assert "tokens" not in params["encoder_embedding"]
    assert np.isfinite(run(SMALL, batch, params, modalities)).all()
    modalities = ModalitySet((MODALITIES["global"],))
    batch = random_batch(1, 2, 4, 4, modalities)
    assert np.isfinite(run(SMALL, batch, modalities=modalities)).all()
