"""Several samples of one prediction: averaged, or ranked by how well they explain what they were predicted from.

A sampled prediction is one guess among many. For tasks with one right answer the samples' average is the better guess
(`predict`); where an average means nothing, the samples can be ranked by self-consistency (`self_consistent`): a
sample is as good as the given modalities can be predicted back from it alone.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m import model as model_lib
from fm4m.batch import Tokens
from fm4m.generate import presets
from fm4m.generate.canvas import Canvas, encoder_tokens
from fm4m.generate.generator import Generator, Target
from fm4m.generate.session import Session
from fm4m.modalities import FIRST_SENTINEL_ID, NUM_SENTINELS, ModalitySet, unknown_name

AVERAGED = ("depth", "normal", "semseg", "rgb", "edges", "mask", "features", "vector")


# ---- averages


def mean_depth(samples: np.ndarray) -> np.ndarray:
    """The mean of relative depth maps float [S, H, W], aligned: float32 [H, W].

    Relative depth is known up to a scale and a shift, and two samples may differ in both. Each is brought to median 0
    and mean absolute deviation 1 (Ranftl et al. 2022, section 5); the mean gets the samples' average scale and shift.
    Unlike a fit to one of the samples, this treats all alike.
    """
    samples = np.asarray(samples, np.float64)
    shift = np.median(samples, axis=(1, 2), keepdims=True)
    scale = np.maximum(np.abs(samples - shift).mean(axis=(1, 2), keepdims=True), 1e-6)
    return (((samples - shift) / scale).mean(0) * scale.mean() + shift.mean()).astype(np.float32)


def mean_normals(samples: np.ndarray) -> np.ndarray:
    """The mean direction of normals uint8 [S, H, W, 3], unit length again: uint8 [H, W, 3]."""
    vectors = np.asarray(samples, np.float64) / 127.5 - 1.0
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)
    mean = vectors.mean(0)
    mean /= np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return np.round((mean + 1.0) * 127.5).astype(np.uint8)


def majority(samples: np.ndarray) -> np.ndarray:
    """The most frequent class of every pixel of uint8 [S, H, W], of equally frequent ones the smallest: [H, W]."""
    samples = np.asarray(samples)
    classes = np.unique(samples)
    # One class after the other: counting all at once would take as many arrays as there are classes.
    best, votes = np.zeros(samples.shape[1:], samples.dtype), np.zeros(samples.shape[1:], np.int64)
    for number in classes:
        count = (samples == number).sum(0)
        best, votes = np.where(count > votes, number, best), np.maximum(count, votes)
    return best.astype(samples.dtype)


def average_arrays(domain: str, samples: np.ndarray) -> np.ndarray:
    """The average of decoded arrays [S, ...] of one image, in the stored form of a tokenizer's domain.

    Raises ValueError for a domain that has no average.
    """
    if domain not in AVERAGED:
        raise ValueError(f"arrays of domain {domain!r} have no average; known: {', '.join(AVERAGED)}")
    special = {"depth": mean_depth, "normal": mean_normals, "semseg": majority, "mask": majority}
    if domain in special:
        return special[domain](samples)
    mean = np.asarray(samples, np.float64).mean(0)
    return np.round(mean).astype(np.uint8) if domain in ("rgb", "edges") else mean.astype(np.float32)


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """F1 of two texts' tokens, counted with their multiplicity: 1 for the same words, 0 for none in common."""
    if not one or not other:
        return float(len(one) == len(other))
    common = (collections.Counter(one) & collections.Counter(other)).total()
    return 2.0 * common / (len(one) + len(other))


def most_typical(texts: Sequence[Sequence[int]]) -> int:
    """Index of the text whose mean `overlap` with the other ones is highest; the first of equally good ones."""
    similarity = np.array([[overlap(a, b) for b in texts] for a in texts])
    np.fill_diagonal(similarity, 0.0)
    return int(similarity.sum(1).argmax())


