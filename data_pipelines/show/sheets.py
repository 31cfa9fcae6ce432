"""The two sheets: samples decoded back from tokens, and the masks drawn over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.show import decode
from fm4m.modalities import FIRST_SENTINEL_ID, NUM_SENTINELS, Modality
from fm4m.pictures import BACKGROUND, CELL, FAINT, INK, MARGIN, TEXT_SIZE, Shower, draw_sheet

if TYPE_CHECKING:  # it imports SeqIO and TensorFlow, which a folder of token files can do without
    from data_pipelines.show.masks import SampleMask

INPUT, TARGET, NEITHER = (25, 95, 215), (214, 92, 0), (205, 205, 205)
TILE = 128  # pixels of one picture in the sheet of masks
LABEL = 176  # width of the column with the names of texts
LINE = TEXT_SIZE + 6
FRAME = 2  # pixels, around visible cells
TILES_A_ROW = 8
LEGEND = (("input: the encoder sees it", INPUT), ("target: the decoder predicts it", TARGET), ("neither", NEITHER))


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is drawn of some samples.

    Attributes:
      modalities: in the order of the columns, pictures first.
      pictures: of every grid modality, a picture or None a sample.
      texts: of every sequence, a text a sample; "" where it is missing.
      showers: tokenizers by modality, where there is one.
      notes: what could not be drawn as it should be.
    """

    modalities: tuple[Modality, ...]
    pictures: Mapping[str, list[np.ndarray | None]]
    texts: Mapping[str, list[str]]
    showers: Mapping[str, Shower]
    notes: tuple[str, ...] = ()


def decode_samples(
    modalities: Sequence[Modality], samples: Sequence[Mapping[str, np.ndarray]], showers: Mapping[str, Shower]
) -> Shown:
    """Decodes samples; a modality whose tokenizer fails is shown as codes, and the reason noted."""
    pictures, texts, notes, usable = {}, {}, [], dict(showers)
    for m in modalities:
        arrays = [sample.get(m.name, np.zeros(0, np.uint16)) for sample in samples]
        if m.grid:
            try:
                pictures[m.name] = decode.pictures_of(m, arrays, usable.get(m.name))
            except (ValueError, TypeError, KeyError, NotImplementedError) as error:
                notes.append(f"{m.name}: {error}; its codes are shown")
                del usable[m.name]
                pictures[m.name] = decode.pictures_of(m, arrays, None)
        elif m.kind == "sequence":
            texts[m.name] = [decode.text_of(a, usable.get(m.name)) if len(a) else "" for a in arrays]
        else:
            texts[m.name] = [f"{len(a)} vectors of {m.channels}" if len(a) else "" for a in arrays]
    ordered = sorted(modalities, key=lambda m: ("pixels", "tokens", "sequence", "embedding").index(m.kind))
    return Shown(tuple(ordered), pictures, texts, usable, tuple(notes))


# ---- samples


def sample_sheet(shown: Shown, row_names: Sequence[str], note: str) -> np.ndarray:
    """One line a sample, one column a modality: uint8 [H, W, 3]. Boxes are drawn on the image, and listed beside it."""
    count = len(row_names)
    columns: list[tuple[str, list]] = []
    drawn: list[tuple[str, list]] = []
    for m in shown.modalities:
        if m.grid:
            how = "" if m.kind == "pixels" or m.name in shown.showers else " (codes)"
            cells = [_missing() if p is None else _square(p) for p in shown.pictures[m.name]]
            columns.append((m.name + how, cells))
            continue
        texts = shown.texts[m.name]
        boxes = decode.boxes_of(texts) if m.name in shown.showers else None
        if boxes is None:
            columns.append((m.name, [text or "(missing)" for text in texts]))
            continue
        under = _image_of(shown, count)
        columns.append((f"{m.name}: boxes in % of the picture", [decode.boxes_as_text(b) for b in boxes]))
        # Class names reach beyond the right edge of the picture that they are written on, so the next column is empty.
        drawn += [(f"{m.name}: boxes", list(zip(under, boxes, strict=True))), ("", [None] * count)]
    titled = [(_shortened(t, CELL * (2 if isinstance(c[0], str) else 1)), [c]) for t, c in [*columns, *drawn]]
    return draw_sheet(titled, row_names, note)


def _image_of(shown: Shown, count: int) -> list[np.ndarray]:
    """What boxes are drawn on: pixels, else the decoded image, else white."""
    colours = [m.name for m in shown.modalities if m.kind == "pixels" and m.channels == 3]
    colours += [n for n, s in shown.showers.items() if s.kind == "image" and s.tokenizer.config.domain == "rgb"]
    blank = np.full((64, 64, 3), 255, np.uint8)
    out = []
    for i in range(count):
        found = (shown.pictures[n][i] for n in colours if shown.pictures.get(n) and shown.pictures[n][i] is not None)
        out.append(next(found, blank))
    return out


