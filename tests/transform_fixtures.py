"""The strings and pictures that the reference implementation's transforms wrote, and texts that a model may write."""

from __future__ import annotations

import functools
import json

import numpy as np
from fixtures import FIXTURES
from hypothesis import settings
from hypothesis import strategies as st


@functools.cache
def strings() -> dict:
    """The reference's strings with their inputs."""
    return json.loads((FIXTURES / "transforms" / "transforms_exact.json").read_text())


@functools.cache
def pictures() -> dict[str, np.ndarray]:
    """The reference's pictures with their inputs."""
    with np.load(FIXTURES / "transforms" / "transforms_images.npz", allow_pickle=False) as arrays:
        return dict(arrays)


quick = settings(derandomize=True, max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)

_words = st.one_of(
    st.builds("v{}={}".format, st.integers(0, 4), st.integers(0, 1010)),
    st.sampled_from(["human", "pose", "global", "camera", "shape", "none", "point", "polygon", "dog"]),
    st.sampled_from(["[EOS]", "[S_3]", "[PAD]", "v1=", "=", "v0=-1", "v0=07", "v0=1.5", "v0=٣"]),
    st.text(max_size=4),
)
# Mostly words of the vocabularies in a wrong order, and some that no vocabulary has.
garbage = st.lists(_words, max_size=30).map(" ".join)
