"""Contact sheets: what the model was shown, what it predicted, and what was true, for every modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from fm4m.batch import RawBatch
from fm4m.generate import check_names, predict
from fm4m.modalities import ModalitySet
from fm4m.model import ModelConfig
from fm4m.stream import Stream

CELL = 144  # pixels of one picture in the sheet
MARGIN = 6
TEXT_SIZE = 12
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)
BOX_COLOURS = ((230, 60, 50), (40, 110, 230), (20, 150, 70), (235, 150, 20), (150, 60, 200), (20, 170, 180))


@dataclasses.dataclass(frozen=True)
class Shower:
    """How codes of one modality become something to look at.

    Attributes:
      kind: ``"image"`` (a vector-quantised tokenizer), ``"text"``, or ``"boxes"`` (text that lists boxes).
      tokenizer: `fm4m.tokenizers.tokenizer.Tokenizer` for images, `fm4m.tokenizers.text.TextTokenizer` otherwise.
    """

    kind: str
    tokenizer: object


def load_showers(entries: Sequence[str], modalities: ModalitySet) -> dict[str, Shower]:
    """Loads the tokenizers that show codes, from entries ``MODALITY=image:FILE``, ``=text:FILE`` or ``=boxes:FILE``.

    Raises:
      KeyError: a modality that is not in the set.
      ValueError: an entry of another form, or a tokenizer with another vocabulary than its modality.
    """
    from fm4m.tokenizers import io, text

    out = {}
    for entry in entries:
        name, _, how = entry.partition("=")
        kind, _, path = how.partition(":")
        if kind not in ("image", "text", "boxes") or not path:
            raise ValueError(f"{entry!r} is not MODALITY=image:FILE, MODALITY=text:FILE or MODALITY=boxes:FILE")
        tokenizer = io.load(path) if kind == "image" else text.TextTokenizer.load(path)
        if tokenizer.vocab_size != modalities[name].vocab_size:
            raise ValueError(
                f"{path} has {tokenizer.vocab_size} codes, but modality {name!r} has {modalities[name].vocab_size}"
            )
        out[name] = Shower(kind, tokenizer)
    return out


def spread_samples(stream: Stream, count: int) -> RawBatch:
    """``count`` samples spread evenly over a stream of one pass."""
    positions = [int(stream.size * (i + 0.5) / count) for i in range(count)]
    rows = [next(iter(stream.batches(position=position, global_batch=1))) for position in positions]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


@dataclasses.dataclass(frozen=True)
class SampleSheet:
    """Predicts every output modality from ``inputs`` for a few fixed samples, and draws one sheet.

    Attributes:
      config, modalities: of the model.
      raw: the samples to show (a handful).
      inputs: names of the modalities the model is shown, all tokens visible.
      showers: how to show each output; outputs without one are left out of the sheet.

    Raises ValueError for an input that the model does not have.
    """

    config: ModelConfig
    modalities: ModalitySet
    raw: RawBatch
    inputs: Sequence[str]
    showers: Mapping[str, Shower]

    def __post_init__(self):
        # Now, rather than at the first picture, which may be hours into a run.
        check_names(self.modalities, self.inputs, ())

    def __call__(self, params: dict, step: int) -> dict[str, np.ndarray]:
        """Returns {title: uint8 [H, W, 3]}: one sheet, two lines a sample (prediction above, truth below)."""
        targets = [n for n in self.modalities.outputs if n in self.showers]
        predicted = predict(params, self.config, self.modalities, self.raw, self.inputs, targets)
        columns = [(f"given: {name}", [[cell, None] for cell in self._cells(name, None)]) for name in self.inputs]
        order = sorted(targets, key=lambda n: ("image", "boxes", "text").index(self.showers[n].kind))
        for name in order:
            cells = zip(self._cells(name, predicted[name]), self._cells(name, self._true_codes(name)), strict=True)
            columns.append((name, [list(pair) for pair in cells]))
        note = f"step {step}: predicted from {', '.join(self.inputs)}"
        return {"samples": draw_sheet(columns, ("predicted", "true"), note)}

    def _true_codes(self, name: str) -> np.ndarray:
        start = self.modalities.slot_offset[name]
        return np.asarray(self.raw.tokens[:, start : start + self.modalities[name].max_tokens]).astype(np.int32)

    def _cells(self, name: str, codes: np.ndarray | None) -> list:
        """One drawable a sample: a uint8 picture, a string, or (picture, boxes)."""
        if codes is None:
            if self.modalities[name].kind == "pixels":
                return list(np.asarray(self.raw.dense[name]))
            codes = self._true_codes(name)
        shower = self.showers[name]
        if shower.kind == "image":
            return list(shower.tokenizer.to_picture(shower.tokenizer.decode(codes)))
        texts = [shower.tokenizer.decode([int(i) for i in row]) for row in codes]
        if shower.kind == "text":
            return texts
        from fm4m.transforms import boxes

        pixels = next((n for n in self.modalities.continuous if self.modalities[n].kind == "pixels"), None)
        blank = np.full((len(codes), 64, 64, 3), 255, np.uint8)
        under = blank if pixels is None else np.asarray(self.raw.dense[pixels])
        return [(image, boxes.from_text(text).boxes) for image, text in zip(under, texts, strict=True)]


def draw_sheet(columns: Sequence[tuple[str, list]], row_names: Sequence[str], note: str = "") -> np.ndarray:
    """Draws a sheet.

    Args:
      columns: (title, samples), each sample a list with one entry a row name: a uint8 picture [h, w, 3], a string, a
        pair (picture, list of `fm4m.transforms.boxes.Box`), or None for an empty cell.
      row_names: what the lines of one sample are called.
      note: printed above everything.

    Returns:
      uint8 [H, W, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT_SIZE)
    widths = [CELL * 2 if any(isinstance(c, str) for s in samples for c in s) else CELL for _, samples in columns]
    left, top = 74, 2 * TEXT_SIZE + 3 * MARGIN
    samples, lines = len(columns[0][1]), len(row_names)
    block = lines * (CELL + MARGIN) + MARGIN
    size = (left + sum(w + MARGIN for w in widths), top + samples * block)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), note, INK, font)
    x = left
    for (title, cells), width in zip(columns, widths, strict=True):
        draw.text((x, TEXT_SIZE + 2 * MARGIN), title, INK, font)
        for s, sample in enumerate(cells):
            for r, cell in enumerate(sample):
                y = top + s * block + r * (CELL + MARGIN)
                if x == left:
                    draw.text((MARGIN, y + CELL // 2), row_names[r], FAINT, font)
                _draw_cell(sheet, draw, font, cell, x, y, width)
        x += width + MARGIN
    return np.asarray(sheet)


def _draw_cell(sheet, draw, font, cell, x: int, y: int, width: int) -> None:
    from PIL import Image

    if cell is None:
        return
    if isinstance(cell, str):
        draw.multiline_text((x, y), _wrap(draw, font, cell, width), INK, font)
        return
    picture, boxes = cell if isinstance(cell, tuple) else (cell, ())
    sheet.paste(Image.fromarray(np.ascontiguousarray(picture)).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
    for k, box in enumerate(boxes):
        colour = BOX_COLOURS[k % len(BOX_COLOURS)]
        x0, y0, x1, y1 = (v * (CELL - 1) for v in (box.xmin, box.ymin, box.xmax, box.ymax))
        draw.rectangle((x + x0, y + y0, x + x1, y + y1), outline=colour, width=2)
        draw.text((x + x0 + 3, y + y0 + 1), box.class_name, colour, font)


def _wrap(draw, font, text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > width - MARGIN and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    most = CELL // (TEXT_SIZE + 4)
    return "\n".join(lines if len(lines) <= most else [*lines[: most - 1], "..."])
