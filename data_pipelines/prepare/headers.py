"""What the bytes of a picture file say before anything is decoded: its format, its size, whether its end is there."""

from __future__ import annotations

SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "JPEG",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".jp2": "JPEG2000",
    ".jpx": "JPEG2000",
    ".j2k": "JPEG2000",
    ".avif": "AVIF",
}
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}
# Photoshop, PostScript, icons, SVG, DDS, OpenEXR, PDF, PCX, QOI, Radiance.
_OTHERS = (
    b"8BPS",
    b"%!PS",
    b"\0\0\1\0",
    b"<svg",
    b"DDS ",
    b"v/1\x01",
    b"%PDF",
    b"\x0a\x05\x01",
    b"qoif",
    b"#?RADIANCE",
)


def sniff(head: bytes) -> str:
    """Format that the first 16 bytes of a file announce ("JPEG", "PNG", ...), or "" if it is none that is read."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    return "PPM" if len(head) > 2 and head[0] == ord("P") and head[1] in b"123456" and head[2] in b" \t\r\n" else ""


def other_format(data: bytes) -> bool:
    """Whether the bytes begin as a picture format that is not read."""
    heif = data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc")
    return heif or data.startswith(_OTHERS) or (data[:5] == b"<?xml" and b"<svg" in data[:1000])


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by the header of a PNG, GIF, WebP or JPEG file; None where it is not found."""
    found = sniff(data[:16])
    if found == "PNG" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if found == "GIF" and len(data) >= 10:
        return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    if found == "WEBP" and len(data) >= 30:
        return _webp_size(data[12:16], data[20:30])
    return _jpeg_size(data) if found == "JPEG" else None


def _webp_size(chunk: bytes, body: bytes) -> tuple[int, int] | None:
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def cut_off(data: bytes) -> bool:
    """Whether a PNG, GIF, WebP or JPEG file lacks its end."""
    found = sniff(data[:16])
    if found == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    ends = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
    if found in ends:
        return ends[found] not in data[-4096:]
    return found == "GIF" and not data.rstrip(b"\0").endswith(b";")
