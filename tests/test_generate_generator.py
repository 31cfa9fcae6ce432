"""Chains of targets: what is kept, what is drawn, what is refused; the same on one and on several devices."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CONFIG

from fm4m import model
from fm4m.batch import Tokens
from fm4m.generate import Condition, Generator, Target, cached, engine, make_canvas, sampling
from fm4m.generate.canvas import encoder_tokens, without
from fm4m.modalities import FIRST_SENTINEL_ID, Modality, ModalitySet

S1 = FIRST_SENTINEL_ID
SET = ModalitySet(
    (
        Modality("rgb", "pixels", grid=(2, 2), patch_size=4, channels=3),
        Modality("depth", "tokens", 20, (2, 3)),
        Modality("caption", "sequence", 260, max_tokens=7),
    )
)


@pytest.fixture(scope="module")
def generator():
    params = jax.tree.map(lambda x: 3.0 * x, model.init_params(CONFIG, SET, jax.random.key(0)))
    return Generator(params, CONFIG, SET)


def given(size=4, **more):
    rng = np.random.default_rng(0)
    return make_canvas(SET, {"rgb": rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8), **more})


def codes(canvas, name="depth"):
    return np.asarray(canvas.ids[name])


def test_the_cached_decoder_gives_what_the_whole_prefix_gives(generator):
    canvas = given(2)
    ids = np.array([[S1, 220, 230, 211, 9], [S1, 233, 221, 8, 8]])
    rows, at = ids + SET.output_offset["caption"], SET.index("caption")
    place = np.broadcast_to(np.arange(5) + SET.position_offset["caption"], ids.shape)
    numbers = (jnp.asarray(x, jnp.int32) for x in (rows, np.full_like(ids, at), place))
    query = Tokens(*numbers, jnp.ones(ids.shape, bool))
    params = generator.params
    encoded = model.encode(params, CONFIG, SET, encoder_tokens(canvas, SET), canvas.dense)
    whole = model.decode(params, CONFIG, SET, encoded, query)
    layers = cached.layers_of(params, CONFIG)
    cache = cached.start(params, CONFIG, layers, encoded, 5)
    for t in range(5):
        token = jax.tree.map(lambda x, t=t: x[:, t : t + 1], query)
        hidden, cache = cached.step(params, CONFIG, SET, layers, cache, token, jnp.asarray(t))
        np.testing.assert_allclose(hidden, whole[:, t], atol=2e-5)


def test_branches_of_different_sizes_and_registers_change_nothing(generator):
    config = dataclasses.replace(CONFIG, num_register_tokens=3)
    params = model.init_params(config, SET, jax.random.key(1))
    canvas = given(2)
    branches = (without(canvas, SET, ["rgb"]), canvas)
    one, other = (engine.encode(params, config, SET, branches, slots) for slots in ((4, 4), (1, 4)))
    assert one.hidden.shape == (4, 7, CONFIG.dim) and one.valid.sum() == other.valid.sum() == 4 * 3 + 2 * 4
    seen = np.asarray(one.valid)
    np.testing.assert_allclose(np.asarray(one.hidden)[seen], np.asarray(other.hidden)[seen], atol=1e-5)


@pytest.mark.parametrize("scheme", ["roar", "maskgit"])
def test_given_cells_stay_and_all_are_written(generator, scheme):
    # Samples may have different numbers of open cells.
    partial = np.array([[1, -1, -1, 4, -1, -1], [-1] * 6, [7, 8, 9, 10, 11, -1], [0] * 6])
    out = generator(given(depth=partial), [Target("depth", scheme, steps=3)], seed=1)
    assert np.asarray(out.seen["depth"]).all()
    assert (codes(out)[partial >= 0] == partial[partial >= 0]).all()


def test_a_sample_is_drawn_alike_whatever_its_neighbours(generator):
    targets = [Target("depth", steps=2), Target("caption", temperature=2.0)]
    four, two = (generator(given(size), targets, seed=3) for size in (4, 2))
    same = given(4)
    same = generator(jax.tree.map(lambda x: x[:2], same), targets, seed=3)
    np.testing.assert_array_equal(codes(four)[:2], codes(same))
    np.testing.assert_array_equal(codes(four, "caption")[:2], codes(same, "caption"))
    assert codes(two).shape == (2, 6)
    other = generator(given(4), targets, seed=4)
    assert (codes(four) != codes(other)).any()


def test_guidance_of_one_and_weights_of_nothing_change_nothing(generator):
    greedy = Target("depth", steps=2, temperature=0.0)
    plain = codes(generator(given(), [greedy]))
    weighted = codes(generator(given(), [greedy], conditions=[Condition(1.0, ("rgb",))]))
    np.testing.assert_array_equal(plain, weighted)
    assert (codes(generator(given(), [Target("depth", steps=2, temperature=0.0, guidance=8.0)])) != plain).any()


def test_another_value_of_a_condition_replaces_that_value_alone(generator):
    greedy = [Target("depth", steps=2, temperature=0.0)]
    both = given(caption=[[220, 230, 9]] * 4)
    same = make_canvas(SET, {"caption": [[220, 230, 9]] * 4, "depth": np.ones((4, 6), int)})
    one, other = (
        codes(generator(both, greedy, conditions=[Condition(2.0, ("caption",), instead=instead)]))
        for instead in (None, same)
    )
    np.testing.assert_array_equal(one, other)
    changed = make_canvas(SET, {"caption": [[240, 250, 9]] * 4})
    assert (codes(generator(both, greedy, conditions=[Condition(2.0, ("caption",), instead=changed)])) != one).any()


@pytest.mark.parametrize(("steps", "kind"), [(9, "onex:0.5:0.5"), (7, "decreasing:0"), (4, "linear")])
def test_a_cosine_may_have_more_steps_than_there_are_cells(generator, steps, kind):
    counts = []
    partial = np.array([[1, -1, -1, 4, -1, -1], [-1] * 6, [7, 8, 9, 10, 11, -1], [0, -1, 0, 0, 0, 0]])
    target = Target("depth", "maskgit", steps=steps, temperature=2.0, temperature_schedule=kind)
    for canvas in (given(), given(depth=partial), given(depth=partial[[2, 2, 2, 2]])):
        out = generator(canvas, [target], progress=lambda *told: counts.append(told))
        assert np.asarray(out.seen["depth"]).all()
    assert all(done <= of for _, done, of in counts)


def test_matrices_are_not_split(generator):
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 2}, size=2)
    with pytest.raises(ValueError, match="'tensor' has 2 devices, expected 1"):
        Generator(generator.params, CONFIG, SET, mesh)


def test_gaps_of_a_text_are_filled_and_the_rest_stays(generator):
    texts = [[220, S1], [S1], [S1, 230, S1 + 1], [S1]]
    out = generator(given(caption=texts), [Target("caption", temperature=1.5)], seed=2)
    for text, ids, seen in zip(texts, codes(out, "caption"), np.asarray(out.seen["caption"]), strict=True):
        words = ids[seen].tolist()
        assert not {S1, S1 + 1} & set(words)
        # Of the three kinds of text here, the given word stands first or is the only one that must be there.
        assert text[0] == S1 or words[0] == text[0]
        assert set(text) - {S1, S1 + 1} <= set(words)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ({}, [Target("rgb")], "no output modality of this model named 'rgb'"),
        ({}, [Target("depht")], "Did you mean 'depth'"),
        ({}, [Target("depth", "autoregressive")], "must be roar or maskgit"),
        ({}, [Target("depth", steps=0)], "at least one step"),
        ({}, [Target("depth", temperature_schedule="onex:1")], "'onex:1' is not one of"),
        ({}, [Target("depth", top_p=1.5)], "top_p = 1.5"),
        ({}, [Target("depth", guidance=float("nan"))], "guidance = nan must be a finite number"),
        ({}, [Target("caption", temperature=-1.0)], "temperature = -1.0 must be at least 0"),
        ({}, [Target("caption", max_tokens=9)], "must be 0 or from 2 to 7"),
        ({}, [Target("depth", guidance=2.0, conditions=("caption",))], "no given modality named 'caption'"),
        ({"depth": np.zeros((4, 6), int)}, [Target("depth")], "complete in every sample"),
        ({"caption": [[220, 221]] * 4}, [Target("caption")], "sample 0.* has none: nothing is left"),
        ({"caption": [[S1 + 1]] * 4}, [Target("caption")], "other numbers"),
        ({"caption": [[220] * 8] * 4}, [Target("depth")], "8 tokens, at most 7 fit"),
        ({"depth": np.full((4, 6), 20)}, [Target("caption")], "codes must be from 0 to 19"),
        ({"depth": np.zeros((4, 7), int)}, [Target("caption")], r"expected integers \[B, 6\]"),
        ({"depth": np.zeros((3, 6), int)}, [Target("caption")], "different numbers of samples"),
        ({"dept": np.zeros((4, 6), int)}, [Target("caption")], "Did you mean 'depth'"),
        ({"rgb": np.zeros((4, 9, 8, 3), np.uint8)}, [Target("depth")], "crop and resize first"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(generator, inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        generator(given(**inputs), targets)


def test_filters_keep_the_token_that_crosses_the_limit():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = [np.isfinite(sampling.keep(logits, sampling.Filter(top_p=p)))[0].sum() for p in (0.0, 0.4, 0.6, 0.9)]
    assert kept == [4, 1, 2, 3]
    assert np.isfinite(sampling.keep(logits, sampling.Filter(top_k=0.5)))[0].sum() == 2


def test_sampling_follows_the_distribution():
    probabilities = np.array([0.6, 0.3, 0.1])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (2, 20000, 3))
    tokens, chance = sampling.sample(jax.random.split(jax.random.key(0)), logits, 1.0, sampling.Filter())
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=3) / 40000
    np.testing.assert_allclose(counts, probabilities, atol=0.01)
    np.testing.assert_allclose(np.asarray(chance), probabilities[np.asarray(tokens)], rtol=1e-5)


def test_samples_split_among_devices_come_out_alike(generator, tmp_path):
    targets = [Target("depth", steps=2, guidance=2.0), Target("caption", temperature=0.0)]
    out = generator(given(4), targets, seed=5)
    np.savez(tmp_path / "one.npz", depth=codes(out), caption=codes(out, "caption"))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    code = (
        "import numpy as np, jax, test_generate_generator as t\n"
        "from fm4m import model, sharding\n"
        "from fm4m.generate import Generator, Target\n"
        "params = jax.tree.map(lambda x: 3.0 * x, model.init_params(t.CONFIG, t.SET, jax.random.key(0)))\n"
        "generator = Generator(params, t.CONFIG, t.SET, sharding.make_mesh(2, 2, 1))\n"
        "targets = [Target('depth', steps=2, guidance=2.0), Target('caption', temperature=0.0)]\n"
        "out = generator(t.given(4), targets, seed=5)\n"
        "one = np.load('one.npz')\n"
        "assert (sharding.to_host(out.ids['depth']) == one['depth']).all()\n"
        "assert (sharding.to_host(out.ids['caption']) == one['caption']).all()\n"
        "try: generator(t.given(3), targets)\n"
        "except ValueError as error: assert 'evenly among 4 devices' in str(error); print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-2000:]