def combine(session: Session, canvas: Canvas, name: str) -> np.ndarray | str:
    """What all samples of a canvas say together about one generated modality.

    Args:
      session: with the modality's tokenizer.
      canvas: samples of one input, at least one.
      name: a modality that was generated.

    Returns:
      The average of a grid in its tokenizer's stored form (see `average_arrays`), or of a sequence the text that is
      most like the others.

    Raises:
      ValueError: no tokenizer, or nothing that can be averaged.
    """
    if name not in session.showers:
        raise ValueError(f"{name!r} has no tokenizer: pass --tokenizer={name}=KIND:FILE")
    ids, shower = np.asarray(canvas.ids[name]), session.showers[name]
    if shower.kind == "image":
        return average_arrays(shower.tokenizer.config.domain, shower.tokenizer.decode(ids))
    seen = np.asarray(canvas.seen[name])
    return session.texts(canvas, name)[most_typical([row[s].tolist() for row, s in zip(ids, seen, strict=True)])]


def predict(
    session: Session, inputs: Mapping[str, Any], targets: Sequence[str | Target], *, samples: int = 8, seed: int = 0
) -> dict[str, np.ndarray | str]:
    """Predicts each target ``samples`` times from the same inputs, and combines (see `combine`).

    Args:
      session: the model with its tokenizers.
      inputs: see `Session.read`.
      targets: names, with the presets' settings but a temperature of 1, since equal samples need no average;
        or targets. Each is predicted from the inputs alone, so that errors of one do not enter the others.
      samples: how many.
      seed: of everything drawn.

    Returns:
      By modality, an array in the tokenizer's stored form or a text.
    """
    if samples < 1:
        raise ValueError(f"samples = {samples} must be at least 1")
    canvas = session.read(inputs, samples)
    out = {}
    for plan in as_targets(session, targets, list(canvas.seen), diverse=True):
        out[plan.name] = combine(session, session.generator(canvas, [plan], seed=seed), plan.name)
    return out


def as_targets(
    session: Session, targets: Sequence[str | Target], given: Sequence[str], diverse: bool = False
) -> list[Target]:
    """Targets of names (see `Session.name_of`) with the presets' settings; with ``diverse`` samples vary."""
    out = []
    for target in targets:
        if isinstance(target, Target):
            out.append(target)
            continue
        plan = presets.target(session.modalities, session.name_of(target, session.modalities.outputs), given)
        if diverse and plan.temperature < 1.0:
            plan = Target(**{**vars(plan), "temperature": 1.0, "top_p": presets.TOP_P})
        out.append(plan)
    return out


# ---- self-consistency


def log_likelihood(generator: Generator, shown: Canvas, name: str, ids: jax.Array, known: jax.Array) -> np.ndarray:
    """Mean log-likelihood of a modality's tokens under the model, over its own vocabulary.

    Args:
      generator: the model.
      shown: B samples; what the prediction sees, whatever of ``name`` it has is left out.
      name: an output modality.
      ids, known: int32 and bool [B, max_tokens]: the tokens, as a canvas holds them. All cells of a grid are predicted
        in one step, independently of each other; a text token by token, up to its first gap.

    Returns:
      float32 [B], in nats a token; 0 for a sample without tokens.

    Raises:
      ValueError: no output modality, or nothing else is shown.
    """
    modalities = generator.modalities
    if name not in modalities.outputs:
        known_names = unknown_name(name, modalities.outputs, "output modality of this model")
        raise ValueError(f"cannot predict back: {known_names}")
    m = modalities[name]
    names = [n for n in shown.seen if n in modalities.inputs and n != name]
    if not names:
        raise ValueError(f"cannot predict {name!r} back: nothing that is an input of the model was generated")
    bare = Canvas(
        {n: shown.ids[n] for n in names if n in shown.ids}, {n: shown.seen[n] for n in names}, shown.dense
    )  # fmt: skip
    if m.kind == "sequence" and name in modalities.inputs:
        gap = jnp.zeros_like(ids).at[:, 0].set(FIRST_SENTINEL_ID)
        bare = bare.write(name, gap, jnp.zeros_like(known).at[:, 0].set(True))
    return np.asarray(
        _log_likelihood(generator.params, bare, ids, known, config=generator.config, modalities=modalities, name=name)
    )


