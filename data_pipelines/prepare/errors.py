"""How the preparation says that one sample, or one field of a sample, cannot be used."""

from __future__ import annotations

import os
from typing import NamedTuple


class Unusable(ValueError):
    """One sample, or one field of it, cannot be used; all others can.

    Attributes:
      reason: short machine word to count by. Of images: ``zero_bytes``, ``zero_size``, ``too_large``, ``truncated``,
        ``corrupt``, ``not_an_image``, ``unsupported_format``, ``unsupported_mode``. Of captions: ``caption_encoding``,
        ``caption_empty``, ``caption_shape``, ``caption_missing``. Of other fields: ``array``, ``json``,
        ``detections``, ``unsupported_member``, ``field_missing``. Of files: ``unreadable``, ``truncated``, ``corrupt``.
      sentence: what is wrong and, where something helps, what helps; names the file.
    """

    def __init__(self, reason: str, sentence: str):
        super().__init__(reason, sentence)  # both as args, so that the exception survives being sent to a process
        self.reason, self.sentence = reason, sentence

    def __str__(self) -> str:
        return self.sentence


class Problem(NamedTuple):
    """Something found while listing a source. ``key`` names what takes no part: a sample, a file, or a row of a table.

    Reasons: ``not_an_image``, ``hidden``, ``orphan`` (a caption without a picture), ``csv_row``, ``symlink_loop``,
    ``dangling_link``, ``duplicate_folder``, ``duplicate_key``, ``not_a_file``, ``unreadable``, ``missing_file``,
    ``compressed_tar``, ``truncated``, ``corrupt``, ``field_missing``, ``caption_missing``, ``caption_encoding``.
    """

    key: str
    reason: str
    sentence: str


def printable(path: str | os.PathLike | bytes) -> str:
    r"""A path as text that every encoding can hold: bytes that are not UTF-8 become ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
