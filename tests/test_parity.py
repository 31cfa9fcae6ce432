"""The model computes what the reference implementation computes."""

from __future__ import annotations

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from reference_batches import mod7, pack
from reference_weights import from_params, key_slots, reference_keys, to_params

from fm4m.loss import cross_entropy_sums, modality_weights
from fm4m.model import ModelConfig, decode, encode, forward, head_table, init_params, model_config


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


# ---- weights and batch from formulas; the expected numbers are the reference's in float64

GOLDEN = {
    "fm_tiny_6e_6d_swiglu_nobias": (10.2970866, 10.1926929, 10.4014802),
    "fm_tiny_6e_6d_gelu": (10.4599386, 10.2545070, 10.6653701),
}
GOLDEN_NAMES = ("caption", "rgb@224", "tok_rgb@224")


def golden_params(config, modalities):
    shapes = jax.eval_shape(lambda k: init_params(config, modalities, k), jax.random.key(0))
    keys = reference_keys(config, modalities)
    state = from_params(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes), keys, config, modalities)
    named = {}  # a tensor with two names takes its value from the alphabetically first
    for key in sorted(keys):
        named.setdefault(repr(key_slots(key, config, modalities)), key)
    for key in keys:
        name = named[repr(key_slots(key, config, modalities))]
        values = 0.1 * np.sin(0.37 * np.arange(state[key].size) + zlib.crc32(name.encode()) % 1000)
        values += 1.0 if "norm" in name and name.endswith(".weight") else 0.0
        state[key] = values.reshape(state[key].shape)
    return to_params(state, config, modalities)


def golden_batch(modalities):
    hidden = np.ones((2, 514), bool)
    rgb = {"tensor": np.stack([np.sin(0.01 * np.arange(3 * 224 * 224) + b).reshape(3, 224, 224) for b in range(2)])}
    rgb["input_mask"] = np.tile(np.arange(196) % 7 != 0, (2, 1))
    rgb["target_mask"] = np.ones((2, 196), bool)
    tok = {"tensor": np.stack([(7 * np.arange(196) + 13 * b) % 16384 for b in range(2)])}
    tok["input_mask"] = np.tile(np.arange(196) % 4 != 0, (2, 1))
    tok["target_mask"] = np.tile(np.arange(196) % 4 != 1, (2, 1))
    caption = {"tensor": np.zeros((2, 514), int), "input_mask": hidden.copy(), "target_mask": hidden.copy()}
    for b in range(2):
        caption["tensor"][b, :6] = 4284 + 10 * np.arange(6) + b
        caption["tensor"][b, 10:22] = [5, *(5000 + 3 * np.arange(1, 11) + b), 6]
    caption["input_mask"][:, :6] = False
    caption["target_mask"][:, 10:22] = False
    inputs = {"rgb@224": rgb, "tok_rgb@224": tok, "caption": caption}
    return pack(inputs, modalities, list(inputs), 96, 64)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name):
    modalities = mod7(names=GOLDEN_NAMES)
    config = model_config(name, dtype="float32")
    params, batch = golden_params(config, modalities), golden_batch(modalities)

    @jax.jit
    def run(params, batch):
        hidden = forward(params, config, modalities, batch)
        sums, counts = cross_entropy_sums(hidden, head_table(params, config), batch, modalities)
        return hidden, sums, counts, (modality_weights(counts, modalities) * sums).sum()

    hidden, sums, counts, loss = run(params, batch)
    own = [modalities.index(name) for name in ("tok_rgb@224", "caption")]
    assert counts.tolist() == [0, 98, 22]
    means = np.asarray(sums)[own] / np.asarray(counts)[own]
    np.testing.assert_allclose([loss, *means], GOLDEN[name], atol=1e-5, rtol=0)
    if name == "fm_tiny_6e_6d_swiglu_nobias":
        head, first = head_table(params, config), modalities.output_offset
        for modality, expected in (
            ("tok_rgb@224", [-1.2316227, 0.6874975, 0.1873842, -0.9721150]),
            ("caption", [0.9786478, -1.2892032, 0.9795203, -0.1985882]),
        ):
            logits = head[first[modality] :][:4] @ hidden[0, 0]
            np.testing.assert_allclose(logits, expected, atol=1e-5)


# ---- trained weights, intermediate values, gradients


@pytest.fixture(scope="module")
def case():
    from safetensors.numpy import load_file

    folder = FIXTURES / "parity"
    meta = json.loads((folder / "fm_swiglu_rgb_meta.json").read_text())
    io = dict(np.load(folder / "fm_swiglu_rgb_io.npz"))
    grads = dict(np.load(folder / "fm_swiglu_rgb_grads.npz"))
    info = meta["modality_info"]
    modalities = mod7({name: fields["vocab_size"] for name, fields in info.items() if "vocab_size" in fields})
    # The weights keep separate tensors for the decoder's tokens and its head.
    config = ModelConfig(64, 2, 2, num_heads=4, tied_heads=False, dtype="float32")
    params = to_params(load_file(folder / "fm_swiglu_rgb_weights.safetensors"), config, modalities)
    fields = ("tensor", "input_mask", "target_mask")
    inputs = {name: {field: io[f"in/{name}/{field}"] for field in fields} for name in meta["batch_order"]}
    return meta, io, grads, modalities, config, params, inputs


