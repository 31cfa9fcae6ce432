"""Where the reference's arrays are, for the tests that compare with them."""

from __future__ import annotations

import os
import pathlib

import pytest

# A folder beside the checkout, or named by FM4M_FIXTURES; the repository does not carry it.
_CANDIDATES = [os.environ.get("FM4M_FIXTURES"), pathlib.Path(__file__).resolve().parents[2] / "shared" / "fixtures"]
FIXTURES = next((pathlib.Path(p) for p in _CANDIDATES if p and pathlib.Path(p).is_dir()), None)

needs_fixtures = pytest.mark.skipif(
    FIXTURES is None, reason="the reference's arrays are absent (shared/fixtures beside the checkout, or FM4M_FIXTURES)"
)
