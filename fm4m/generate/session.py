"""A model with its tokenizers: files and texts in, pictures and texts out."""

from __future__ import annotations

import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fm4m.generate.canvas import Canvas
from fm4m.generate.generator import Generator
from fm4m.generate.inputs import make_canvas
from fm4m.generate.presets import base_name
from fm4m.loading import LoadedModel
from fm4m.modalities import Modality, ModalitySet, unknown_name
from fm4m.pictures import Shower, draw_sheet, load_showers

Box = tuple[float, float, float, float]


class Session:
    """Reads what a user has, generates, and makes the result something to look at.

    Args:
      model: as `fm4m.load` gives it.
      tokenizers: entries MODALITY=image:FILE, =text:FILE or =boxes:FILE; None: those that the run's configuration draws
        its sample pictures with.
    """

    def __init__(self, model: LoadedModel, tokenizers: Sequence[str] | None = None):
        self.model, self.modalities = model, model.modalities
        if tokenizers is None:
            tokenizers = model.meta.get("config", {}).get("log", {}).get("picture_tokenizers", ())
        self.showers: dict[str, Shower] = load_showers(tokenizers, model.modalities)
        self.generator = Generator(model.params, model.config, model.modalities)

    def name_of(self, given: str, side: Sequence[str]) -> str:
        """The modality that a user means: its name, or its name without the resolution if that is unique.

        Raises ValueError naming the nearest ones.
        """
        if given in side:
            return given
        found = [n for n in side if base_name(n) == given] or [n for n in side if base_name(n) == f"tok_{given}"]
        if len(found) != 1:
            choices = f" ({', '.join(found)})" if found else ""
            several = f" It could be{choices}." if found else ""
            raise ValueError(unknown_name(given, side, "modality of this model") + several)
        return found[0]

    # ---- in

    def read(
        self, inputs: Mapping[str, Any], copies: int = 1, codes: Mapping[str, np.ndarray] | None = None
    ) -> Canvas:
        """A canvas of ``copies`` equal samples, or as many of every sample of ``codes``.

        Args:
          inputs: by modality (see `name_of`) a text, the path of a picture or of a .npy array in the stored form of its
            tokenizer, or such an array itself. A text that ends with a gap, such as "a dog [S_1]", is open: it may go
            on; other texts are complete.
          copies: how often the same is given.
          codes: what another session has, as `codes` gives it, for instance that of a model for smaller pictures, of
            which this one's model makes larger ones. What is no input of this model is left out.

        Raises:
          ValueError: naming the modality and what was expected.
        """
        codes = {name: rows for name, rows in (codes or {}).items() if name in self.modalities.inputs}
        known = [*dict.fromkeys((*self.modalities.inputs, *self.modalities.outputs))]
        arrays = {}
        for given, value in inputs.items():
            m = self.modalities[self.name_of(given, known)]
            if m.name in arrays or m.name in codes:
                raise ValueError(f"input {m.name!r} is given twice")
            try:
                arrays[m.name] = self._array(m, value)
            except ValueError as error:
                named = repr(m.name) in str(error)
                raise ValueError(f"{error}" if named else f"input {m.name!r}: {error}") from None
        size = copies * len(next(iter(codes.values()), [None]))
        repeated = {n: [a] * size if isinstance(a, list) else np.stack([a] * size) for n, a in arrays.items()}
        for name, rows in codes.items():
            rows = np.repeat(np.asarray(rows), copies, axis=0)
            texts = self.modalities[name].kind == "sequence"
            repeated[name] = [row[row >= 0].tolist() for row in rows] if texts else rows
        return make_canvas(self.modalities, repeated)

    def _array(self, m: Modality, value: Any) -> Any:
        if m.kind == "sequence":
            if not isinstance(value, str):
                raise ValueError(f"input {m.name!r}: expected a text, got {type(value).__name__}")
            return self.ids(m, value)
        if isinstance(value, str | pathlib.Path):
            shower = self.showers.get(m.name)
            known = m.kind == "tokens" and shower is not None and shower.kind == "image"
            value = _read_array(m, pathlib.Path(value), shower.tokenizer.config.domain if known else "rgb")
        value = np.asarray(value)
        if m.kind == "pixels":
            return fit(value, (m.grid[0] * m.patch_size, m.grid[1] * m.patch_size))
        if m.kind == "embedding":
            return value
        if value.shape in ((m.max_tokens,), m.grid) and np.issubdtype(value.dtype, np.signedinteger):
            return value.reshape(m.max_tokens)  # codes already
        tokenizer = self._shower(m.name, "image").tokenizer
        config = tokenizer.config
        if config.domain in ("rgb", "normal"):
            value = fit(value, config.image_size)
        elif value.shape[:2] != config.image_size:
            value = _nearest(value, config.image_size)
        return tokenizer.encode(value[None])[0]

    def ids(self, m: Modality, text: str) -> list[int]:
        """Token ids of a text, with [EOS] unless it ends with a gap. Raises ValueError for one that is too long."""
        tokenizer = self._shower(m.name, "text").tokenizer
        ids = tokenizer.encode(text, eos=not text.rstrip().endswith("]"))
        if len(ids) > m.max_tokens:
            raise ValueError(f"input {m.name!r}: the text has {len(ids)} tokens, at most {m.max_tokens} fit")
        return ids

    def _shower(self, name: str, kind: str) -> Shower:
        shower = self.showers.get(name)
        if shower is None or (shower.kind == "image") != (kind == "image"):
            raise ValueError(f"{name!r} has no tokenizer: pass --tokenizer={name}={kind}:FILE")
        return shower

    def open_cells(self, canvas: Canvas, name: str, where: np.ndarray | Box) -> Canvas:
        """The canvas with some cells of a grid to be generated anew.

        Args:
          name: a modality of codes that is given.
          where: a mask [H, W], true (or not 0) where the picture shall change: a cell with any such pixel is opened.
            It is cut to its centre, as pictures are; or a box (xmin, ymin, xmax, ymax), 0 to 1, relative to the
            picture that the model sees.
        """
        m = self.modalities[name]
        if m.kind != "tokens" or name not in canvas.ids:
            raise ValueError(f"{name!r} cannot be changed in part: expected a modality of codes that is given")
        cells = opened(where, m.grid).reshape(-1)
        seen = canvas.seen[name] & ~cells
        return canvas.write(name, canvas.ids[name], seen)

    # ---- out

    def codes(self, canvas: Canvas) -> dict[str, np.ndarray]:
        """int32 [B, max_tokens] of every discrete modality: codes or ids, and -1 where there is none."""
        return {n: np.where(np.asarray(canvas.seen[n]), np.asarray(ids), -1) for n, ids in canvas.ids.items()}

    def cells(self, canvas: Canvas, name: str) -> list:
        """What to draw of a modality for each sample: a picture, a text, (picture, boxes), or None (no tokenizer)."""
        m = self.modalities[name]
        if m.kind == "pixels":
            return list(_unpatchified(np.asarray(canvas.dense[name]), m))
        if name not in self.showers:
            return [None] * canvas.size
        shower = self.showers[name]
        if shower.kind == "image":
            return list(shower.tokenizer.to_picture(shower.tokenizer.decode(np.asarray(canvas.ids[name]))))
        texts = self.texts(canvas, name)
        if shower.kind == "text":
            return texts
        from fm4m.transforms import boxes

        return [(under, boxes.from_text(text).boxes) for under, text in zip(self._under(canvas), texts, strict=True)]

    def texts(self, canvas: Canvas, name: str) -> list[str]:
        """The texts of a sequence modality, one a sample."""
        rows = zip(np.asarray(canvas.ids[name]), np.asarray(canvas.seen[name]), strict=True)
        return [self.showers[name].tokenizer.decode(ids[seen].tolist()) for ids, seen in rows]

    def _under(self, canvas: Canvas) -> list[np.ndarray]:
        """The pictures that boxes are drawn on: pixels, decoded RGB codes, or white."""
        for name, seen in canvas.seen.items():
            shown = base_name(name) == "rgb" or (base_name(name) == "tok_rgb" and name in self.showers)
            if shown and bool(np.asarray(seen).all()):
                return self.cells(canvas, name)
        return [np.full((64, 64, 3), 255, np.uint8)] * canvas.size

    def sheet(self, canvas: Canvas, given: Sequence[str], targets: Sequence[str], note: str) -> np.ndarray:
        """A contact sheet, a line a sample: what was given, then what was generated. uint8 [H, W, 3]."""
        columns = [(f"given: {n}", [[c] for c in self.cells(canvas, n)]) for n in given if n not in targets]
        columns += [(n, [[c] for c in self.cells(canvas, n)]) for n in targets]
        return draw_sheet(columns, ("",), note)

    def write(
        self, canvas: Canvas, given: Sequence[str], targets: Sequence[str], out: pathlib.Path, note: str
    ) -> list[pathlib.Path]:
        """Writes the contact sheet, every target of every sample, and the codes; returns the paths."""
        from PIL import Image

        out.mkdir(parents=True, exist_ok=True)
        paths = [out / "sheet.png", out / "codes.npz"]
        Image.fromarray(self.sheet(canvas, given, targets, note)).save(paths[0])
        np.savez(paths[1], **self.codes(canvas))
        for name in targets:
            for b, cell in enumerate(self.cells(canvas, name)):
                path = out / f"{name}-{b}"
                if isinstance(cell, np.ndarray):
                    Image.fromarray(cell).save(path := path.with_name(path.name + ".png"))
                elif cell is not None:
                    path = path.with_name(path.name + ".txt")
                    path.write_text(self.texts(canvas, name)[b] + "\n")
                else:
                    continue
                paths.append(path)
        return paths


