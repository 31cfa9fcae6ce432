"""Finds the largest passes and the cheapest rematerialisation that fit a chip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fm4m.aot import compiler, roofline
from fm4m.aot.chips import GIB
from fm4m.aot.topology import Topology
from fm4m.layers import REMAT_POLICIES

# Compiles and analyses one choice: flags -> numbers.
Trial = Callable[[Sequence[str]], dict[str, Any]]


def search(
    arguments: Sequence[str], topology: Topology, say: Callable[[str], None], trial: Trial | None = None
) -> list[str] | None:
    """Tries choices of remat, passes and grouped layers, each compiled up to code generation (about ten seconds each).

    Policies are tried from the one that keeps most to the one that keeps nothing; a policy that recomputes more is of
    use only if it allows fewer passes. Of what fits, the one with the shortest roofline (every operation at the roof of
    its FLOPs or its bytes, and collectives that nothing hides) is chosen. With it, layers unrolled, grouped and scanned
    are compared.

    Args:
      arguments: the configuration's flags.
      topology: what to compile for.
      say: takes lines of the table as they come.
      trial: how a choice is compiled; for tests.

    Returns:
      The flags to add to the configuration, or None if nothing fits.

    Raises ConfigError for a configuration that cannot run, CompilerError if the compiler failed at every choice.
    """
    trial = trial or (lambda flags: roofline.analyse(compiler.compile_step(flags, topology, fast=True), topology))
    search = _Search(arguments, trial, say)
    fewest: int | None = None
    for remat in REMAT_POLICIES:
        fewest = search.passes(remat, fewest) or fewest
        if fewest == 1:
            break
    best = search.best()
    if best is None:
        if search.failures:
            raise search.failures[0]
        return None
    search.groups(best)
    return search.best()["flags"]


class _Search:
    def __init__(self, arguments: Sequence[str], trial: Trial, say: Callable[[str], None]):
        self.arguments, self.trial, self.say = arguments, trial, say
        self.tried: list[dict[str, Any]] = []
        self.failures: list[compiler.CompilerError] = []

    def best(self) -> dict[str, Any] | None:
        fitting = [row for row in self.tried if row["numbers"]["memory"]["fits"]]
        return min(fitting, key=lambda row: row["numbers"]["roofline"]["floor_seconds"], default=None)

    def attempt(self, **choice: Any) -> dict[str, Any] | None:
        """Compiles one choice, adds it to the table, and returns its numbers; None if the compiler failed."""
        names = {"remat": "model.remat", "accumulation": "train.accumulation", "group": "model.scan_group"}
        flags = [f"--config.{names[key]}={value}" for key, value in choice.items()]
        try:
            numbers = self.trial([*self.arguments, *flags])
        except compiler.CompilerError as error:
            self.failures.append(error)
            self.say(f"{' '.join(flags)}: {error}")
            return None
        self.tried.append({"flags": flags, "choice": choice, "numbers": numbers})
        self.say(line(numbers))
        return numbers

    def passes(self, remat: str, fewer_than: int | None) -> int | None:
        """The fewest passes with which a policy fits, of those below ``fewer_than``."""
        tried, least = 0, 1.0
        while True:
            # How many rows a device has is known after the first attempt of all.
            rows = self.rows() if self.tried else 1
            choices = [a for a in range(1, rows + 1) if rows % a == 0 and a > tried and a >= least]
            choices = [a for a in choices if fewer_than is None or a < fewer_than]
            if not choices:
                return None
            tried = choices[0]
            numbers = self.attempt(remat=remat, accumulation=tried)
            if numbers is None:
                return None
            memory = numbers["memory"]
            if memory["fits"]:
                return tried
            activations = memory["activations and temporaries"]
            room = memory["limit"] - (memory["peak"] - activations)
            if room <= 0:
                return None
            # Activations are about proportional to the rows of a pass; a tenth is left to chance.
            least = 0.9 * tried * activations / room

    def rows(self) -> int:
        """Rows a device has in a step."""
        numbers = self.tried[0]["numbers"]
        return numbers["rows_per_pass"] * numbers["accumulation"]

    def groups(self, best: dict[str, Any]) -> None:
        model = best["numbers"]["model"]
        depths = model["encoder_depth"], model["decoder_depth"]
        middle = max((g for g in (2, 3, 4) if all(d % g == 0 and d > g for d in depths)), default=None)
        for group in (0, middle, 1):
            if group is not None and group != model["scan_group"]:
                self.attempt(**best["choice"], group=group)


HEADER = ("remat", "layers", "passes", "rows/pass", "HBM GiB", "of", "roofline ms")


def line(numbers: dict[str, Any] | None) -> str:
    """One line of the table of choices; None: its header."""
    widths = (12, 12, 6, 9, 8, 6, 12)
    if numbers is None:
        cells = HEADER
    else:
        model, memory, roof = numbers["model"], numbers["memory"], numbers["roofline"]
        group = model["scan_group"]
        time = f"{roof['floor_seconds'] * 1e3:.1f}" if memory["fits"] else "does not fit"
        cells = (model["remat"], {0: "unrolled", 1: "scanned"}.get(group, f"groups of {group}"),
                 str(numbers["accumulation"]), str(numbers["rows_per_pass"]), f"{memory['peak'] / GIB:.2f}",
                 f"{memory['limit'] / GIB:.2f}", time)  # fmt: skip
    return "  ".join(c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(cells, widths)))