@functools.partial(jax.jit, static_argnames=("config", "modalities", "name"))
def _log_likelihood(params, shown: Canvas, ids, known, *, config, modalities: ModalitySet, name: str) -> jax.Array:
    m, i = modalities[name], modalities.index(name)
    encoded = model_lib.encode(params, config, modalities, encoder_tokens(shown, modalities), shown.dense)
    slots = jnp.arange(m.max_tokens, dtype=jnp.int32)
    if m.kind == "sequence":
        gap = (ids >= FIRST_SENTINEL_ID) & (ids < FIRST_SENTINEL_ID + NUM_SENTINELS)
        known = known & (jnp.cumsum(gap, 1) == 0)
        # The prediction of a text starts with the sentinel of the gap that it fills.
        before = jnp.concatenate([jnp.full_like(ids[:, :1], FIRST_SENTINEL_ID), ids[:, :-1]], 1)
        row = before + modalities.output_offset[name]
        slots = jnp.where(slots < (m.max_positions or m.max_tokens), slots, 0)
    else:
        row = jnp.zeros_like(ids)
    place = jnp.broadcast_to(slots + modalities.position_offset[name], ids.shape)
    query = Tokens(row, jnp.full_like(ids, i), place, jnp.ones(ids.shape, bool))
    hidden = model_lib.decode(params, config, modalities, encoded, query)
    logs = jax.nn.log_softmax(model_lib.own_logits(params, config, modalities, name, hidden))
    each = jnp.take_along_axis(logs, ids[..., None], 2)[..., 0]
    return jnp.where(known, each, 0.0).sum(1) / jnp.maximum(known.sum(1), 1)


def consistency(
    generator: Generator, given: Canvas, generated: Canvas, targets: Sequence[str], conditions: Sequence[str] = ()
) -> np.ndarray:
    """How well samples explain what they were generated from: float32 [B], nats a token, higher is better.

    Args:
      generator: the model.
      given: what was known before.
      generated: the same samples with ``targets``.
      targets: what was generated; the prediction back sees these alone.
      conditions: which given modalities to predict back, with equal weight; (): all that the model can output and
        that are not targets.

    Raises:
      ValueError: a condition that the model cannot output, or none.
    """
    outputs = generator.modalities.outputs
    names = list(conditions) or [n for n in given.ids if n in outputs and n not in targets]
    if not names:
        raise ValueError(
            "self-consistency needs a given modality that the model can output; given: "
            f"{', '.join(given.seen)}; outputs: {', '.join(outputs)}"
        )
    for name in names:
        if name not in given.ids:
            raise ValueError(f"condition: {unknown_name(name, list(given.ids), 'given modality of tokens')}")
    ids, seen = generated.ids, generated.seen
    shown = Canvas({n: ids[n] for n in targets}, {n: seen[n] for n in targets}, generated.dense)
    scores = [log_likelihood(generator, shown, n, given.ids[n], given.seen[n]) for n in names]
    return np.mean(scores, axis=0)


def self_consistent(
    session: Session,
    inputs: Mapping[str, Any],
    targets: Sequence[str | Target],
    *,
    samples: int = 8,
    keep: int = 1,
    conditions: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Canvas, np.ndarray]:
    """Generates samples and keeps those from which the inputs are predicted back best.

    Args:
      session: the model with its tokenizers.
      inputs: see `Session.read`.
      targets: names or targets, a chain as in `Generator`.
      samples, keep: how many to draw, and how many of them to keep.
      conditions: what to predict back, see `consistency`.
      seed: of everything drawn.

    Returns:
      The canvas of the kept samples, best first, and the scores float32 [samples] of all, in the order drawn.

    Raises:
      ValueError: see `Session.read`, `Generator` and `consistency`; keep is not from 1 to samples.
    """
    if not 1 <= keep <= samples:
        raise ValueError(f"keep = {keep} must be from 1 to the number of samples, {samples}")
    canvas = session.read(inputs, samples)
    names = [session.name_of(n, list(canvas.seen)) for n in conditions]
    plans = as_targets(session, targets, list(canvas.seen), diverse=True)
    out = session.generator(canvas, plans, seed=seed)
    scores = consistency(session.generator, canvas, out, [plan.name for plan in plans], names)
    best = np.argsort(-scores, kind="stable")[:keep]
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[best]), out), scores
