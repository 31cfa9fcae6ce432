"""The set's own text tokenizer, trained from its captions where the configuration names none."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.prepare.errors import Unusable
from data_pipelines.prepare.sources import Source
from fm4m.config_file import ConfigError
from fm4m.files import complete_file
from fm4m.tokenizers.text import TextTokenizer, train_wordpiece

FILE, ORIGIN = "text.json", "text.made_from.json"
# Words of 4M's structured texts, kept whole.
STRUCTURE_WORDS = ("point", "polygon", "none", "human", "pose", "shape", "camera", "global")
_STEP = 128  # a multiple of it wastes no row of the embedding table


def tokenizer_file(
    out: pathlib.Path, options: Mapping[str, Any], source: Source, say: Callable[[str], None]
) -> pathlib.Path:
    """The trained tokenizer of a set, made if it is not there.

    Args:
      out: the set's folder.
      options: ``vocab_size``, the most ids; ``samples``, the most samples whose captions are read.
      source: where the captions come from.
      say: gets a sentence on what was done.

    Raises:
      ConfigError: it is there, made with other options; or there is not one caption.
    """
    path, origin = out / FILE, {"vocab_size": options["vocab_size"], "samples": options["samples"]}
    if path.is_file() and (out / ORIGIN).is_file():
        was = json.loads((out / ORIGIN).read_text())
        for key, value in origin.items():
            if was.get(key) != value:
                raise ConfigError(
                    f"text.{key} = {value}: {path} was trained with {was.get(key)}, and the set's texts are written "
                    f"with it; set it back, name another tokenizer in text.tokenizer, or choose another --out"
                )
        return path
    found = captions(source, options["samples"])
    if not found:
        raise ConfigError(
            f"text.tokenizer is not set and none of the {len(source.keys)} samples has a caption to train one from: "
            "name a tokenizer, such as data_pipelines/rooms/tokenizers/text.json"
        )
    tokenizer = train(found, options["vocab_size"])
    tokenizer.save(path)
    with complete_file(out / ORIGIN) as beside:
        beside.write_text(json.dumps(origin) + "\n")
    say(f"trained {path} with {tokenizer.vocab_size} ids from {len(found)} captions")
    return path


def captions(source: Source, most: int) -> list[str]:
    """The captions of at most ``most`` samples, spread evenly over the source; samples without are passed over."""
    total = len(source.keys)
    chosen = [total * i // min(most, total) for i in range(min(most, total))]

    def read(index: int) -> list[str]:
        try:
            found = source.read(index).fields.get("caption", [])
        except Unusable:
            return []
        except Exception:
            # Such a sample is quarantined with its reason when its part is made.
            return []
        return [found] if isinstance(found, str) else [text for text in found if isinstance(text, str)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return [text for texts in pool.map(read, chosen) for text in texts]


def train(found: list[str], vocab_size: int) -> TextTokenizer:
    """A tokenizer of ``vocab_size`` ids, or of as many as the captions can fill (a multiple of 128 if there is one).

    Raises:
      ConfigError: ``vocab_size`` does not hold the fixed tokens.
    """
    try:
        return train_wordpiece(found, vocab_size, STRUCTURE_WORDS)
    except ValueError as error:
        if "too small" in str(error):
            raise ConfigError(f"text.vocab_size: {error}") from None
    # Only few different captions fail to fill a vocabulary, so that looking for the largest one is quick.
    few = list(dict.fromkeys(found))
    low, high, best = 0, vocab_size, None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            best, low = train_wordpiece(few, middle, STRUCTURE_WORDS), middle
        except ValueError as error:
            low, high = (middle, high) if "too small" in str(error) else (low, middle)
    with contextlib.suppress(ValueError):  # fewer than the fixed tokens
        best = train_wordpiece(few, best.vocab_size // _STEP * _STEP, STRUCTURE_WORDS)
    return best
