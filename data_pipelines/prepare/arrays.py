"""Members that are neither RGB pictures nor captions: arrays, boxes and labels stored as pictures or JSON.

Nothing is unpickled: .npy and .npz hold plain numbers only.
"""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np

from data_pipelines.prepare import headers, images
from data_pipelines.prepare.captions import decode_text, load_json, parse_json, parse_text
from data_pipelines.prepare.errors import Unusable

MAX_NPZ_BYTES = 1 << 30
JSON_SUFFIXES = (".json", ".json.gz")


def decode_npy(data: bytes, name: str) -> np.ndarray:
    """The array of a .npy file. Raises Unusable, reason ``array`` (or ``truncated``), for anything else."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise Unusable("array", f"{name}: holds Python objects, which are not loaded; save an array of numbers")
        wanted = math.prod(shape) * dtype.itemsize  # before numpy allocates what a damaged header asks for
        if wanted > len(data) - file.tell():
            raise Unusable("truncated", f"{name}: an array of shape {shape} takes {wanted} bytes, the file has fewer")
        file.seek(0)
        return np.load(file, allow_pickle=False)
    except Unusable:
        raise
    except Exception as error:  # numpy evaluates the header as a literal, so damage raises almost anything
        raise Unusable("array", f"{name}: not a .npy array ({str(error)[:150] or type(error).__name__})") from error


def decode_npz(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. Raises Unusable as `decode_npy`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            total = sum(member.file_size for member in archive.infolist())
            if total > MAX_NPZ_BYTES:
                raise Unusable("array", f"{name}: unpacks to {total} bytes, more than the {MAX_NPZ_BYTES} allowed")
            arrays = {}
            for member in archive.namelist():
                arrays[member.removesuffix(".npy")] = decode_npy(archive.read(member), f"{name}/{member}")
            return arrays
    except Unusable:
        raise
    except Exception as error:
        raise Unusable("array", f"{name}: not a .npz file ({str(error)[:150] or type(error).__name__})") from error


def crop_settings(array: Any, name: str) -> np.ndarray:
    """Checks crop rows (top, left, height, width, flip); int64 [n, 5]. Raises Unusable, reason ``array``."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.shape[-1:] != (5,) or not array.size:
        raise Unusable("array", f"{name}: crop settings are integers [n, 5], found {_found(array)}")
    array = array.reshape(-1, 5)
    array = array.astype(np.int64)
    if (array[:, :2] < 0).any() or (array[:, 2:4] < 1).any() or not np.isin(array[:, 4], (0, 1)).all():
        raise Unusable("array", f"{name}: a crop row is not (top >= 0, left >= 0, height > 0, width > 0, flip 0 or 1)")
    return array


def detections(value: Any, name: str) -> list[dict[str, Any]]:
    """Checks ``{"instances": [{"boxes": [4 numbers], "class_name", "score"}]}`` or the list alone.

    Returns boxes as floats (xmin, ymin, xmax, ymax) in [0, 1]; score is 1 where absent. Raises Unusable, reason
    ``detections``, naming the instance.
    """
    if isinstance(value, dict):
        value = value.get("instances")
    if not isinstance(value, list):
        raise Unusable("detections", f"{name}: expected an object with the list 'instances'")
    found = []
    for i, instance in enumerate(value):
        try:
            box = [float(v) for v in instance["boxes"]]
            score = float(instance.get("score", 1.0))
            label = instance["class_name"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise Unusable("detections", f"{name}: instance {i} lacks readable boxes, class_name or score") from None
        if len(box) != 4 or not isinstance(label, str) or not label.strip() or not math.isfinite(score):
            raise Unusable("detections", f"{name}: instance {i} is not four numbers, a class name and a score")
        if not all(math.isfinite(v) and -1e-3 <= v <= 1 + 1e-3 for v in box):
            raise Unusable("detections", f"{name}: instance {i} has the box {box}; coordinates are parts of 0..1")
        box = [min(max(v, 0.0), 1.0) for v in box]
        if box[0] > box[2] or box[1] > box[3]:
            raise Unusable("detections", f"{name}: instance {i} has the box {box}; expected xmin, ymin, xmax, ymax")
        found.append({"boxes": box, "class_name": label, "score": score})
    return found


def depth(array: np.ndarray, name: str, unit: float) -> np.ndarray:
    """Depth as float32 [H, W] metres: integers are multiples of ``unit``. Raises Unusable, reason ``array``."""
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "iuf" or not array.size:
        raise Unusable("array", f"{name}: depth is a number a pixel, found {array.dtype} {array.shape}")
    return (array * unit if array.dtype.kind in "iu" else array).astype(np.float32)


def _found(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def decode_field(
    field: str,
    extension: str,
    data: bytes,
    name: str,
    *,
    aligned: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    depth_unit: float = 0.001,
    caption_lines: str = "whole",
    fallback: str | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The value of a member, by the field it belongs to and its extension (".jpg", ".npy", ".json.gz").

    Args:
      aligned: captions belong to crops row by row.
      max_pixels: as `images.decode_image`. depth_unit: metres a step of integer depth.
      caption_lines, fallback: as `captions.parse_text`.

    Returns:
      What `sources.Item.fields` has for the field, and notes. Fields whose name begins with ``rgb`` are decoded as
      photographs, all other pictures as labels.

    Raises:
      Unusable: the member is damaged, or its extension is not one that is read (pickles among them).
    """
    extension = extension.lower()
    options = {"aligned": aligned, "fallback": fallback}
    if field == "caption" and extension in (*JSON_SUFFIXES, ".txt"):
        if extension == ".txt":
            return parse_text(data, name, lines=caption_lines, **options)
        return parse_json(data, name, **options)
    value, notes = _decode_plain(field, extension, data, name, max_pixels, fallback)
    if field == "det":
        value = detections(value, name)
    elif field == "depth" and isinstance(value, np.ndarray):
        value = depth(value, name, depth_unit)
    elif field == "crop_settings":
        value = crop_settings(value, name)
    elif field.startswith("tok_") and not (isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size):
        raise Unusable("array", f"{name}: tokens are an array of integers, found {_found(value)}")
    return value, notes


def _decode_plain(
    field: str, extension: str, data: bytes, name: str, max_pixels: int, fallback: str | None
) -> tuple[Any, tuple[str, ...]]:
    if extension in headers.SUFFIXES or (field.startswith("rgb") and headers.sniff(data[:16])):
        if field.startswith("rgb"):
            return images.decode_image(data, name, max_pixels=max_pixels)
        return images.decode_label(data, name, max_pixels=max_pixels), ()
    if extension == ".npy":
        return decode_npy(data, name), ()
    if extension == ".npz":
        return decode_npz(data, name), ()
    if extension in JSON_SUFFIXES:
        return load_json(data, name, fallback=fallback)
    if extension in (".txt", ".cls"):
        text, notes = decode_text(data, name, fallback=fallback)
        return text.strip(), notes
    raise Unusable(
        "unsupported_member",
        f"{name}: members ending in {extension!r} are not read; "
        "expected a picture, .txt, .json, .json.gz, .npy or .npz",
    )
