"""Captions: which text of an image's captions goes with a crop. The text tokenizer does the rest, lower case too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def caption(record: str | Mapping | Sequence, row: int | np.random.Generator = 0) -> str:
    """The caption of a crop.

    Args:
      record: a text; or a list with one caption a row of the crop settings (or with alternatives of equal standing);
        a caption may be a mapping with the key "caption".
      row: of the crop settings; a generator draws one of the list instead. No matter if `record` is a single text.

    Raises:
      ValueError: an empty list, no such row, or a caption that is neither text nor such a mapping.
    """
    if not isinstance(record, str | Mapping):
        if isinstance(row, np.random.Generator):
            row = int(row.integers(len(record))) if record else 0
        if not 0 <= row < len(record):
            raise ValueError(f"no caption for row {row}: the record lists {len(record)}; one a crop is needed")
        record = record[row]
    if isinstance(record, Mapping):
        record = record.get("caption")
    if not isinstance(record, str):
        raise ValueError(f"a caption is text or a mapping with the key 'caption' to a text, got {record!r:.80}")
    return record
