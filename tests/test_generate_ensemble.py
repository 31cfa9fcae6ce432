"""Averages of samples, self-consistency, and growing a picture."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate_generator import SET as SMALL
from test_generate_generator import generator, given  # noqa: F401  (a fixture)
from test_generate_session import SET, loaded, opened  # noqa: F401  (fixtures)

from fm4m import model
from fm4m.batch import Tokens
from fm4m.generate import Target, ensemble, outpaint
from fm4m.generate.canvas import Canvas, encoder_tokens
from fm4m.modalities import EOS_ID, FIRST_SENTINEL_ID


def test_depth_is_aligned_before_it_is_averaged():
    truth = np.random.default_rng(0).normal(size=(8, 8))
    scales, shifts = np.array([0.5, 1.0, 4.0]), np.array([-3.0, 0.0, 7.0])
    samples = truth * scales[:, None, None] + shifts[:, None, None]
    mean = ensemble.mean_depth(samples)
    # All samples are the truth but for scale and shift: so is the average, with their mean scale.
    slope, _ = np.polyfit(truth.ravel(), mean.ravel(), 1)
    assert np.corrcoef(truth.ravel(), mean.ravel())[0, 1] > 1 - 1e-6 and abs(slope - scales.mean()) < 1e-4
    assert np.isfinite(ensemble.mean_depth(np.ones((2, 4, 4)))).all()


def test_normals_keep_unit_length_and_classes_are_voted_for():
    directions = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    stored = np.round((directions + 1) * 127.5).astype(np.uint8)[:, None, None]
    mean = ensemble.mean_normals(stored)[0, 0] / 127.5 - 1
    np.testing.assert_allclose(mean, [2**-0.5, 2**-0.5, 0], atol=0.01)
    votes = np.array([[[5, 1]], [[5, 2]], [[0, 2]], [[7, 1]]], np.uint8)
    assert ensemble.majority(votes).tolist() == [[5, 1]] and ensemble.majority(votes).dtype == np.uint8
    assert ensemble.average_arrays("rgb", np.array([[[[10, 20, 30]]], [[[20, 20, 31]]]])).dtype == np.uint8
    with pytest.raises(ValueError, match="'sound' have no average"):
        ensemble.average_arrays("sound", votes)


def test_the_most_typical_text_is_the_one_most_like_the_others():
    assert ensemble.overlap([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert ensemble.overlap([], []) == 1.0 and ensemble.overlap([], [1]) == 0.0
    assert ensemble.most_typical([[9, 8], [1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 1
    assert ensemble.most_typical([[4]]) == 0


def test_likelihood_is_what_the_model_says_of_each_token(generator):  # noqa: F811
    canvas = given(3)
    text = np.array([[220, 231, EOS_ID, 0, 0, 0, 0], [225, FIRST_SENTINEL_ID, 240, 0, 0, 0, 0], [0] * 7])
    known = np.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7], bool)
    ids, seen = jnp.asarray(text, jnp.int32), jnp.asarray(known)
    got = ensemble.log_likelihood(generator, canvas, "caption", ids, seen)
    # Once more by hand: the prompt is one gap, and every token is predicted from those before it.
    gap = np.zeros((3, 7), np.int32)
    gap[:, 0] = FIRST_SENTINEL_ID
    shown = canvas.write("caption", jnp.asarray(gap), jnp.asarray(gap > 0))
    config, m, params = generator.config, SMALL, generator.params
    encode, decode = (jax.jit(f, static_argnums=(1, 2)) for f in (model.encode, model.decode))
    encoded = encode(params, config, m, encoder_tokens(shown, m), shown.dense)
    before = np.concatenate([gap[:, :1], text[:, :-1]], 1)
    place = np.broadcast_to(np.arange(7) + m.position_offset["caption"], (3, 7))
    rows = (before + m.output_offset["caption"], np.full((3, 7), m.index("caption")), place)
    query = Tokens(*(jnp.asarray(r, jnp.int32) for r in rows), jnp.ones((3, 7), bool))
    logits = model.own_logits(params, config, m, "caption", decode(params, config, m, encoded, query))
    logs = np.asarray(jax.nn.log_softmax(logits))
    expected = [np.mean([logs[0, t, text[0, t]] for t in range(3)]), logs[1, 0, 225], 0.0]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot predict back.*'rgb'"):
        ensemble.log_likelihood(generator, canvas, "rgb", ids, seen)


def test_what_the_model_finds_likely_scores_higher(generator):  # noqa: F811
    canvas = given(2)
    greedy = generator(canvas, [Target("depth", steps=1, temperature=0.0)])
    codes, seen = greedy.ids["depth"], greedy.seen["depth"]
    other = codes.at[1].set((codes[1] + 7) % 20)
    best, worse = (ensemble.log_likelihood(generator, canvas, "depth", c, seen) for c in (codes, other))
    assert best[0] == pytest.approx(worse[0]) and best[1] > worse[1]


def test_self_consistent_samples_come_best_first(generator):  # noqa: F811
    session = types.SimpleNamespace(generator=generator, modalities=SMALL)
    session.read = lambda inputs, copies: given(copies, **{k: np.stack([v] * copies) for k, v in inputs.items()})
    session.name_of = lambda name, side: name
    inputs, target = {"depth": np.arange(6)}, Target("caption", temperature=40.0)
    kept, scores = ensemble.self_consistent(session, inputs, [target], samples=4, keep=4, seed=1)
    drawn = generator(session.read(inputs, 4), [target], seed=1)
    order = np.argsort(-scores, kind="stable")
    np.testing.assert_array_equal(np.asarray(kept.ids["caption"]), np.asarray(drawn.ids["caption"])[order])
    assert scores.shape == (4,) and len(set(scores.tolist())) > 1 and (scores < 0).all()
    again = ensemble.consistency(generator, session.read(inputs, 4), kept, ["caption"])
    np.testing.assert_allclose(again, np.sort(scores)[::-1], rtol=1e-5)
    with pytest.raises(ValueError, match="keep = 5 must be from 1"):
        ensemble.self_consistent(session, inputs, [target], samples=4, keep=5)
    with pytest.raises(ValueError, match="needs a given modality that the model can output"):
        ensemble.self_consistent(session, {}, [Target("depth")], samples=2)


def test_a_prediction_is_one_array_and_one_text(opened):  # noqa: F811
    out = ensemble.predict(opened, {"det": "bed"}, [Target("tok_depth@64", steps=1), "caption"], samples=3)
    assert out["tok_depth@64"].shape == (64, 64) and np.isfinite(out["tok_depth@64"]).all()
    assert isinstance(out["caption"], str)
    with pytest.raises(ValueError, match="must be at least 1"):
        ensemble.predict(opened, {"det": "bed"}, ["depth"], samples=0)


@pytest.mark.parametrize(
    ("side", "kept", "free"),
    [("right", [[2], [5]], [1, 2]), ("left", [[0], [3]], [0, 1])],
)
def test_codes_move_and_the_rest_opens(side, kept, free):
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    canvas = Canvas({"depth": ids}, {"depth": ids >= 0}, {})
    out = outpaint.shift(SMALL, canvas, "depth", side, 2)
    seen = np.asarray(out.seen["depth"]).reshape(2, 3)
    codes = np.asarray(out.ids["depth"]).reshape(2, 3)
    assert codes[seen].reshape(2, 1).tolist() == kept
    assert (~seen).all(0).nonzero()[0].tolist() == free
    down = outpaint.shift(SMALL, canvas, "depth", "bottom", 1)
    assert np.asarray(down.ids["depth"])[0, :3].tolist() == [3, 4, 5]
    for bad, message in ((("depth", "right", 3), "by 1 to 2 cells"), (("depth", "up", 1), "one of left")):
        with pytest.raises(ValueError, match=message):
            outpaint.shift(SMALL, canvas, *bad)


def test_a_picture_grows_by_the_share_and_keeps_its_codes(opened):  # noqa: F811
    inputs = {"depth": np.arange(64, dtype=np.int64), "caption": "a bed", "det": "v0=1 v1=1 v2=9 v3=9 bed"}
    target = Target("tok_depth@64", steps=1)
    out = outpaint.outpaint(opened, inputs, [target], "right", share=0.25, times=2)
    assert out.pictures["tok_depth@64"][0].shape == (64, 96, 3)
    codes = np.asarray(out.canvas.ids["tok_depth@64"]).reshape(8, 8)
    assert (codes[:, :4] == np.arange(64).reshape(8, 8)[:, 4:]).all()
    assert "caption" in out.canvas.seen and "det" not in out.canvas.seen
    for bad, message in (({"share": 0.3}, "whole number of the 8 cells"), ({"times": 0}, "times = 0")):
        with pytest.raises(ValueError, match=message):
            outpaint.outpaint(opened, inputs, [target], "right", **bad)
    with pytest.raises(ValueError, match="expected a modality of codes that is given"):
        outpaint.outpaint(opened, {"caption": "a bed"}, [target], "right")