def read_codes(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The ``codes.npz`` that `Session.write` writes. Raises ValueError for a file that is none."""
    if not path.is_file():
        raise ValueError(f"--codes: there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            codes = {name: file[name] for name in file.files}
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--codes: {path} is not a file of codes ({error})") from None
    bad = [
        n
        for n, rows in codes.items()
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or not np.issubdtype(rows.dtype, np.signedinteger)
    ]
    if bad or len({len(rows) for rows in codes.values()}) != 1:
        raise ValueError(f"--codes: {path}: expected integers [samples, tokens] of every modality"
                         + (f", but not so {bad[0]!r}" if bad else ""))  # fmt: skip
    return codes


def read_mask(where: str) -> np.ndarray | Box:
    """A mask from the command line: a picture whose bright pixels shall change, or xmin,ymin,xmax,ymax."""
    numbers = where.split(",")
    if len(numbers) == 4:
        try:
            return tuple(float(n) for n in numbers)
        except ValueError:
            pass
    path = pathlib.Path(where)
    if not path.is_file():
        raise ValueError(f"{where!r} is neither a mask picture nor xmin,ymin,xmax,ymax")
    return read_picture(path, f"{path}", lambda image: _upright(image).convert("L")) > 127


def read_picture(
    source: pathlib.Path | io.BytesIO, name: str, prepare: Callable[[Any], Any] = lambda image: image
) -> np.ndarray:
    """A picture file as an array, ``prepare`` being applied to Pillow's image.

    Raises ValueError, beginning with ``name``, for what Pillow cannot read.
    """
    from PIL import Image

    try:
        with Image.open(source) as image:
            return np.asarray(prepare(image))
    # SyntaxError is Pillow's for damaged chunks; a "bomb" has more than 179 megapixels.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a picture that can be read ({error})") from None


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _centre(shape: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the largest window in the middle of ``shape`` that has the proportions of ``size``."""
    scale = min(shape[0] / size[0], shape[1] / size[1])
    rows, columns = (max(round(n * scale), 1) for n in size)
    top, left = (shape[0] - rows) // 2, (shape[1] - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of a picture uint8 [H, W, 3], as large as the shape of ``size`` (height, width) allows, resized."""
    from PIL import Image

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a picture uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if image.shape[:2] == size:
        return image
    cut = Image.fromarray(image[_centre(image.shape[:2], size)])
    return np.asarray(cut.resize(size[::-1], Image.Resampling.BICUBIC))


def opened(where: np.ndarray | Box, grid: tuple[int, int]) -> np.ndarray:
    """bool grid: the cells that the centre of a mask [H, W], or a box, touches. ValueError if that is none of them."""
    rows, columns = grid
    if np.ndim(where) == 2:
        mask = np.asarray(where) != 0
        mask = mask[_centre(mask.shape, grid)]
        y, x = np.nonzero(mask)
        cells = np.zeros(grid, bool)
        cells[y * rows // mask.shape[0], x * columns // mask.shape[1]] = True
    else:
        x0, y0, x1, y1 = (float(v) for v in where)
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"box {tuple(where)} must be xmin, ymin, xmax, ymax from 0 to 1")
        y, x = np.arange(rows), np.arange(columns)
        inside = [(a < high * n) & (a + 1 > low * n) for a, low, high, n in ((y, y0, y1, rows), (x, x0, x1, columns))]
        cells = inside[0][:, None] & inside[1]
    if not cells.any():
        raise ValueError("the mask is empty: nothing would change")
    return cells


# Domains of tokenizers whose pictures are grey, and those that no picture can hold.
_GREY, _NO_PICTURES = ("edges", "mask"), ("depth", "features", "vector")


def _read_array(m: Modality, path: pathlib.Path, domain: str) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"input {m.name!r}: there is no file {path}")
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"input {m.name!r}: {path} is not a .npy array ({error})") from None
    if domain in _NO_PICTURES:
        raise ValueError(f"input {m.name!r}: expected a .npy array of {domain} (floats) or of codes, got {path}")

    def prepare(image: Any) -> Any:
        image = _upright(image)
        # A palette's indices are the class ids; colours instead of ids are refused by the tokenizer.
        if domain == "semseg" and image.mode not in ("L", "P"):
            return image.convert("RGB")
        return image if domain == "semseg" else image.convert("L" if domain in _GREY else "RGB")

    return read_picture(path, f"input {m.name!r}: {path}", prepare)


def _nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if array.ndim < 2:
        raise ValueError(f"expected an array [height, width, ...], got {array.dtype} {list(array.shape)}")
    array = array[_centre(array.shape[:2], size)]
    rows, columns = (np.arange(n) * have // n for n, have in zip(size, array.shape[:2], strict=True))
    return array[rows][:, columns]


def _unpatchified(vectors: np.ndarray, m: Modality) -> np.ndarray:
    """Normalised patches [B, cells, P] to pictures uint8 [B, H, W, 3]."""
    from fm4m.transforms.images import IMAGENET_MEAN, IMAGENET_STD

    (rows, columns), p = m.grid, m.patch_size
    x = vectors.reshape(-1, rows, columns, p, p, m.channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, rows * p, columns * p, m.channels)
    return np.clip(np.round((x * IMAGENET_STD + IMAGENET_MEAN) * 255), 0, 255).astype(np.uint8)


def known_modalities(modalities: ModalitySet) -> str:
    """Inputs and outputs as a sentence, for messages and help."""
    return f"inputs: {', '.join(modalities.inputs)}; outputs: {', '.join(modalities.outputs)}"