@needs_fixtures
@pytest.mark.parametrize(
    "variant", [None, "trunc_80_72", "pad_200_200", "causal0_sep0", "causal1_sep1", "causal1_sep0"]
)
def test_hidden_states_and_logits(case, variant):
    meta, io, _, modalities, config, params, inputs = case
    options = meta | (meta["variants"][variant] if variant else {})
    sizes = options["num_encoder_tokens"], options["num_decoder_tokens"]
    masks = ("decoder_sep_mask", "decoder_causal_mask")
    config = dataclasses.replace(config, **{mask: options[mask] for mask in masks if mask in options})
    # Both orders are alphabetical here; the decoder's lacks the pixels only.
    batch = pack(inputs, modalities, meta["batch_order"], *sizes)
    encoded = jax.jit(encode, static_argnums=(1, 2))(params, config, modalities, batch.encoder, batch.dense)
    hidden = jax.jit(decode, static_argnums=(1, 2))(params, config, modalities, encoded, batch.decoder)
    prefix = f"variant/{variant}/" if variant else "out/"
    seen, asked = batch.encoder.valid, batch.decoder.valid
    compared = 0
    for key, ours, valid in (
        ("enc/mask", ~seen, slice(None)),
        ("enc/emb", encoded.embedding, seen),
        ("enc/out", encoded.hidden, seen),
        ("dec/mask", ~asked, slice(None)),
        ("dec/out", hidden, asked),
    ):
        if prefix + key in io:
            np.testing.assert_allclose(np.asarray(ours)[valid], io[prefix + key][valid], atol=5e-5, err_msg=key)
            compared += 1
    head = np.asarray(head_table(params, config))
    for name in modalities.outputs:
        start, stop = modalities.output_ranges[modalities.index(name)]
        own = asked & (batch.decoder.modality == modalities.index(name))
        logits = np.asarray(hidden)[own] @ head[start:stop].T
        key = f"{prefix}logits_own/{name}"
        if key in io:
            np.testing.assert_allclose(logits, io[key], atol=5e-5, err_msg=name)
            compared += 1
    assert compared > 1, f"nothing to compare for {variant}"


@needs_fixtures
@pytest.mark.parametrize("method", ["dense", "blocked"])
def test_losses_and_gradients(case, method):
    meta, io, grads, modalities, config, params, inputs = case
    batch = pack(inputs, modalities, meta["batch_order"], meta["num_encoder_tokens"], meta["num_decoder_tokens"])

    @jax.jit
    def loss(params):
        hidden = forward(params, config, modalities, batch)
        sums, counts = cross_entropy_sums(hidden, head_table(params, config), batch, modalities, method)
        return (modality_weights(counts, modalities) * sums).sum(), sums / jnp.maximum(counts, 1)

    (total, means), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert abs(float(total) - io["out/loss_mod/total"]) <= 1e-5
    for name in modalities.outputs:
        assert abs(float(means[modalities.index(name)]) - io[f"out/loss_mod/{name}"]) <= 1e-5, name
    ours = from_params(gradient, [str(n) for n in io["grad/names"]], config, modalities)
    compared = 0
    for name, norm in zip(io["grad/names"], io["grad/mod_norms"], strict=True):
        if np.isnan(norm):  # the reference gives no gradient: the decoder's unused tokens of image modalities
            assert not ours[str(name)].any(), name
            continue
        np.testing.assert_allclose(np.linalg.norm(ours[str(name)].astype(np.float64)), norm, rtol=2e-4, err_msg=name)
        compared += 1
    assert compared > 60
    for name, expected in grads.items():
        name = name.removeprefix("grad/")
        np.testing.assert_allclose(ours[name].ravel(), expected.ravel(), atol=2e-6, rtol=2e-4, err_msg=name)


@needs_fixtures
def test_weights_survive_the_way_back(case):
    from safetensors.numpy import load_file

    *_, modalities, config, params, _ = case
    state = load_file(FIXTURES / "parity" / "fm_swiglu_rgb_weights.safetensors")
    keys = [k for k in reference_keys(config, modalities) if k in state]
    for key, tensor in from_params(params, keys, config, modalities).items():
        np.testing.assert_array_equal(tensor.ravel(), state[key].ravel(), err_msg=key)
    assert {k for k in state if not k.endswith((".pos_emb", "norm.bias", "norm1.bias", "norm2.bias"))} <= set(keys)
