"""Numbers of a set that show what pictures of a few samples do not, and what in them deserves a warning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fm4m.modalities import Modality

# Where a number becomes a warning.
LEAST_VOCABULARY_USE = 0.10
MOST_DUPLICATES = 0.01
MOST_FULL_TEXTS = 0.01
LEAST_FILL = 0.60


class ModalityCounts:
    """Counts the records of one modality.

    Attributes:
      modality: which.
      lengths: tokens of every sample that has the modality.
      seen: samples, with the modality or without.
    """

    def __init__(self, modality: Modality):
        self.modality, self.lengths, self.seen = modality, [], 0
        self._records: set[bytes] = set()
        self._codes = np.zeros(modality.vocab_size, np.int64) if modality.discrete else None

    def add(self, array: np.ndarray) -> bytes:
        """Counts a sample's array (no rows: missing). Returns its hash."""
        m = self.modality
        self.seen += 1
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
        if len(array):
            self.lengths.append(m.max_tokens if m.kind == "pixels" else len(array))
            self._records.add(digest)
            if self._codes is not None:
                np.add.at(self._codes, array, 1)
        return digest

    def summary(self) -> dict:
        """JSON-able numbers: shares in 0..1, perplexity exp(entropy) of the codes; None what a modality cannot have."""
        m, has = self.modality, len(self.lengths)
        out = {
            "kind": m.kind,
            "samples": has,
            "tokens_mean": float(np.mean(self.lengths)) if has else 0.0,
            "tokens_p95": float(np.percentile(self.lengths, 95)) if has else 0.0,
            "tokens_max": int(max(self.lengths, default=0)),
            "max_tokens": m.max_tokens,
            "full": sum(n == m.max_tokens for n in self.lengths) / has if has else 0.0,
            "different_records": len(self._records),
            "duplicates": (has - len(self._records)) / has if has else 0.0,
            "vocab_size": m.vocab_size or None,
            "codes_seen": None,
            "vocabulary_use": None,
            "perplexity": None,
        }
        if self._codes is not None and has:
            p = self._codes[self._codes > 0] / self._codes.sum()
            out |= {
                "codes_seen": int(self._codes.sum()),
                "vocabulary_use": len(p) / m.vocab_size,
                "perplexity": float(np.exp(-(p * np.log(p)).sum())),
            }
        return out


def count_samples(
    modalities: Iterable[Modality], samples: Iterable[Mapping[str, np.ndarray]], progress: Callable = lambda n: None
) -> dict:
    """Counts samples.

    Args:
      modalities: what to count.
      samples: arrays by modality; one that is not there is missing.
      progress: called with 1 after every sample.

    Returns:
      ``{"counted", "duplicate_samples", "modalities": {name: ModalityCounts.summary()}}``; ``duplicate_samples`` is the
      share of samples that equal an earlier one in all modalities.
    """
    counts = [ModalityCounts(m) for m in modalities]
    whole, number = set(), 0
    for sample in samples:
        nothing = np.zeros(0, np.uint8)
        whole.add(b"".join(c.add(sample.get(c.modality.name, nothing)) for c in counts))
        number += 1
        progress(1)
    return {
        "counted": number,
        "duplicate_samples": (number - len(whole)) / number if number else 0.0,
        "modalities": {c.modality.name: c.summary() for c in counts},
    }


def warnings(statistics: Mapping) -> list[str]:
    """What is suspicious in the statistics (of `count_samples`, with ``"masks"`` of `masks.count_masks` if there are
    any), in plain words; empty if nothing is."""
    out = []
    for name, s in statistics["modalities"].items():
        out += [f"{name}: {what}" for what in _of_modality(s, statistics["counted"])]
    if (share := statistics["duplicate_samples"]) > MOST_DUPLICATES:
        share = _percent(share)
        out.append(f"{share} of the samples equal an earlier one in every modality: is a source listed twice?")
    for side, budget in ((statistics.get("masks") or {}).get("budgets") or {}).items():
        if budget["fill_mean"] < LEAST_FILL:
            out.append(
                f"{side}: only {_percent(budget['fill_mean'])} of the {budget['width']} slots are filled on average, "
                "the rest is computed for nothing: choose a smaller budget, larger concentrations, or refill=True"
            )
    return out


def _of_modality(s: Mapping, counted: int) -> list[str]:
    if not s["samples"]:
        return [f"missing in every one of the {counted} samples looked at"]
    out, text = [], s["kind"] == "sequence"
    if s["samples"] > 1 and s["different_records"] == 1:
        what = "texts" if text else "records"
        out.append(f"all {s['samples']} {what} are equal: there is nothing to learn from them")
    elif s["duplicates"] > MOST_DUPLICATES:
        usual = " (usual if several crops of a picture share a text, or a text is often empty)" if text else ""
        out.append(f"{_percent(s['duplicates'])} of the records are exact duplicates of another one{usual}")
    # With fewer tokens than codes, low use says nothing; and no text uses a tenth of a vocabulary of words.
    enough = s["kind"] == "tokens" and s["codes_seen"] >= s["vocab_size"]
    if enough and s["vocabulary_use"] < LEAST_VOCABULARY_USE:
        out.append(
            f"only {_percent(s['vocabulary_use'])} of the {s['vocab_size']} codes are ever used: the tokenizer does "
            "not fit these pictures, or its codebook has collapsed"
        )
    if text and s["full"] > MOST_FULL_TEXTS:
        out.append(
            f"{_percent(s['full'])} of the texts have max_tokens = {s['max_tokens']} tokens: longer ones, if there "
            "were any, are cut"
        )
    return out


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def table(statistics: Mapping) -> str:
    """The statistics as lines of text."""
    masks = statistics.get("masks") or {}
    head = ["modality", "kind", "has it", "tokens mean", "p95", "max", "of", "codes used", "perplexity", "duplicates"]
    head += ["of inputs", "of targets"] if masks else []
    lines = [head]
    for name, s in statistics["modalities"].items():
        share = s["samples"] / max(statistics["counted"], 1)
        coded = s["vocabulary_use"] is not None
        line = [name, s["kind"], f"{100 * share:.1f} %", f"{s['tokens_mean']:.1f}", f"{s['tokens_p95']:.0f}"]
        line += [str(s["tokens_max"]), str(s["max_tokens"])]
        line += [f"{100 * s['vocabulary_use']:.1f} % of {s['vocab_size']}" if coded else "-"]
        line += [f"{s['perplexity']:.1f}" if coded else "-", f"{100 * s['duplicates']:.2f} %"]
        if masks:
            line += [f"{100 * masks['shares'][side].get(name, 0.0):.1f} %" for side in ("inputs", "targets")]
        lines.append(line)
    text = _aligned(lines)
    for side, budget in masks.get("budgets", {}).items():
        text += (
            f"\n{side}: {100 * budget['fill_mean']:.1f} % of {budget['width']} slots filled on average, "
            f"{100 * budget['fill_p5']:.1f} % in the emptiest 5 % (over {masks['samples']} samples)"
        )
    return text


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda i, cell, width: cell.ljust(width) if i < 2 else cell.rjust(width)  # noqa: E731
    return "\n".join(
        "  ".join(pad(i, cell, width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines
    )
