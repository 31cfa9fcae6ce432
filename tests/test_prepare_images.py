from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.headers import SUFFIXES, sniff
from data_pipelines.prepare.images import check_max_pixels, decode_image, decode_label

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)
RGB = Image.fromarray(PIXELS)
GREY = PIXELS[..., 0]
LOSSLESS = {"PNG": "a.png", "BMP": "a.bmp", "PPM": "a.ppm", "TIFF": "a.tif"}
LOSSY = {"JPEG": "a.jpg", "JPEG2000": "a.jp2", "AVIF": "a.avif", "GIF": "a.gif", "WEBP": "a.webp"}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason(data: bytes, name: str = "a.png", **options) -> str:
    with pytest.raises(Unusable) as caught:
        decode_image(data, name, **options)
    assert str(caught.value).startswith(name + ":")
    return caught.value.reason


def png(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(("kind", "name"), {**LOSSLESS, **LOSSY}.items())
def test_every_format_gives_rgb_and_cut_in_half_is_unusable(kind, name):
    data = encoded(RGB, kind)
    assert sniff(data[:16]) == SUFFIXES[name[1:]] == kind
    array, notes = decode_image(data, name)
    assert array.shape == (6, 10, 3) and array.dtype == np.uint8
    assert notes == (("palette",) if kind == "GIF" else ())
    if kind in LOSSLESS:
        np.testing.assert_array_equal(array, PIXELS)
    assert reason(data[: len(data) // 2], name) == ("corrupt" if kind in ("JPEG2000", "AVIF") else "truncated")


def test_empty_small_huge_and_foreign_files():
    assert reason(b"") == "zero_bytes"
    assert reason(png(0, 5)) == reason(b"GIF89a" + bytes(7) + b";", "a.gif") == "zero_size"
    jpeg = bytearray(encoded(RGB, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 7] = b"\0\0"
    assert reason(bytes(jpeg), "a.jpg") == "zero_size"
    # Refused by the header: none of them holds pixels, so decoding would say something else.
    assert reason(png(10_001, 10_000)) == reason(png(60_000, 60_000)) == reason(webp(16_383, 16_383)) == "too_large"
    assert reason(encoded(RGB, "PNG"), max_pixels=59) == "too_large"
    assert reason(encoded(RGB, "TIFF"), max_pixels=59) == "too_large"
    assert decode_image(encoded(RGB, "PNG"), "a.png", max_pixels=60)[0].shape == (6, 10, 3)
    assert reason(b"hello, this is text") == "not_an_image"
    assert reason(b"<svg xmlns='x'/>", "a.svg") == reason(b"\0\0\0\x18ftypheic" + bytes(9)) == "unsupported_format"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "unsupported_format"
    with pytest.raises(ValueError, match="Pillow's own limit"):
        check_max_pixels(1 << 40)


def test_tiff_whose_strips_do_not_cover_it():
    data = encoded(RGB, "TIFF")
    at = data.index(struct.pack("<HHII", 257, 4, 1, 6))  # the height
    assert reason(data[: at + 8] + struct.pack("<I", 8_000_000) + data[at + 12 :], "a.tif") == "corrupt"


def test_extension_and_contents_differ():
    for name, shown in (("a.jpg", ".jpg"), ("a", "without suffix")):
        array, notes = decode_image(encoded(RGB, "PNG"), name)
        np.testing.assert_array_equal(array, PIXELS)
        assert notes == (f"wrong_extension: PNG named {shown}",)
    assert decode_image(encoded(RGB, "PNG"), "A.PNG")[1] == ()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied_once(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    # What the numbers mean: where the stored row 0 and column 0 belong (Exif 2.3, table 6).
    upright = {
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: PIXELS.swapaxes(0, 1)[:, ::-1],
        7: PIXELS.swapaxes(0, 1)[::-1, ::-1],
        8: PIXELS.swapaxes(0, 1)[::-1],
    }[orientation]
    for kind, name, options in (("PNG", "a.png", {}), ("TIFF", "a.tif", {}), ("WEBP", "a.webp", {"lossless": True})):
        array, notes = decode_image(encoded(RGB, kind, exif=exif, **options), name)
        np.testing.assert_array_equal(array, upright)
        assert notes == (f"exif_rotated: orientation {orientation}",)


def test_damaged_exif_costs_nothing():
    data = encoded(RGB, "JPEG")
    exif = b"Exif\0\0MM\0*" + b"\xff" * 20
    array, notes = decode_image(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:], "a.jpg")
    np.testing.assert_array_equal(array, decode_image(data, "a.jpg")[0])
    assert notes in ((), ("exif_unreadable",))


def test_colours():
    white = np.full((6, 10, 3), 255, np.uint8)
    alpha = np.zeros((6, 10), np.uint8)
    alpha[:3] = 255
    wanted = np.where(alpha[..., None] > 0, PIXELS, white)
    rgba = Image.fromarray(np.concatenate([PIXELS, alpha[..., None]], -1))
    for kind, name, options in (("PNG", "a.png", {}), ("TIFF", "a.tif", {}), ("WEBP", "a.webp", {"lossless": True})):
        array, notes = decode_image(encoded(rgba, kind, **options), name)
        np.testing.assert_array_equal(array, wanted)
        assert notes == ("alpha_on_white",)
    array, notes = decode_image(encoded(RGB.convert("RGBA"), "PNG"), "a.png")
    assert (array == PIXELS).all() and notes == ()
    # Palette with one transparent entry, and with an alpha for each.
    stripes = Image.fromarray((np.arange(60).reshape(6, 10) % 3).astype(np.uint8), "P")
    stripes.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for transparency in (1, bytes([255, 0, 255])):
        array, notes = decode_image(encoded(stripes, "PNG", transparency=transparency), "a.png")
        assert notes == ("palette", "alpha_on_white")
        assert array[0, :4].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90], [10, 20, 30]]
    # A transparent colour without a palette.
    array, notes = decode_image(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), "a.png")
    assert (array == 255).all() and notes == ("alpha_on_white",)
    array, notes = decode_image(encoded(RGB.convert("CMYK"), "TIFF"), "a.tif")
    assert np.abs(array.astype(int) - PIXELS).max() <= 1 and notes == ("cmyk",)
    array, notes = decode_image(encoded(RGB.convert("CMYK"), "JPEG", quality=95), "a.jpg")
    assert np.abs(array.astype(int) - PIXELS).mean() < 30 and notes == ("cmyk",)
    assert reason(encoded(RGB.convert("LAB"), "TIFF"), "a.tif") == "unsupported_mode"


def test_depths():
    grey = np.repeat(GREY[..., None], 3, -1)
    array, notes = decode_image(encoded(Image.fromarray(GREY), "PNG"), "a.png")
    assert (array == grey).all() and notes == ("grey",)
    wide = GREY.astype(np.uint16) * 257
    for kind, name in (("PNG", "a.png"), ("TIFF", "a.tif")):
        array, notes = decode_image(encoded(Image.fromarray(wide), kind), name)
        assert (array == grey).all() and notes == ("grey", "16_bit")
    array, notes = decode_image(encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), "a.tif")
    assert (array == grey).all() and notes == ("grey", "float")
    assert reason(encoded(Image.fromarray(wide.astype(np.int32) * 9), "TIFF"), "a.tif") == "unsupported_mode"
    assert reason(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "a.tif") == "unsupported_mode"
    # Labels keep their numbers.
    np.testing.assert_array_equal(decode_label(encoded(Image.fromarray(wide), "PNG"), "a.png"), wide)
    indices = Image.fromarray(GREY % 4, "P")
    indices.putpalette(list(range(12)))
    np.testing.assert_array_equal(decode_label(encoded(indices, "PNG"), "a.png"), GREY % 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(kind):
    name = next(suffix for suffix, format in SUFFIXES.items() if format == kind)
    second = Image.fromarray(255 - PIXELS)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(RGB, kind, save_all=True, append_images=[second], **options)
    array, notes = decode_image(data, f"a{name}")
    assert notes[0] == "first_frame"
    np.testing.assert_array_equal(array, decode_image(encoded(RGB, kind, **options), f"a{name}")[0])


def test_nothing_is_left_behind_in_the_process():
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason(png(9_990, 10_000))  # Pillow warns of this size
    assert before == (list(warnings.filters), Image.MAX_IMAGE_PIXELS)


SEEDS = [
    encoded(RGB, "JPEG"),
    encoded(RGB.convert("CMYK"), "JPEG", progressive=True),
    encoded(RGB, "PNG"),
    encoded(RGB.convert("P"), "PNG", transparency=b"\0\x7f"),
    encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]),
    encoded(RGB, "WEBP"),
    encoded(RGB.convert("RGBA"), "WEBP", lossless=True),
    encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]),
    encoded(RGB, "TIFF"),
    encoded(RGB, "TIFF", compression="tiff_lzw"),
    encoded(RGB, "TIFF", compression="jpeg"),
    encoded(RGB, "BMP"),
    encoded(RGB, "JPEG2000"),
    encoded(RGB, "AVIF"),
]


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    head=st.booleans(),
)
def test_damaged_files_decode_or_are_unusable(seed, cut, flips, head):
    data = bytearray(seed if cut is None else seed[: int(cut * len(seed))])
    for place, value in flips:
        if data:
            data[int(place * min(len(data), 64 if head else len(data)))] = value
    try:
        array, notes = decode_image(bytes(data), "a.jpg", max_pixels=1_000_000)
    except Unusable as error:
        assert error.reason and error.sentence.startswith("a.jpg: ")
    else:
        assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and 0 < array.size <= 3_000_000
        assert all(isinstance(note, str) for note in notes)
