"""Pack files: one zip per split, read with numpy and Pillow only.

Members of a sample with key K: `K/rgb.webp`, `K/depth.png` (16-bit millimetres, rounded to multiples of 4, which is a
fifth smaller), `K/normal.webp` and `K/semseg.webp` (lossless), stored uncompressed for random access. Once per pack:
`meta.jsonl`, one JSON line per sample with instances, caption, scene and models (deflated together they take a third of
the space), and `index.json` with the keys, resolution, classes, palette, licence and how the file was made.
"""

from __future__ import annotations

import glob
import io
import json
import os
import pathlib
import threading
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.rooms.classes import CLASSES, palette
from fm4m.files import complete_file

FORMAT = "rooms-pack"
VERSION = 1
WEBP_QUALITY = 82
DEPTH_STEP = 4  # millimetres
SHIPPED = pathlib.Path(__file__).parent / "pack"
_MEMBERS = ("rgb.webp", "depth.png", "normal.webp", "semseg.webp")
_META = ("instances", "caption", "scene", "models")
_INDEX = ("format", "version", "count", "resolution", "keys", "classes", "palette", "license", "split")
_DATE = (1980, 1, 1, 0, 0, 0)  # the same samples give the same bytes


def _image_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_sample(sample: dict[str, Any]) -> dict[str, bytes]:
    """The four members of a sample and its line of `meta.jsonl` (as "meta").

    Its fields are those of `RoomsPack.__getitem__`; ValueError if depth is outside [0, 65.535] metres.
    """
    depth = np.round(np.asarray(sample["depth"], np.float64) * 1000 / DEPTH_STEP) * DEPTH_STEP
    if not (np.isfinite(depth).all() and depth.min() >= 0 and depth.max() < 65536):
        raise ValueError(
            f"sample of scene {sample['scene']!r}: depth must lie in [0, 65.535] m to be stored in millimetres"
        )
    meta = {name: sample[name] for name in _META}
    for instance in meta["instances"]:
        instance["boxes"] = [round(float(v), 5) for v in instance["boxes"]]
    return {
        "rgb.webp": _image_bytes(Image.fromarray(sample["rgb"]), "WEBP", quality=WEBP_QUALITY, method=6),
        "depth.png": _image_bytes(Image.fromarray(depth.astype(np.uint16)), "PNG", optimize=True),
        "normal.webp": _image_bytes(Image.fromarray(sample["normal"]), "WEBP", lossless=True, quality=75, method=6),
        "semseg.webp": _image_bytes(Image.fromarray(sample["semseg"]), "WEBP", lossless=True, quality=75, method=6),
        "meta": json.dumps(meta, separators=(",", ":"), ensure_ascii=True).encode(),
    }


def write_pack(
    path: str | os.PathLike,
    samples: Iterable[dict[str, Any]],
    *,
    split: str,
    license: str,
    generator: dict[str, Any] | None = None,
    first: int = 0,
) -> int:
    """Write samples (or what `encode_sample` made of them) to a pack; returns how many.

    The file is written beside its place and renamed when complete, so a reader never sees half a pack. Keys are
    six-digit numbers counting from `first`.

    Raises:
      ValueError: no samples, a sample of another resolution, or depths that millimetres cannot hold.
    """
    path = pathlib.Path(path)
    with complete_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        index, lines = _write_samples(path, archive, samples, first)
        archive.writestr(zipfile.ZipInfo("meta.jsonl", _DATE), b"\n".join(lines), zipfile.ZIP_DEFLATED, 9)
        index |= {"split": split, "license": license, "generator": generator or {}}
        text = json.dumps(index, separators=(",", ":"))
        archive.writestr(zipfile.ZipInfo("index.json", _DATE), text, zipfile.ZIP_DEFLATED, 9)
    return index["count"]


def _write_samples(
    path: pathlib.Path, archive: zipfile.ZipFile, samples: Iterable[dict[str, Any]], first: int
) -> tuple[dict[str, Any], list[bytes]]:
    """Write the pictures of all samples; returns the part of the index that they decide, and the lines of metadata."""
    keys: list[str] = []
    lines: list[bytes] = []
    resolution = 0
    for sample in samples:
        members = sample if "meta" in sample else encode_sample(sample)
        key = f"{first + len(keys):06d}"
        size = Image.open(io.BytesIO(members["rgb.webp"])).size
        resolution = resolution or size[0]
        if size != (resolution, resolution):
            raise ValueError(f"{path}: sample {key} is {size[0]}x{size[1]}, expected {resolution}x{resolution}")
        for name in _MEMBERS:
            archive.writestr(zipfile.ZipInfo(f"{key}/{name}", _DATE), members[name])
        keys.append(key)
        lines.append(members["meta"])
    if not keys:
        raise ValueError(f"{path}: there are no samples to write")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "count": len(keys),
        "resolution": resolution,
        "keys": keys,
        "classes": list(CLASSES),
        "palette": palette().tolist(),
    }
    return index, lines


