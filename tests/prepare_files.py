"""Small folders and tars of pictures for the tests of preparation, and how their sources are opened."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.sources import Source, open_source


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).astype(np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(root: pathlib.Path, files: dict[str, bytes | str]) -> pathlib.Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def folder(path, **options) -> Source:
    return open_source({"kind": "folder", "path": str(path), **options})


def reasons(source: Source) -> dict[str, str]:
    return {p.key: p.reason for p in source.problems}


def items(source: Source) -> dict:
    """Every sample's item or the Unusable that reading it gave, by key."""
    found = {}
    for i, key in enumerate(source.keys):
        try:
            found[key] = source.read(i)
        except Unusable as error:
            found[key] = error
    return found


def write_tar(path: pathlib.Path, members: dict[str, bytes | str], **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tars(path, **options) -> Source:
    return open_source({"kind": "tars", "path": str(path), **options})


def layout_a(root: pathlib.Path, shards: int = 2, each: int = 3) -> None:
    """Keys k0, k1, ... counting through the shards, with modalities rgb, caption, tok_depth, crop_settings, det."""
    box = {"instances": [{"boxes": [0, 0, 0.5, 1], "class_name": "cat", "score": 0.5}]}
    crops = np.array([[0, 1, 4, 4, 0], [0, 0, 3, 3, 1]], np.int32)
    for s in range(shards):
        keys = range(s * each, (s + 1) * each)
        write_tar(root / f"rgb/s-{s}.tar", {f"k{k}.png": png(k) for k in keys})
        write_tar(root / f"caption/s-{s}.tar", {f"k{k}.json": json.dumps([f"c{k}", ""]) for k in keys})
        write_tar(root / f"tok_depth/s-{s}.tar", {f"k{k}.npy": npy(np.full((2, 9), k, np.int16)) for k in keys})
        write_tar(root / f"crop_settings/s-{s}.tar", {f"k{k}.npy": npy(crops) for k in keys})
        write_tar(root / f"det/s-{s}.tar", {f"k{k}.json": json.dumps(box) for k in keys})


ALL = "[rgb,caption,tok_depth,crop_settings,det]"
