"""The model computes what the reference implementation computes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from reference_batches import mod7, pack

from fm4m import optim
from fm4m.attention import dense
from fm4m.interop.layout import Layout
from fm4m.interop.ml4m import Source
from fm4m.loss import cross_entropy_sums, modality_weights
from fm4m.model import decode, decoder_visibility, encode, forward, head_table, model_config

PARITY = (FIXTURES or pathlib.Path("absent")) / "parity"


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
    layout = Layout(config, modalities)
    params = layout.zeros()
    named = {}  # a tensor with two names takes its value from the alphabetically first
    for key in sorted(layout.parameters):
        named.setdefault(repr(layout.slots(key)), key)
    for key in layout.parameters:
        name, shape = named[repr(layout.slots(key))], layout.shape(key)
        values = 0.1 * np.sin(0.37 * np.arange(math.prod(shape)) + zlib.crc32(name.encode()) % 1000)
        values += 1.0 if "norm" in name and name.endswith(".weight") else 0.0
        layout.set(params, key, values.reshape(shape).astype(np.float32))
    return params


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


# ---- cases that the reference wrote: weights, batches, intermediate values, gradients, a training run


CASES = sorted(p.name.removesuffix("_weights.safetensors") for p in PARITY.glob("fm_*_weights.safetensors"))
TRAINED = sorted(p.name.removesuffix("_weights.safetensors") for p in PARITY.glob("train_*_weights.safetensors"))


class Case:
    """One case: its description, its arrays, and the model opened through the importer."""

    def __init__(self, name: str, **options):
        self.meta = json.loads((PARITY / f"{name}_meta.json").read_text())
        self.io = dict(np.load(PARITY / f"{name}_io.npz"))
        source = Source(PARITY / f"{name}_weights.safetensors", **options)
        self.config = dataclasses.replace(source.config, dtype="float32")
        self.modalities, self.layout, self.params = source.modalities, source.layout, source.load().params
        source.close()

    def batch(self, prefix: str, options: dict):
        fields, order = ("tensor", "input_mask", "target_mask"), self.meta.get("batch_order")
        order = order or sorted({key.split("/")[1] for key in self.io if key.startswith(f"{prefix}/")})
        inputs = {n: {f: self.io[f"{prefix}/{n}/{f}"] for f in fields if f"{prefix}/{n}/{f}" in self.io} for n in order}
        sizes = options["num_encoder_tokens"], options["num_decoder_tokens"]
        return pack(inputs, self.modalities, order, *sizes, decoder_order=options.get("decoder_order", order))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@needs_fixtures
@pytest.mark.parametrize(
    "variant", [None, "trunc_80_72", "pad_200_200", "causal0_sep0", "causal1_sep1", "causal1_sep0"]
)
def test_hidden_states_and_logits(case, variant):
    if variant and variant not in case.meta.get("variants", {}):
        pytest.skip(f"{case.meta['case']} has no variant {variant}")
    options = case.meta | (case.meta["variants"][variant] if variant else {})
    masks = ("decoder_sep_mask", "decoder_causal_mask")
    config = dataclasses.replace(case.config, **{mask: options[mask] for mask in masks if mask in options})
    modalities, params, io = case.modalities, case.params, case.io
    batch = case.batch("in", options)
    encoded = jax.jit(encode, static_argnums=(1, 2))(params, config, modalities, batch.encoder, batch.dense)
    hidden = jax.jit(decode, static_argnums=(1, 2))(params, config, modalities, encoded, batch.decoder)
    prefix = f"variant/{variant}/" if variant else "out/"
    registers = encoded.valid.shape[1] - batch.encoder.valid.shape[1]
    seen, asked = np.asarray(encoded.valid), batch.decoder.valid
    hides = ~np.asarray(dense(decoder_visibility(config, modalities, batch.decoder)))
    # The reference counts a truncated grid's hidden slots too; they are padding here.
    pairs = asked[:, :, None] & asked[:, None, :]
    compared = 0
    for key, ours, valid in (
        ("enc/mask", ~seen, slice(None)),
        ("enc/emb", encoded.embedding, seen),
        ("enc/out", encoded.hidden, seen),
        ("dec/mask", ~asked, slice(None)),
        ("dec/attention_mask", hides, pairs),
        ("dec/target_ids", batch.target - np.asarray(output_offsets(modalities))[batch.decoder.modality], asked),
        ("dec/out", hidden, asked),
    ):
        if prefix + key in io:
            expected = io[prefix + key]
            if key == "enc/mask" and expected.shape[1] < seen.shape[1]:
                ours = ours[:, registers:]
            tolerance = 0 if expected.dtype.kind in "biu" else 5e-5
            np.testing.assert_allclose(np.asarray(ours)[valid], expected[valid], rtol=0, atol=tolerance, err_msg=key)
            compared += 1
    head = np.asarray(head_table(params, config))
    for name in modalities.outputs:
        start, stop = modalities.output_ranges[modalities.index(name)]
        own = asked & (batch.decoder.modality == modalities.index(name))
        key = f"{prefix}logits_own/{name}"
        if key in io:
            logits = np.asarray(hidden)[own] @ head[start:stop].T
            np.testing.assert_allclose(logits, io[key], atol=5e-5, rtol=0, err_msg=name)
            compared += 1
    assert compared > 1, f"nothing to compare for {variant}"


def output_offsets(modalities):
    return [modalities.output_offset.get(name, 0) for name in modalities.names]


@needs_fixtures
@pytest.mark.parametrize("method", ["dense", "blocked"])
def test_losses_and_gradients(case, method):
    config, modalities, layout, io = case.config, case.modalities, case.layout, case.io
    batch = case.batch("in", case.meta)

    @jax.jit
    def loss(params):
        hidden = forward(params, config, modalities, batch)
        sums, counts = cross_entropy_sums(hidden, head_table(params, config), batch, modalities, method)
        return (modality_weights(counts, modalities) * sums).sum(), sums / jnp.maximum(counts, 1)

    (total, means), gradient = jax.value_and_grad(loss, has_aux=True)(case.params)
    assert abs(float(total) - io["out/loss_mod/total"]) <= 1e-5
    for name in modalities.outputs:
        assert abs(float(means[modalities.index(name)]) - io[f"out/loss_mod/{name}"]) <= 1e-5, name
    compared = 0
    for name, norm in zip(map(str, io["grad/names"]), io["grad/mod_norms"], strict=True):
        if name not in layout.parameters:
            continue  # one of the reference's constants
        ours = layout.get(gradient, name)
        if np.isnan(norm):  # the reference gives no gradient: the decoder's unused tokens of image modalities
            assert not ours.any(), name
            continue
        np.testing.assert_allclose(np.linalg.norm(ours.astype(np.float64)), norm, rtol=2e-4, err_msg=name)
        compared += 1
    assert compared > 60
    path = PARITY / f"{case.meta['case']}_grads.npz"
    for name, expected in dict(np.load(path)).items() if path.is_file() else ():
        ours = layout.get(gradient, name.removeprefix("grad/"))
        np.testing.assert_allclose(ours.ravel(), expected.ravel(), atol=2e-6, rtol=2e-4, err_msg=name)


@needs_fixtures
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_run_step_by_step(name):
    case = Case(name, tie_heads=True)
    config, modalities, io, o = case.config, case.modalities, case.io, case.meta["optimizer"]
    # The table of learning rates is given; 4M's own schedule is tested with the optimizer.
    rates = jnp.asarray(io["traj/lr"], jnp.float32)
    optimizer = optim.adamw(
        lambda step: rates[step], b1=o["betas"][0], b2=o["betas"][1], eps=o["eps"], weight_decay=o["weight_decay"],
        clip_norm=o["clip_grad_norm"],
    )  # fmt: skip
    batches = [case.batch(f"in{i}", case.meta) for i in range(case.meta["batches"])]

    @jax.jit
    def step(params, opt_state, i, batch):
        def loss(params):
            hidden = forward(params, config, modalities, batch)
            sums, counts = cross_entropy_sums(hidden, head_table(params, config), batch, modalities)
            return (modality_weights(counts, modalities) * sums).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        params, opt_state, metrics = optimizer.update(gradient, opt_state, params, i)
        return params, opt_state, value, metrics["grad_norm"]

    params, opt_state = case.params, optimizer.init(case.params)
    for i in range(case.meta["steps"]):
        params, opt_state, loss, norm = step(params, opt_state, jnp.int32(i), batches[i % len(batches)])
        assert abs(float(loss) - io["traj/loss"][i]) <= 2e-5, i
        assert float(norm) == pytest.approx(io["traj/grad_norm_before_clip"][i], rel=2e-4), i
    finals = [key for key in io if key.startswith("final/")]
    assert finals
    for key in finals:
        ours = case.layout.get(params, key.removeprefix("final/"))
        np.testing.assert_allclose(ours.ravel(), io[key].ravel(), rtol=0, atol=2e-5, err_msg=key)
