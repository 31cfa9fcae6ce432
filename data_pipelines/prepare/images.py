"""Bytes of a picture file to uint8 RGB, whatever the file is like; Pillow decodes.

Every picture ends as an array, with notes of what was done to make it one, or as `Unusable` with a reason.
"""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image

from data_pipelines.prepare import headers
from data_pipelines.prepare.errors import Unusable

# 300 MB as RGB. Pillow's own limit, 179 million, cannot be exceeded.
MAX_PIXELS = 100_000_000
# Only formats that hold photographs: others have decoders that are rarely tested, and EPS starts a program.
_FORMATS = tuple(dict.fromkeys(headers.SUFFIXES.values()))
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF tag


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """The picture in a file's bytes, upright, as RGB.

    Args:
      data: the file. name: for messages, and its suffix for the note ``wrong_extension``.
      max_pixels: refuse a picture of more by its header, before anything is decoded.

    Returns:
      uint8 [H, W, 3], H, W >= 1, and notes: ``wrong_extension``, ``first_frame`` (of an animation or of several pages),
      ``exif_rotated``, ``exif_unreadable``, ``grey``, ``palette``, ``16_bit`` (scaled to 8), ``float``, ``cmyk``,
      ``alpha_on_white``, ``transparency_ignored``, ``colour_space``.

    Raises:
      Unusable: with a reason from its list of image reasons. Nothing else is raised.
    """
    image, notes, orientation = _load(data, name, max_pixels)
    try:
        image, colour_notes = _to_rgb(image, name)
        if orientation:
            image = image.transpose(_TRANSPOSE[orientation])
        array = np.array(image, np.uint8)
    except Unusable:
        raise
    except Exception as error:
        raise Unusable("corrupt", f"{name}: the colours cannot be converted to RGB ({_text(error)})") from error
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise Unusable("corrupt", f"{name}: decodes to an array of shape {array.shape}, expected height x width x 3")
    return array, notes + colour_notes


