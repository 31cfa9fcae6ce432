"""The error that streams of data raise, which trainers end in one sentence."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be read, or are not what they were; the message names file and record, and what mends it."""