def _square(picture: np.ndarray) -> np.ndarray:
    """A picture on a white square; small maps are enlarged without blurring their cells into each other."""
    height, width = picture.shape[:2]
    if (times := CELL // max(height, width)) > 4:
        picture = picture.repeat(times, 0).repeat(times, 1)
        height, width = picture.shape[:2]
    side = max(height, width)
    if height == width:
        return picture
    out = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = picture
    return out


def _missing(size: tuple[int, int] = (CELL, CELL)) -> np.ndarray:
    """A grey picture that says so."""
    from PIL import Image, ImageDraw, ImageFont

    tile = Image.new("RGB", size, (238, 238, 238))
    at = size[0] // 2, size[1] // 2
    ImageDraw.Draw(tile).text(at, "missing", FAINT, ImageFont.load_default(TEXT_SIZE), anchor="mm")
    return np.asarray(tile)


def _shortened(text: str, width: int) -> str:
    from PIL import ImageFont

    font = ImageFont.load_default(TEXT_SIZE)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


# ---- masks


def paint_cells(picture: np.ndarray, grid: tuple[int, int], inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Colours the cells of a picture: inputs stay and get a frame, targets are tinted, the others fade to grey.

    Args:
      picture: uint8 [h, w, 3].
      grid: rows and columns of cells.
      inputs, targets: numbers of cells, row-major.

    Returns:
      uint8 [TILE * rows / columns (at least 24), TILE, 3].
    """
    from PIL import Image

    rows, columns = grid
    height = int(np.clip(TILE * rows // columns, 24, 2 * TILE))
    small = max(picture.shape[:2]) <= max(grid)
    how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    base = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((TILE, height), how), np.float32)
    state = np.zeros(rows * columns, np.int32)
    state[inputs], state[targets] = 1, 2
    y, x = np.arange(height) * rows // height, np.arange(TILE) * columns // TILE
    of_pixel = state.reshape(grid)[y][:, x]
    grey = np.repeat(base.mean(-1, keepdims=True), 3, -1)
    out = 0.18 * grey + 0.82 * np.array(NEITHER, np.float32)
    out = np.where(of_pixel[..., None] == 1, base, out)
    out = np.where(of_pixel[..., None] == 2, 0.3 * base + 0.7 * np.array((255, 158, 74), np.float32), out)
    # White lines between cells where they are large enough, and a frame around what is visible.
    visible = of_pixel == 1
    if min(TILE / columns, height / rows) >= 6:
        edge = (np.diff(y, append=-1) != 0)[:, None] | (np.diff(x, append=-1) != 0)[None]
        out[edge & ~visible] = 255
    around = np.pad(visible, FRAME)
    inside = np.ones_like(visible)
    for dy in range(2 * FRAME + 1):
        for dx in range(2 * FRAME + 1):
            inside &= around[dy : dy + height, dx : dx + TILE]
    out[visible & ~inside] = INPUT
    return np.round(out).astype(np.uint8)


def segments(ids: Sequence[int], shower: Shower | None) -> list[tuple[str, bool]]:
    """Words of a masked text with whether each is a sentinel; ids as numbers without a tokenizer."""
    out, run = [], []

    def flush() -> None:
        text = shower.tokenizer.decode(run, keep_control=True) if shower else " ".join(map(str, run))
        out.extend((word, False) for word in text.split())
        run.clear()

    for id_ in map(int, ids):
        if FIRST_SENTINEL_ID <= id_ < FIRST_SENTINEL_ID + NUM_SENTINELS:
            flush()
            out.append((f"S{id_ - FIRST_SENTINEL_ID + 1}", True))
        else:
            run.append(id_)
    flush()
    return out


def mask_sheet(shown: Shown, masks: Sequence[SampleMask], note: str) -> np.ndarray:
    """A block a sample: its grids with their inputs and targets, and its sequences as the model reads them.

    Args:
      shown: the samples of ``masks``, decoded, in the same order.
      note: printed above everything.

    Returns:
      uint8 [H, W, 3].
    """
    from PIL import Image, ImageDraw

    grids = sum(m.grid is not None for m in shown.modalities)
    width = MARGIN + max(min(grids, TILES_A_ROW) * (TILE + 2 * MARGIN), 7 * TILE)
    page = _Page(width)
    page.text(MARGIN, note, INK)
    page.down(LINE)
    x = MARGIN
    for text, colour in LEGEND:
        page.swatch(x, colour)
        x = page.text(x + 18, text, INK) + 24
    x = page.chip(x, "S1")
    page.text(x + 6, "stands for a masked run of text", INK)
    page.down(LINE + MARGIN)
    for index, mask in enumerate(masks):
        _draw_sample(page, shown, mask, index)
    sheet = Image.new("RGB", (width, page.y + MARGIN), BACKGROUND)
    page.draw(sheet, ImageDraw.Draw(sheet))
    return np.asarray(sheet)


def _draw_sample(page: _Page, shown: Shown, mask: SampleMask, index: int) -> None:
    page.rule()
    used = f"encoder {mask.filled[0]} of {mask.widths[0]} slots, decoder {mask.filled[1]} of {mask.widths[1]}"
    page.text(MARGIN, f"sample {mask.position} of the stream, task {mask.task}: {used}", INK)
    page.down(LINE + 2)
    nothing = np.zeros(0, np.int32)
    grids = [m for m in shown.modalities if m.grid]
    for start in range(0, len(grids), TILES_A_ROW):
        tallest = 0
        for column, m in enumerate(grids[start : start + TILES_A_ROW]):
            x = MARGIN + column * (TILE + 2 * MARGIN)
            seen, wanted = mask.inputs.get(m.name, nothing), mask.targets.get(m.name, nothing)
            picture = shown.pictures[m.name][index]
            tile = _missing((TILE, TILE)) if picture is None else paint_cells(picture, m.grid, seen, wanted)
            page.text(x, _shortened(m.name, TILE), INK)
            page.image(x, LINE, tile)
            y = LINE + len(tile) + 2
            end = page.text(x, f"{len(seen)} in", INPUT, y)
            end = page.text(end + 8, f"{len(wanted)} out", TARGET, y)
            page.text(end + 8, f"of {m.max_tokens}", FAINT, y)
            tallest = max(tallest, y + LINE)
        page.down(tallest + 2)
    for m in shown.modalities:
        if m.grid is None:
            _draw_text(page, shown, m, mask, index)
    page.down(MARGIN)


def _draw_text(page: _Page, shown: Shown, m: Modality, mask: SampleMask, index: int) -> None:
    if not shown.texts[m.name][index]:
        page.text(MARGIN, _shortened(m.name, LABEL - 64), INK)
        page.text(LABEL, "missing", FAINT)
        page.down(LINE)
        return
    words = [(word, False) for word in shown.texts[m.name][index].split()]
    used = m.name in mask.inputs or m.name in mask.targets
    lines = [("text", INK, words) if used else ("neither", FAINT, words)]
    for label, colour, ids in (("input", INPUT, mask.inputs.get(m.name)), ("target", TARGET, mask.targets.get(m.name))):
        if ids is not None and m.kind == "embedding":
            ids = [int(i) for i in ids]
            lines.append((label, colour, [("gap" if i == m.max_tokens else str(i), i == m.max_tokens) for i in ids]))
        elif ids is not None:
            lines.append((label, colour, segments(ids, shown.showers.get(m.name))))
    page.text(MARGIN, _shortened(m.name, LABEL - 64), INK)
    for label, colour, words in lines:
        page.text(LABEL - 56, label, colour)
        page.flow(LABEL, words, colour)


class _Page:
    """Collects what is to be drawn, top down, so that the height is known before the first pixel is."""

    def __init__(self, width: int):
        from PIL import ImageFont

        self.width, self.y = width, MARGIN
        self._font = ImageFont.load_default(TEXT_SIZE)
        self._drawn: list = []

    def down(self, pixels: int) -> None:
        self.y += pixels

    def text(self, x: float, text: str, colour: tuple, dy: int = 0) -> float:
        """Returns where the text ends."""
        at = (x, self.y + dy)
        self._drawn.append(lambda sheet, draw: draw.text(at, text, colour, self._font))
        return x + self._font.getlength(text)

    def chip(self, x: float, text: str) -> float:
        """A sentinel: text on a rounded grey ground. Returns where it ends."""
        end, y = x + self._font.getlength(text) + 6, self.y
        box = (x, y - 1, end, y + TEXT_SIZE + 3)
        self._drawn.append(lambda sheet, draw: draw.rounded_rectangle(box, 4, fill=(222, 222, 232)))
        self.text(x + 3, text, (70, 70, 90))
        return end

    def swatch(self, x: float, colour: tuple) -> None:
        box = (x, self.y, x + TEXT_SIZE, self.y + TEXT_SIZE)
        self._drawn.append(lambda sheet, draw: draw.rectangle(box, fill=colour))

    def rule(self) -> None:
        line = (MARGIN, self.y, self.width - MARGIN, self.y)
        self._drawn.append(lambda sheet, draw: draw.line(line, fill=(190, 190, 190)))
        self.down(MARGIN)

    def image(self, x: float, dy: int, picture: np.ndarray) -> None:
        from PIL import Image

        at = (int(x), self.y + dy)
        self._drawn.append(lambda sheet, draw: sheet.paste(Image.fromarray(picture), at))

    def flow(self, left: int, words: Sequence[tuple[str, bool]], colour: tuple) -> None:
        """Words from ``left`` to the right margin, over as many lines as it takes."""
        x = left
        for word, sentinel in words:
            length = self._font.getlength(word) + (6 if sentinel else 0)
            if x > left and x + length > self.width - MARGIN:
                x = left
                self.down(LINE)
            x = (self.chip(x, word) if sentinel else self.text(x, word, colour)) + 5
        self.down(LINE)

    def draw(self, sheet, draw) -> None:
        for item in self._drawn:
            item(sheet, draw)