def decode_label(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The stored numbers of a picture that is a label (depth, classes, normals): no rotation, no colour conversion.

    Returns uint8, uint16, int32 or float32 [H, W] or uint8 [H, W, C]; palette pictures give their indices. Raises
    Unusable as `decode_image` does.
    """
    image, _, _ = _load(data, name, max_pixels)
    try:
        array = np.array(image)
    except Exception as error:
        raise Unusable("corrupt", f"{name}: has no readable numbers ({_text(error)})") from error
    return array.astype(np.uint8) if array.dtype == np.bool_ else array


def check_max_pixels(max_pixels: int) -> int:
    """The limit itself. Raises ValueError where Pillow would refuse smaller pictures than it."""
    ceiling = 2 * (Image.MAX_IMAGE_PIXELS or max_pixels)
    if not 1 <= max_pixels <= ceiling:
        raise ValueError(f"max_pixels is {max_pixels}: expected 1 to {ceiling}, which is Pillow's own limit")
    return max_pixels


def _load(data: bytes, name: str, max_pixels: int) -> tuple[Image.Image, tuple[str, ...], int]:
    """The decoded first frame, notes of what the file is, and the orientation that is still to be applied (or 0)."""
    if not data:
        raise Unusable("zero_bytes", f"{name}: the file has zero bytes")
    # Before Pillow, which allocates a WebP's canvas when it opens the file, and knows no size 0.
    _check_size(headers.size(data), name, max_pixels)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures and of damaged metadata; both are judged here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(image.size, name, max_pixels)
            _check_strips(image, name)
            notes = _file_notes(image, name)
            before = _orientation(image)
            image.load()
            orientation = _orientation(image)  # Pillow has applied and removed it in TIFF
            _check_size(image.size, name, max_pixels)
            if _is_animated(image, data):
                notes.append("first_frame")
    except Unusable:
        raise
    except Exception as error:  # decoders of damaged data raise almost anything
        raise _failure(error, data, name) from error
    if before is None:
        notes.append("exif_unreadable")
    elif before:
        notes.append(f"exif_rotated: orientation {before}")
    return image, tuple(notes), orientation or 0


def _check_size(size: tuple[int, int] | None, name: str, max_pixels: int) -> None:
    if size is None:
        return
    width, height = size
    if width < 1 or height < 1:
        raise Unusable("zero_size", f"{name}: the picture is {width} x {height} pixels")
    if width * height > max_pixels:
        raise Unusable(
            "too_large",
            f"{name}: the picture is {width} x {height} pixels, more than the {max_pixels} allowed. Scale it down, or "
            "raise max_pixels",
        )


def _check_strips(image: Image.Image, name: str) -> None:
    """Pillow leaves black what the strips of a TIFF do not cover; a damaged height would give millions of rows."""
    extents = [tile[1] for tile in image.tile if tile[1]]
    if image.format == "TIFF" and extents:
        covered = max(e[2] for e in extents), max(e[3] for e in extents)
        # With a rotating orientation the size is that of the upright picture, the extents are as stored.
        if not any(x <= covered[0] and y <= covered[1] for x, y in (image.size, image.size[::-1])):
            raise Unusable("corrupt", f"{name}: {image.size} pixels are announced, but the strips end at {covered}")


def _file_notes(image: Image.Image, name: str) -> list[str]:
    notes = []
    suffix = os.path.splitext(name)[1].lower()
    found = "JPEG" if image.format == "MPO" else image.format
    if headers.SUFFIXES.get(suffix) != found:
        notes.append(f"wrong_extension: {found} named {suffix or 'without suffix'}")
    # Of 16 bits a channel Pillow keeps the upper 8 in RGB pictures.
    if image.mode in ("RGB", "RGBA", "LA", "CMYK") and any("16" in str(tile[3]) for tile in image.tile):
        notes.append("16_bit")
    return notes


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation 2..8, 0 if there is nothing to do, None if the EXIF data is unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata raises almost anything
        return None
    return value if isinstance(value, int) and value in _TRANSPOSE else 0


def _is_animated(image: Image.Image, data: bytes) -> bool:
    if image.format != "GIF":
        return bool(getattr(image, "is_animated", False))
    try:  # on a second image, because looking for the next frame of a GIF moves it there
        return Image.open(io.BytesIO(data), formats=["GIF"]).is_animated
    except Exception:  # there is something after the first frame, and it is damaged
        return True


def _to_rgb(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    mode, notes = image.mode, []
    if mode.startswith("I") or mode == "F":
        return _scaled(image, name)
    if mode in ("1", "L", "LA", "La"):
        notes.append("grey")
    elif mode in ("P", "PA"):
        notes.append("palette")
    elif mode == "CMYK":
        notes.append("cmyk")
    elif mode not in ("RGB", "RGBA", "RGBa", "RGBX"):
        if mode not in ("YCbCr", "HSV"):
            raise Unusable("unsupported_mode", f"{name}: pixels of type {mode!r} are not supported; save it as RGB")
        notes.append("colour_space")
    key = image.info.get("transparency")
    if key is not None and mode in ("1", "L", "RGB"):
        values = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
            notes.append("transparency_ignored")
            key = None
            del image.info["transparency"]
    if key is not None or mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        if mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("alpha_on_white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), tuple(notes)


def _scaled(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """16-bit, 32-bit or float grey as 8-bit RGB, from the range that the type has by convention."""
    array = np.asarray(image)
    low, high = float(array.min()), float(array.max())
    limit = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= limit):
        raise Unusable(
            "unsupported_mode",
            f"{name}: grey values of type {image.mode!r} lie in [{low:g}, {high:g}], expected 0..{limit:g}; "
            "save it with 8 or 16 bits",
        )
    grey = np.round(array.astype(np.float32) * np.float32(255.0 / limit)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB"), ("grey", "float" if image.mode == "F" else "16_bit")


def _failure(error: Exception, data: bytes, name: str) -> Unusable:
    text, announced = _text(error), headers.sniff(data[:16])
    if isinstance(error, Image.DecompressionBombError):
        return Unusable("too_large", f"{name}: {text}")
    early = isinstance(error, EOFError) or any(w in text.lower() for w in ("truncated", "unexpected end", "too short"))
    if early or headers.cut_off(data):
        return Unusable("truncated", f"{name}: the file ends early ({len(data)} bytes; Pillow says: {text})")
    if isinstance(error, Image.UnidentifiedImageError):
        if announced:
            reason, why = _why_unidentified(announced, data)
            return Unusable(reason, f"{name}: begins as {announced}, but Pillow cannot read its header ({why})")
        if headers.other_format(data):
            return Unusable("unsupported_format", f"{name}: this picture format is not read; convert it to JPEG or PNG")
        return Unusable("not_an_image", f"{name}: not a picture (the bytes begin with {data[:8]!r})")
    return Unusable("corrupt", f"{name}: damaged; Pillow says: {text}")


def _why_unidentified(announced: str, data: bytes) -> tuple[str, str]:
    """(reason, words) of the format's own reader, which `Image.open` swallows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.OPEN[announced][0](io.BytesIO(data), "")
    except Exception as error:
        mode = any(word in str(error) for word in ("unknown pixel mode", "unknown raw mode", "Unsupported BMP"))
        return ("unsupported_mode" if mode else "corrupt"), _text(error)
    return "corrupt", "no reason is given"


def _text(error: Exception) -> str:
    """An exception's message in one line, or its type where it has none; objects' addresses vary, so they go."""
    text = " ".join(str(error).split()).partition(" <_io")[0]
    return text[:200] or type(error).__name__
