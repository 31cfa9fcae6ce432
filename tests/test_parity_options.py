"""The model against an independent numpy forward pass, for the options and kinds of modalities that models can have.

Weights are random, written as a file in the reference implementation's naming and read by the importer. The numpy
forward pass (`reference_model`) is itself compared with the arrays that the reference wrote.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import reference_model
from fixtures import FIXTURES, needs_fixtures
from reference_batches import pack
from safetensors.numpy import load_file, save_file

import fm4m
from fm4m.attention import dense
from fm4m.loss import cross_entropy_sums, modality_weights
from fm4m.modalities import Modality, ModalitySet
from fm4m.modality_sets import released
from fm4m.model import decode, decoder_visibility, encode, head_table

BATCH = 3


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


# ---- the judge is judged


PARITY = (FIXTURES or pathlib.Path("absent")) / "parity"


@needs_fixtures
@pytest.mark.parametrize(
    "variant", [None, "trunc_80_72", "pad_200_200", "causal0_sep0", "causal1_sep1", "causal1_sep0"]
)
def test_the_numpy_model_computes_what_the_reference_wrote(variant):
    meta = json.loads((PARITY / "fm_swiglu_rgb_meta.json").read_text())
    io, state = np.load(PARITY / "fm_swiglu_rgb_io.npz"), load_file(PARITY / "fm_swiglu_rgb_weights.safetensors")
    for name, table in (("det", reference_model.sincos_1d(512, 64)), ("rgb@224", reference_model.sincos_2d(14, 64))):
        np.testing.assert_allclose(table, state[f"encoder_embeddings.{name}.pos_emb"], rtol=0, atol=5e-5)
    options = meta | (meta["variants"][variant] if variant else {})
    config = {key: options.get(key, value) for key, value in meta["config"].items()}
    fields = ("tensor", "input_mask", "target_mask")
    batch = {name: {field: io[f"in/{name}/{field}"] for field in fields} for name in meta["batch_order"]}
    info = {name: {"type": m["type"], "max_length": m["max_tokens"]} for name, m in meta["modality_info"].items()}
    sizes = options["num_encoder_tokens"], options["num_decoder_tokens"]
    out = reference_model.forward(state, config, info, batch, *sizes, options["decoder_order"])
    prefix = f"variant/{variant}/" if variant else "out/"
    seen, asked = ~out["encoder"]["mask"], out["decoder"]["modality"] >= 0
    np.testing.assert_array_equal(asked, ~io[f"{prefix}dec/mask"])
    for key, ours, valid in (
        ("enc/emb", out["encoder"]["emb"], seen),
        ("enc/out", out["encoder"]["out"], seen),
        ("dec/target_ids", out["decoder"]["target_ids"], asked),
        ("dec/attention_mask", out["decoder"]["may_not"], asked),
        ("dec/out", out["decoder"]["out"], asked),
    ):
        if key != "enc/emb" or not variant:
            np.testing.assert_allclose(ours[valid], io[prefix + key][valid], rtol=0, atol=5e-5, err_msg=key)
    assert abs(out["loss"] - io[f"{prefix}loss_mod/total"]) <= 1e-5
    for name, logits in out["logits"].items() if not variant else ():
        np.testing.assert_allclose(logits, io[f"out/logits_own/{name}"], rtol=0, atol=5e-5, err_msg=name)
        assert abs(out["losses"][name] - io[f"out/loss_mod/{name}"]) <= 1e-5, name


# ---- models of random weights


def reduced(name: str, **changes: Any) -> Modality:
    """A released modality, smaller."""
    return dataclasses.replace(released(name), **changes, **({"max_tokens": 0} if "grid" in changes else {}))


def tokens(name: str, codes: int, edge: int) -> Modality:
    return reduced(name, vocab_size=codes, grid=(edge, edge))


def text(name: str, codes: int, length: int, **changes: Any) -> Modality:
    return reduced(name, vocab_size=codes, max_tokens=length, **changes)


@dataclasses.dataclass
class Case:
    """One model and batch.

    Attributes:
      modalities: what the model knows; the importer is told so only if it cannot find out (``told``).
      options: the reference's configuration where it differs from `PLAIN`.
      order: of the batch's modalities in the encoder; ``decoder_order`` in the decoder, default the same.
      tokens: slots of encoder and decoder.
      own: fields of fm4m's model that the reference has no name for, as ``fm4m.json`` says them.
      hub: leave out shared tensors, as the reference's upload does.
    """

    modalities: ModalitySet
    options: dict[str, Any]
    order: list[str]
    decoder_order: list[str] | None = None
    told: bool = False
    tokens: tuple[int, int] = (24, 24)
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    hub: bool = False


NO_BIAS = dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), False)
PLAIN = {
    "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_ratio": 4.0, **NO_BIAS, "act_layer": "SiLU",
    "gated_mlp": True, "qk_norm": False, "decoder_causal_mask": False, "decoder_sep_mask": True,
    "num_register_tokens": 0, "share_modality_embeddings": True,
}  # fmt: skip
ALL_BIASES = dict.fromkeys(NO_BIAS, True)

RGB = reduced("rgb@224", grid=(3, 3), patch_size=4)
RGB_TOKENS, DEPTH = tokens("tok_rgb@224", 40, 3), tokens("tok_depth@224", 130, 3)
# A file does not say how long its sequences are; where a test needs other lengths than the released ones it says so.
CAPTION, DET = text("caption", 50, 10), text("det", 30, 8)
SMALL = ModalitySet((RGB, RGB_TOKENS, DEPTH, CAPTION, DET))
SMALL_ORDER = ["caption", "det", "rgb@224", "tok_depth@224", "tok_rgb@224"]
LARGE_TOKENS = tokens("tok_rgb@448", 40, 6)
GRIDS = ModalitySet(
    (reduced("rgb@448", grid=(6, 6), patch_size=4), RGB, LARGE_TOKENS, RGB_TOKENS, tokens("tok_clip@448", 24, 6)),
    outputs=("tok_rgb@448", "tok_clip@448"),
)
KINDS = ModalitySet((
    CAPTION, reduced("t5_caption", channels=12, max_tokens=9), text("metadata", 30, 6),
    text("human_poses", 45, 14, max_positions=5), text("color_palette", 20, 5), RGB, RGB_TOKENS,
    tokens("tok_dinov2@224", 35, 4), reduced("tok_dinov2_global", vocab_size=25),
    reduced("tok_imagebind_global", vocab_size=22),
))  # fmt: skip
KINDS_ORDER = sorted(KINDS.names)

CASES = {
    "gelu_all_biases": Case(
        ModalitySet((RGB_TOKENS, CAPTION, DEPTH)),
        {"gated_mlp": False, "act_layer": "GELU", **ALL_BIASES, "share_modality_embeddings": False, "encoder_depth": 2},
        ["tok_depth@224", "caption", "tok_rgb@224"],
    ),
    "qk_norm_registers": Case(
        SMALL, {"dim": 24, "num_heads": 3, "qk_norm": True, "num_register_tokens": 4, "decoder_depth": 2}, SMALL_ORDER
    ),
    "qk_norm_norm_bias": Case(
        SMALL, {"qk_norm": True, "norm_bias": True, "qkv_bias": True}, SMALL_ORDER, tokens=(60, 50), hub=True
    ),
    "gelu_gate_mixed_biases_no_sep": Case(
        SMALL,
        {"act_layer": "GELU", "qkv_bias": True, "mlp_bias": True, "mlp_ratio": 3.0, "decoder_sep_mask": False},
        SMALL_ORDER,
        ["tok_rgb@224", "det", "tok_depth@224", "caption"],
        hub=True,
    ),
    "proj_bias_alone_floored_ratio": Case(SMALL, {"dim": 20, "mlp_ratio": 2.57, "proj_bias": True}, SMALL_ORDER[::-1]),
    "kinds_of_4m21": Case(
        KINDS, {"share_modality_embeddings": False}, KINDS_ORDER, KINDS_ORDER[::-1], told=True, tokens=(80, 90)
    ),
    "kinds_of_4m21_truncated": Case(KINDS, {}, KINDS_ORDER, told=True, tokens=(21, 23), hub=True),
    "causal": Case(SMALL, {"decoder_causal_mask": True, "dim": 32, "num_heads": 4}, SMALL_ORDER, SMALL_ORDER[::-1]),
    "causal_no_sep": Case(SMALL, {"decoder_causal_mask": True, "decoder_sep_mask": False}, SMALL_ORDER),
    "padded_gated_mlp": Case(SMALL, {"mlp_bias": True}, SMALL_ORDER, own={"mlp_multiple": 16}),
    "padded_gelu_mlp": Case(
        SMALL,
        {"mlp_bias": True, "gated_mlp": False, "act_layer": "GELU", "mlp_ratio": 2.7, "decoder_depth": 2},
        SMALL_ORDER,
        own={"mlp_multiple": 8, "scan_group": 0},
    ),
    "two_resolutions": Case(GRIDS, {"encoder_depth": 2, "decoder_depth": 2}, sorted(GRIDS.names), tokens=(40, 50)),
}


def reference_config(case: Case) -> dict[str, Any]:
    # 4M-21's files list embeddings among the outputs, which have no decoder.
    extra = [m.name for m in case.modalities.modalities if m.kind == "embedding"]
    domains = {"domains_in": list(case.modalities.inputs), "domains_out": [*case.modalities.outputs, *extra]}
    return PLAIN | case.options | domains | {"image_size": 224, "patch_size": 16}


def random_state(config: dict[str, Any], modalities: ModalitySet, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A state dict in the reference's naming. Norms differ from 1, biases from 0; embeddings are about as large as
    positions, so that a wrong row shows."""
    dim, state = config["dim"], {}
    hidden = int(dim * config["mlp_ratio"])
    hidden = int(2 * hidden / 3) if config["gated_mlp"] else hidden

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        state[f"{name}.weight"] = normal(outputs, inputs, scale=inputs**-0.5)
        if bias:
            state[f"{name}.bias"] = normal(outputs, scale=0.3)

    def norm(name: str, width: int = dim) -> None:
        state[f"{name}.weight"] = 1 + normal(width, scale=0.2)
        state[f"{name}.bias"] = normal(width, scale=0.2) if config["norm_bias"] else np.zeros(width, np.float32)

    def attention(name: str, **projections: int) -> None:
        for part, outputs in projections.items():
            linear(f"{name}.{part}", outputs * dim, dim, config["qkv_bias"])
        linear(f"{name}.proj", dim, dim, config["proj_bias"])
        for part in ("q_norm", "k_norm") if config["qk_norm"] else ():
            norm(f"{name}.{part}", dim // config["num_heads"])

    def mlp(name: str) -> None:
        linear(f"{name}.fc1", hidden, dim, config["mlp_bias"])
        linear(f"{name}.fc2", dim, hidden, config["mlp_bias"])
        if config["gated_mlp"]:
            linear(f"{name}.fc3", hidden, dim, config["mlp_bias"])

    for i in range(config["encoder_depth"]):
        norm(f"encoder.{i}.norm1")
        attention(f"encoder.{i}.attn", qkv=3)
        norm(f"encoder.{i}.norm2")
        mlp(f"encoder.{i}.mlp")
    norm("encoder_norm")
    linear("decoder_proj_context", dim, dim, True)
    for i in range(config["decoder_depth"]):
        for part in ("norm1", "query_norm", "context_norm", "norm2"):
            norm(f"decoder.{i}.{part}")
        attention(f"decoder.{i}.self_attn", qkv=3)
        attention(f"decoder.{i}.cross_attn", q=1, kv=2)
        mlp(f"decoder.{i}.mlp")
    norm("decoder_norm")
    state["mask_token"] = normal(1, 1, dim)
    if config["num_register_tokens"]:
        # As small as they start in training: the one place where the epsilon of the norms shows.
        state["register_tokens"] = normal(1, config["num_register_tokens"], dim, scale=0.02)
    for side, names in (("encoder_embeddings", modalities.inputs), ("decoder_embeddings", modalities.outputs)):
        for name in names:
            m, prefix = modalities[name], f"{side}.{name}"
            shared = state.get(f"encoder_embeddings.{name}.mod_emb") if config["share_modality_embeddings"] else None
            state[f"{prefix}.mod_emb"] = normal(1, 1, dim) if shared is None else shared
            if m.learned_positions:
                state[f"{prefix}.pos_emb"] = normal(1, m.max_tokens, dim)
            else:
                table = reference_model.sincos_2d(m.grid[0], dim) if m.grid else reference_model.sincos_1d(512, dim)
                state[f"{prefix}.pos_emb"] = table.astype(np.float32)
            if m.kind == "pixels":
                linear(f"{prefix}.proj", dim, m.patch_size**2 * 3, False)
            elif m.kind == "embedding":
                linear(f"{prefix}.emb_proj", dim, m.channels, True)
            else:
                state[f"{prefix}.token_emb.weight"] = normal(m.vocab_size, dim)
                if side == "decoder_embeddings":
                    state[f"{prefix}.to_logits.weight"] = normal(m.vocab_size, dim, scale=dim**-0.5)
    return state


def random_batch(case: Case, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """Masked as the reference does: cells of a grid are seen, asked for, or neither; a sequence's tokens are seen in
    its first part and asked for in runs of the second. The last sample has no targets in the first output, and
    nothing asks for the last of three or more."""
    batch, outputs = {}, [name for name in case.order if name in case.modalities.outputs]
    for name in case.order:
        m = case.modalities[name]
        length = 2 * (m.max_tokens + 1) if m.kind == "sequence" else m.max_tokens
        hidden, unasked = np.ones((BATCH, length), bool), np.ones((BATCH, length), bool)
        for b in range(BATCH):
            if m.grid:
                use = rng.integers(0, 3, length)
                hidden[b], unasked[b] = use != 0, use != 1
            elif m.kind == "sequence":
                half = m.max_tokens + 1
                hidden[b, :half] = rng.random(half) < 0.6
                gap = half + rng.integers(2, half - 1)
                unasked[b, half:] = False
                unasked[b, gap] = True
            else:
                hidden[b] = np.arange(length) >= rng.integers(2, length)
        if name == outputs[0]:
            unasked[-1] = True
        if name == outputs[-1] and len(outputs) > 2:
            unasked[:] = True
        if m.kind == "pixels":
            tensor = rng.standard_normal((BATCH, 3, *(g * m.patch_size for g in m.grid))).astype(np.float32)
        elif m.kind == "embedding":
            tensor = rng.standard_normal((BATCH, length, m.channels)).astype(np.float32)
        else:
            shape = m.grid if m.grid and not m.learned_positions else (length,)
            tensor = rng.integers(0, m.vocab_size, (BATCH, *shape))
        batch[name] = {"tensor": tensor, "input_mask": hidden, "target_mask": unasked}
    return batch


def write(folder: pathlib.Path, case: Case, state: dict[str, np.ndarray]) -> None:
    metadata, stored = {key: str(value) for key, value in reference_config(case).items()}, dict(state)
    if case.hub and reference_config(case)["share_modality_embeddings"]:
        for name in set(case.modalities.inputs) & set(case.modalities.outputs):
            del stored[f"encoder_embeddings.{name}.mod_emb"]
            metadata[f"encoder_embeddings.{name}.mod_emb"] = f"decoder_embeddings.{name}.mod_emb"
    save_file(stored, folder / "model.safetensors", metadata)
    if case.own:
        described = {"modalities": case.modalities.to_dict(), "model": case.own}
        (folder / "fm4m.json").write_text(json.dumps(described))


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_logits_and_losses(name, tmp_path):
    case, rng = CASES[name], np.random.default_rng(7)
    stated, known = reference_config(case), case.modalities
    state, inputs = random_state(stated, known, rng), random_batch(case, rng)
    kinds = {"sequence": "seq", "embedding": "seq_emb"}
    info = {m.name: {"type": kinds.get(m.kind, "img"), "max_length": m.max_positions or m.max_tokens}
            for m in known.modalities}  # fmt: skip
    decoder_order = [n for n in case.decoder_order or case.order if n in known.outputs]
    expected = reference_model.forward(state, stated, info, inputs, *case.tokens, decoder_order)

    write(tmp_path, case, state)
    loaded = fm4m.load(tmp_path, modalities=known if case.told else None)
    config, modalities, params = dataclasses.replace(loaded.config, dtype="float32"), loaded.modalities, loaded.params
    assert all(getattr(config, field) == value for field, value in case.own.items())
    assert modalities.outputs == known.outputs and modalities.inputs == known.inputs
    batch = pack(inputs, modalities, case.order, *case.tokens, decoder_order=decoder_order)

    @jax.jit
    def run(params, batch):
        encoded = encode(params, config, modalities, batch.encoder, batch.dense)
        hidden = decode(params, config, modalities, encoded, batch.decoder)
        sums, counts = cross_entropy_sums(hidden, head_table(params, config), batch, modalities)
        loss = (modality_weights(counts, modalities) * sums).sum()
        return encoded, hidden, dense(decoder_visibility(config, modalities, batch.decoder)), sums, counts, loss

    encoded, hidden, sees, sums, counts, loss = jax.tree.map(np.asarray, run(params, batch))
    seen, asked = encoded.valid, batch.decoder.valid
    np.testing.assert_array_equal(seen, ~expected["encoder"]["mask"])
    np.testing.assert_array_equal(asked, expected["decoder"]["modality"] >= 0)
    own = {n: asked & (batch.decoder.modality == modalities.index(n)) for n in decoder_order}
    for i, n in enumerate(decoder_order):
        np.testing.assert_array_equal(own[n], expected["decoder"]["modality"] == i, err_msg=n)
    pairs = asked[:, :, None] & asked[:, None, :]
    np.testing.assert_array_equal(sees[pairs], ~expected["decoder"]["may_not"][pairs])
    close = {"rtol": 0, "atol": 5e-5}
    np.testing.assert_allclose(encoded.embedding[seen], expected["encoder"]["emb"][seen], **close)
    np.testing.assert_allclose(encoded.hidden[seen], expected["encoder"]["out"][seen], **close)
    np.testing.assert_allclose(hidden[asked], expected["decoder"]["out"][asked], **close)
    head = np.asarray(head_table(params, config))
    for n in decoder_order:
        i = modalities.index(n)
        start, stop = modalities.output_ranges[i]
        np.testing.assert_array_equal(batch.target[own[n]] - start, expected["decoder"]["target_ids"][own[n]])
        np.testing.assert_allclose(hidden[own[n]] @ head[start:stop].T, expected["logits"][n], **close, err_msg=n)
        assert abs(sums[i] / max(counts[i], 1) - expected["losses"][n]) <= 1e-5, n
    assert abs(loss - expected["loss"]) <= 1e-5
    # There was something to compare: many tokens, and every output but the one without targets, unless cut off.
    empty = [n for n in decoder_order if not own[n].any()]
    assert seen.sum() > 20 and asked.sum() > 20 and (len(empty) <= 1 or asked.all(1).any())


def test_the_cases_cover_padding_truncation_and_late_positions():
    """Slots left over, tokens cut off, decoder positions past `max_positions`: each in some case."""
    padded = cut = late = 0
    for case in CASES.values():
        rng = np.random.default_rng(7)
        random_state(reference_config(case), case.modalities, rng)
        inputs = random_batch(case, rng)
        for n, m in ((n, case.modalities[n]) for n in case.modalities.outputs):
            late += bool(m.max_positions) and (~inputs[n]["target_mask"]).sum(1).max() > m.max_positions
        totals = [sum((~inputs[n]["input_mask"]).sum(1) for n in case.modalities.inputs)]
        totals.append(sum((~inputs[n]["target_mask"]).sum(1) for n in case.modalities.outputs))
        padded += all((total < slots).any() for total, slots in zip(totals, case.tokens))
        cut += all((total > slots + 4).any() for total, slots in zip(totals, case.tokens))
    assert padded and cut and late
