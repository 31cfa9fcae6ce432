"""Many instances of one picture from several texts."""

from __future__ import annotations

import pathlib
import types

import jax
import numpy as np
import pytest

from fm4m import model
from fm4m.generate import instances, session
from fm4m.loading import LoadedModel
from fm4m.modalities import Modality, ModalitySet
from fm4m.tokenizers.config import VQConfig
from fm4m.transforms import sam_instances
from fm4m.transforms.sam_instances import Found

TEXT = pathlib.Path(__file__).parents[1] / "data_pipelines/rooms/tokenizers/text.json"
SET = ModalitySet((
    Modality("tok_depth@64", "tokens", 128, (8, 8)), Modality("sam_instance", "sequence", 4736, max_tokens=40)
))  # fmt: skip
CONFIG = model.model_config(
    "fm_tiny_6e_6d_swiglu_nobias", dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, dtype="float32"
)
DEPTH = {"tok_depth@64": np.arange(64)}


@pytest.fixture(scope="module")
def opened():
    params = model.init_params(CONFIG, SET, jax.random.key(0))
    return session.Session(LoadedModel(CONFIG, SET, params, {}), [f"sam_instance=text:{TEXT}"])


def text(x, y, *boxes):
    told = " ".join(
        f"polygon v0={a} v1={b} v2={c} v3={d} " + " ".join(f"v0={code}" for code in range(16)) for a, b, c, d in boxes
    )
    return f"point v0={y} v1={x} {told or 'none'}"


def test_an_instance_counts_once_with_its_votes():
    texts = [
        text(5, 6, (0, 0, 100, 100)) + " " + text(200, 200), text(7, 8, (0, 0, 100, 98), (0, 0, 20, 20)),
        text(9, 9, (0, 0, 20, 20), (0, 0, 100, 100)) + " polygon v0=1", text(9, 9, (1, 1, 99, 99)),
    ]  # fmt: skip
    found = instances.join(texts)
    assert [(t.instance.box, t.votes) for t in found.told] == [((0, 0, 100, 100), 4), ((0, 0, 20, 20), 2)]
    assert found.empty == ((200, 200),) and found.malformed == 1


def test_texts_are_drawn_from_the_picture_or_from_points(opened, monkeypatch):
    """Every text begins with its point; those that fill up the last batch do not count."""
    seen, real = [], type(opened).texts

    def texts(self, canvas, name):
        seen.append(real(self, canvas, name))
        return [text(5, 6, (0, 0, 50, 50))] * canvas.size

    monkeypatch.setattr(type(opened), "texts", texts)
    free = instances.dense_instances(opened, DEPTH, samples=4)
    assert free.told == ((Found((0, 0, 50, 50), tuple(range(16))), 4),)
    assert len(seen[0]) == 4 and len(set(seen[0])) > 1
    points = sam_instances.grid_points(3)
    asked = instances.dense_instances(opened, DEPTH, points=points, samples=4)
    assert [len(part) for part in seen[1:]] == [4, 4, 4] and asked.told[0].votes == 9
    for (x, y), made in zip(points, [made for part in seen[1:] for made in part], strict=False):
        assert made.startswith(f"point v0={y} v1={x}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples = 0 must be at least 1"),
        ({"points": np.zeros((0, 2), int)}, r"expected integers \[n, 2\]"),
        ({"points": np.zeros((1, 2))}, r"expected integers \[n, 2\], got float64"),
        ({"points": np.array([[224, 0]])}, "224 wide and 224 high"),
    ],
)
def test_what_cannot_be_asked_is_refused(opened, options, message):
    with pytest.raises(ValueError, match=message):
        instances.dense_instances(opened, DEPTH, **options)


def test_masks_are_drawn_into_their_boxes():
    left = np.zeros((1, 8, 8), np.uint8)
    left[:, :, :4] = 1
    tokenizer = types.SimpleNamespace(
        config=VQConfig("mask", (8, 8), 2, 1), decode=lambda codes: np.repeat(left, len(codes), axis=0)
    )
    found = [Found((10, 20, 30, 40), tuple(range(16))), Found((220, 0, 240, 10), tuple(range(16)))]
    drawn = instances.masks(found, tokenizer)
    assert drawn.shape == (2, 224, 224) and drawn[0, 20:40, 10:20].all() and drawn[0].sum() == 20 * 10
    assert drawn[1, :10, 220:224].all() and drawn[1].sum() == 40
    assert instances.masks([], tokenizer).shape == (0, 224, 224)
    tokenizer.config = VQConfig("rgb", (8, 8), 2, 3, name="rgb")
    with pytest.raises(ValueError, match="domain 'rgb' and 16 codes, expected 'mask' and 16"):
        instances.masks(found, tokenizer)
