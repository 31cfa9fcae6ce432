from __future__ import annotations

import numpy as np
import pytest

from fm4m import pictures
from fm4m.batch import RawBatch
from fm4m.modalities import Modality, ModalitySet
from fm4m.transforms.boxes import Box


def test_sheet_holds_every_cell_where_the_layout_says():
    red = np.zeros((8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    blue = np.zeros((8, 8, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
    boxed = (blue, [Box(0.25, 0.25, 0.75, 0.75, "chair")])
    columns = [
        ("given", [[red, None], [red, None]]),
        ("det", [[boxed, blue], [blue, blue]]),
        ("caption", [["a room", "a very long caption " * 30], ["x", "y"]]),
    ]
    sheet = pictures.draw_sheet(columns, ("predicted", "true"), "step 3")
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    cell, margin = pictures.CELL, pictures.MARGIN
    x, y = 74 + cell // 2, 2 * pictures.TEXT_SIZE + 3 * margin + cell // 2
    assert sheet[y, x].tolist() == [255, 0, 0]
    assert sheet[y + cell + margin, x].tolist() == [255, 255, 255], "an empty cell stays blank"
    assert sheet[y, x + cell + margin].tolist() == [0, 0, 255]
    edge = sheet[y - cell // 4, x + cell + margin]
    assert edge.tolist() in [list(c) for c in pictures.BOX_COLOURS], "the box's upper edge is drawn"
    block = 2 * (cell + margin) + margin
    assert sheet.shape[0] == 2 * pictures.TEXT_SIZE + 3 * margin + 2 * block


def test_an_entry_of_another_form_is_refused():
    depth = ModalitySet((Modality("depth", "tokens", 20, (2, 2)),))
    with pytest.raises(ValueError, match=r"'depth=depth\.safetensors' is not MODALITY=image:FILE"):
        pictures.load_showers(["depth=depth.safetensors"], depth)


def test_inputs_that_the_model_lacks_are_refused_before_the_run():
    depth = ModalitySet((Modality("depth", "tokens", 20, (2, 2)),))
    with pytest.raises(ValueError, match="modality 'dept' is no input of this model; inputs: depth"):
        pictures.SampleSheet(None, depth, None, ("dept",), {})


def test_samples_are_spread_over_the_stream():
    class Numbers:
        size = 10

        def batches(self, *, position, global_batch):
            assert global_batch == 1
            zeros = np.zeros((1, 4), np.uint16) + position
            yield RawBatch(zeros, np.zeros((1, 1), np.int16), np.zeros(1, np.uint8), {})

    batch = pictures.spread_samples(Numbers(), 5)
    assert batch.tokens[:, 0].tolist() == [1, 3, 5, 7, 9]