class RoomsPack:
    """Random access to a pack file; safe to share between threads and to use after a fork.

    Attributes: `path`, `resolution`, `classes` (tuple of names, position = id), `palette` (uint8 [C, 3]), `keys`,
    `info` (the whole index).

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a rooms pack, truncated, or of an unknown version; the message names the file and the member.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path}: no such rooms pack. The shipped ones are {SHIPPED}/rooms_train.zip and rooms_val.zip; "
                "`python -m data_pipelines.rooms.generate --help` says how to make more"
            )
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1
        self._lines: list[bytes] | None = None
        raw = self._read("index.json")
        try:
            self.info: dict[str, Any] = json.loads(raw)
            missing = [name for name in _INDEX if name not in self.info]
        except (ValueError, TypeError):
            raise ValueError(f"{self.path}: index.json is not JSON; expected a rooms pack") from None
        if missing or self.info["format"] != FORMAT:
            raise ValueError(
                f"{self.path}: index.json lacks {missing or 'the rooms-pack format mark'}; expected a rooms pack"
            )
        if self.info["version"] != VERSION:
            raise ValueError(f"{self.path}: pack version {self.info['version']}, this program reads version {VERSION}")
        self.keys: list[str] = self.info["keys"]
        self.resolution: int = self.info["resolution"]
        self.classes: tuple[str, ...] = tuple(self.info["classes"])
        self.palette = np.array(self.info["palette"], np.uint8)
        if len(self.keys) != self.info["count"]:
            raise ValueError(
                f"{self.path}: index.json counts {self.info['count']} samples but lists {len(self.keys)} keys"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def _read(self, member: str) -> bytes:
        with self._lock:
            if self._archive is None or self._owner != os.getpid():  # a forked child must not share the file position
                try:
                    self._archive = zipfile.ZipFile(self.path)
                except zipfile.BadZipFile as error:
                    raise ValueError(
                        f"{self.path}: not a zip file, or truncated ({error}); fetch or generate it again"
                    ) from None
                self._owner = os.getpid()
            try:
                return self._archive.read(member)
            except KeyError:
                raise ValueError(f"{self.path}: member {member} is missing; expected a rooms pack") from None
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise ValueError(
                    f"{self.path}: member {member} is damaged ({error}); fetch or generate it again"
                ) from None

    def _image(self, key: str, name: str) -> np.ndarray:
        member = f"{key}/{name}"
        raw = self._read(member)
        try:
            array = np.asarray(Image.open(io.BytesIO(raw)))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{self.path}: member {member} is no readable image ({error})") from None
        if array.shape[:2] != (self.resolution, self.resolution):
            raise ValueError(f"{self.path}: member {member} has shape {array.shape}, index.json says {self.resolution}")
        return array

    def meta(self, index: int) -> dict[str, Any]:
        """instances, caption, scene and models of a sample, without decoding its pictures."""
        if self._lines is None:
            lines = self._read("meta.jsonl").split(b"\n")
            if len(lines) != len(self):
                raise ValueError(f"{self.path}: meta.jsonl has {len(lines)} lines for {len(self)} samples")
            self._lines = lines
        try:
            meta = json.loads(self._lines[index])
            return {name: meta[name] for name in _META}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path}: line {index} of meta.jsonl is not sample metadata ({error!r})") from None

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample.

        Returns a dict: key str; rgb uint8 [H, W, 3]; depth float32 [H, W], z-depth in metres; normal uint8 [H, W, 3] =
        round(127.5 (n + 1)), camera axes x right, y up, z towards the camera; semseg uint8 [H, W] class ids; instances,
        a list of {"boxes": [xmin, ymin, xmax, ymax] in [0, 1], "class_name": str, "score": float}; caption str;
        scene str; models, catalogue ids.

        Raises IndexError beyond the end, ValueError naming file and member if damaged.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        key = self.keys[index]
        sample: dict[str, Any] = {"key": key}
        sample["rgb"] = self._image(key, "rgb.webp")
        sample["depth"] = self._image(key, "depth.png").astype(np.float32) / 1000
        sample["normal"] = self._image(key, "normal.webp")
        sample["semseg"] = self._image(key, "semseg.webp")[..., 0]  # WebP knows only colour pictures
        return sample | self.meta(index)


def open_packs(pattern: str | os.PathLike) -> list[RoomsPack]:
    """All packs whose paths match a glob pattern, sorted by name. Raises FileNotFoundError when none does."""
    paths = sorted(glob.glob(os.fspath(pattern)))
    if not paths:
        raise FileNotFoundError(f"{pattern}: no rooms pack matches this pattern")
    return [RoomsPack(path) for path in paths]
