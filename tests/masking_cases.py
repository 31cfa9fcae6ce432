"""Modality sets, recipes and raw batches that the masking tests share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fm4m.batch import RawBatch
from fm4m.masking import Masking, MaskingComponent, draw, mask_batch, select
from fm4m.modalities import Modality, ModalitySet

B = 16
PART = MaskingComponent

RGB = Modality("rgb", "pixels", grid=(4, 4), patch_size=2, channels=3)
DEPTH = Modality("depth", "tokens", 50, grid=(4, 4))
NORMAL = Modality("normal", "tokens", 130, grid=(4, 4))
GLOBAL = Modality("global", "tokens", 40, grid=(2, 3), learned_positions=True)
CAPTION = Modality("caption", "sequence", 300, max_tokens=24)
POSES = Modality("poses", "sequence", 220, max_tokens=17, max_positions=6)
WORD = Modality("word", "sequence", 250, max_tokens=1)
T5 = Modality("t5", "embedding", max_tokens=9, channels=5)


def _case(modalities, masking, tasks=("a",)):
    return modalities, masking, tasks


EVERY = ModalitySet(
    (CAPTION, RGB, T5, DEPTH, GLOBAL, NORMAL, POSES, WORD),
    inputs=("caption", "rgb", "t5", "depth", "global", "word"),
    outputs=("caption", "depth", "normal", "poses", "word"),
)
MIXED = {
    "a": (
        PART(0.5, 0.5, weight=2),
        PART({"caption": 5.0, "t5": 1.0, "depth": 0.05}, {"depth": 1.0, "poses": 0.3}, keep={"caption": "all"}),
        PART({"rgb": 1000.0}, 1.0, weight=0.5),
    ),
    "*": (PART(1.0, {"caption": 1.0, "word": 1.0}, keep="binary"), PART(0.01, 0.01, weight=0)),
}
CASES = {
    "everything": _case(EVERY, Masking((3, 30), (0, 40), MIXED), ("a", "b")),
    "refill": _case(EVERY, Masking((0, 40), 40, MIXED, refill=True), ("b", "a")),
    "grids": _case(ModalitySet((DEPTH, GLOBAL, NORMAL)), Masking(20, 20, {"*": (PART(0.2, 0.2),)})),
    "sequences": _case(ModalitySet((CAPTION, POSES)), Masking(12, 30, {"*": (PART(0.5, 0.5), PART(1, 1, "all"))})),
    "one word": _case(ModalitySet((WORD,)), Masking((0, 1), (0, 3), {"*": (PART(1, 1),)})),
    "tiny budgets": _case(EVERY, Masking((0, 1), (0, 2), {"*": (PART(1, 1),)})),
}
NO_PIXELS = _case(ModalitySet((CAPTION, T5, DEPTH, GLOBAL, POSES)), Masking(12, (3, 20), {"*": (PART(0.5, 0.5),)}))


def make_raw(modalities: ModalitySet, size: int, seed: int, tasks: int = 1, missing: float = 0.2) -> RawBatch:
    r = np.random.default_rng(seed)
    length = np.zeros((size, len(modalities)), np.int16)
    tokens = np.zeros((size, modalities.num_slots), np.uint16)
    dense = {}
    for i, m in enumerate(modalities.modalities):
        short = r.integers(1, m.max_tokens + 1, size)
        full = r.random(size) < 0.3
        length[:, i] = np.where(full | bool(m.grid), m.max_tokens, short) * (r.random(size) >= missing)
        if m.discrete:
            inside = np.arange(m.max_tokens) < length[:, i, None]
            codes = r.integers(205 if m.kind == "sequence" else 0, m.vocab_size, (size, m.max_tokens))
            tokens[:, modalities.slot_offset[m.name] :][:, : m.max_tokens] = np.where(inside, codes, 0)
        elif m.kind == "pixels":
            shape = (size, m.grid[0] * m.patch_size, m.grid[1] * m.patch_size, 3)
            dense[m.name] = r.integers(0, 256, shape).astype(np.uint8)
        else:
            dense[m.name] = r.normal(size=(size, m.max_tokens, m.channels)).astype(np.float16)
    return RawBatch(tokens, length, r.integers(0, tasks, size).astype(np.uint8), dense)


@functools.cache
def compiled(name: str):
    modalities, masking, tasks = CASES[name]
    static = dict(masking=masking, modalities=modalities, tasks=tasks)
    whole = jax.jit(functools.partial(mask_batch, **static))
    return whole, jax.jit(functools.partial(draw, **static)), jax.jit(functools.partial(select, **static))


def keys_of(seed: int, position) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(position, jnp.uint32))


def run(raw, masking, modalities, seed: int = 0):
    """`mask_batch` of samples 0, 1, ... of a single task, compiled: op by op it would take ten times as long."""
    fn = functools.partial(mask_batch, masking=masking, modalities=modalities, tasks=("a",))
    return jax.jit(fn)(raw, key=jax.random.key(seed), position=np.arange(raw.size))


def assert_same(got, want) -> None:
    got_leaves, want_leaves = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
    assert len(got_leaves) == len(want_leaves)
    for (path, a), b in zip(got_leaves, want_leaves):
        name = jax.tree_util.keystr(path)
        if name.startswith(".dense"):  # the compiler may divide by a constant through its reciprocal
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name, strict=True)


def check_rules(raw, packed, draws, modalities, masking, tasks) -> None:
    """Rules that hold whatever the law: budgets, disjointness, the recipe's zeros, order, clean padding."""
    p = jax.tree.map(np.asarray, packed)
    for side, s in ((0, p.encoder), (1, p.decoder)):
        assert (np.diff(s.valid.astype(int), axis=1) <= 0).all(), "valid slots come first"
        assert not (s.row | s.modality | s.position)[~s.valid].any()
        assert (s.valid.sum(1) <= np.asarray(draws.budget)[:, side]).all()
    assert not p.target[~p.decoder.valid].any()
    low, high = modalities.output_ranges[p.decoder.modality].transpose(2, 0, 1)
    assert ((p.target >= low) & (p.target < high))[p.decoder.valid].all()
    for b in range(raw.size):
        part = masking.components(tasks[int(raw.task[b])])[int(draws.component[b])]
        for side, s in (("inputs", p.encoder), ("targets", p.decoder)):
            alpha = part.concentration(side, modalities)
            used = s.modality[b][s.valid[b]]
            assert (np.diff(used) >= 0).all(), "tokens of a modality are contiguous"
            for i in set(used.tolist()):
                assert alpha[modalities.names[i]] > 0 and raw.length[b, i] > 0
        for i, m in enumerate(modalities.modalities):
            at_in = p.encoder.position[b][p.encoder.valid[b] & (p.encoder.modality[b] == i)]
            at_out = p.decoder.position[b][p.decoder.valid[b] & (p.decoder.modality[b] == i)]
            if m.grid:
                cells = np.concatenate([at_in, at_out]) - modalities.position_offset[m.name]
                assert len(set(cells.tolist())) == len(cells) and ((cells >= 0) & (cells < m.max_tokens)).all()
            else:
                assert at_in.tolist() == list(range(len(at_in)))
