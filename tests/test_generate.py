from __future__ import annotations

import jax
import numpy as np
import pytest

from fm4m import generate, model
from fm4m.batch import PackedBatch, RawBatch, Tokens
from fm4m.modalities import FIRST_SENTINEL_ID, PAD_ID, Modality, ModalitySet

SET = ModalitySet(
    (
        Modality("rgb", "pixels", grid=(2, 2), patch_size=4, channels=3),
        Modality("depth", "tokens", 20, (2, 3)),
        Modality("caption", "sequence", 40, max_tokens=7),
        Modality("states", "embedding", max_tokens=3, channels=5),
    )
)
CONFIG = model.model_config(
    "fm_tiny_6e_6d_swiglu_nobias", dim=64, encoder_depth=2, decoder_depth=2, num_heads=2, dtype="float32"
)
INPUTS = ("rgb", "caption", "states")


@pytest.fixture(scope="module")
def params():
    # Ten times the usual token tables, so that predictions depend on what is shown and not on the first bias.
    params = model.init_params(CONFIG, SET, jax.random.key(0))
    return jax.tree.map(lambda x: 3.0 * x, params)


def raw(seed=0, batch=3):
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([rng.integers(0, 20, (batch, 6)), rng.integers(8, 40, (batch, 7))], 1).astype(np.uint16)
    length = np.stack([np.full(batch, 4), np.full(batch, 6), rng.integers(0, 8, batch), rng.integers(0, 4, batch)], 1)
    dense = {
        "rgb": rng.integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8),
        "states": rng.normal(size=(batch, 3, 5)).astype(np.float16),
    }
    return RawBatch(tokens, length.astype(np.int16), np.zeros(batch, np.uint8), dense)


def forward(params, batch, decoder: Tokens, sample: int) -> np.ndarray:
    """Hidden states of one sample, whose visible tokens are laid out by hand."""
    rows, index, positions = [], [], []
    for name in INPUTS:
        i = SET.index(name)
        for cell in range(batch.length[sample, i]):
            if SET[name].discrete:
                row = SET.input_offset[name] + int(batch.tokens[sample, SET.slot_offset[name] + cell])
            else:
                row = SET.continuous_offset[name] + cell
            rows.append(row)
            index.append(i)
            positions.append(SET.position_offset[name] + cell)
    encoder = Tokens(
        *(np.array([x], np.int32) for x in (rows, index, positions)), np.ones((1, len(rows)), bool)
    )
    _, dense = generate.visible_tokens(batch, SET, INPUTS)
    dense = {k: v[sample : sample + 1] for k, v in dense.items()}
    packed = PackedBatch(encoder, decoder, np.zeros(decoder.row.shape, np.int32), dense)
    return np.asarray(model.forward(params, CONFIG, SET, packed))[0]


def logits(params, name, hidden):
    start, stop = SET.output_ranges[SET.index(name)]
    return hidden @ np.asarray(model.head_table(params, CONFIG))[start:stop].T


def test_a_grid_is_the_argmax_of_every_cell(params):
    batch = raw()
    got = generate.predict(params, CONFIG, SET, batch, INPUTS, ("depth",))["depth"]
    for sample in range(batch.size):
        cells = np.arange(6, dtype=np.int32)[None]
        queries = Tokens(
            np.zeros((1, 6), np.int32),
            np.full((1, 6), SET.index("depth"), np.int32),
            cells + SET.position_offset["depth"],
            np.ones((1, 6), bool),
        )
        want = logits(params, "depth", forward(params, batch, queries, sample)).argmax(-1)
        np.testing.assert_array_equal(got[sample], want)
    assert len({tuple(row) for row in got.tolist()}) > 1, "the prediction must depend on the sample"


def test_a_sequence_equals_decoding_one_token_at_a_time(params):
    batch, inputs = raw(1), INPUTS
    got = generate.predict(params, CONFIG, SET, batch, inputs, ("caption",))["caption"]
    for sample in range(batch.size):
        ids = [FIRST_SENTINEL_ID]
        while len(ids) < 7:
            prefix = np.array([ids], np.int32)
            queries = Tokens(
                prefix + SET.output_offset["caption"],
                np.full_like(prefix, SET.index("caption")),
                np.arange(len(ids), dtype=np.int32)[None] + SET.position_offset["caption"],
                np.ones_like(prefix, dtype=bool),
            )
            ids.append(int(logits(params, "caption", forward(params, batch, queries, sample))[-1].argmax()))
        want = ids[1:]
        if FIRST_SENTINEL_ID + 1 in want:
            want = want[: want.index(FIRST_SENTINEL_ID + 1)]
        np.testing.assert_array_equal(got[sample], want + [PAD_ID] * (7 - len(want)))


def test_what_is_missing_is_not_seen(params):
    batch = raw(2)
    batch.length[0, SET.index("caption")] = 0
    tokens, _ = generate.visible_tokens(batch, SET, INPUTS)
    assert int(tokens.valid[0].sum()) == 4 + batch.length[0, 3]
    assert not (np.asarray(tokens.modality[0])[np.asarray(tokens.valid[0])] == SET.index("caption")).any()
    assert np.all(np.asarray(tokens.valid)[:, 1:] <= np.asarray(tokens.valid)[:, :-1]), "valid tokens come first"


def test_unknown_inputs_and_targets_are_refused(params):
    with pytest.raises(ValueError, match="'rgb' is no output.*depth"):
        generate.predict(params, CONFIG, SET, raw(), INPUTS, ("rgb",))
    with pytest.raises(ValueError, match="'normal' is no input"):
        generate.predict(params, CONFIG, SET, raw(), ("normal",), ("depth",))
