"""Batches through the generator."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from fm4m.generate.generator import Target
from fm4m.generate.inputs import make_canvas
from fm4m.generate.session import Session
from fm4m.modalities import EOS_ID

# A sequence counts as this many steps of a grid in the progress bar.
SEQUENCE_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated for N samples: ids int32 [N, max_tokens] and which of them exist, by modality."""

    session: Session
    ids: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]

    def arrays(self, name: str) -> np.ndarray:
        """A grid in its tokenizer's stored form."""
        return self.session.showers[name].tokenizer.decode(self.ids[name])

    def texts(self, name: str) -> list[str]:
        """A sequence as texts without control tokens."""
        tokenizer = self.session.showers[name].tokenizer
        return [tokenizer.decode(_complete(row[s])) for row, s in zip(self.ids[name], self.seen[name], strict=True)]


def _complete(ids: np.ndarray) -> list[int]:
    out = ids.tolist()
    return out[: out.index(EOS_ID)] if EOS_ID in out else out


class Runner:
    """Generates for any number of samples, a batch at a time, and shows how far it is.

    Args:
      session: the model.
      batch: samples at a time; the last batch is filled up, so that every program is compiled once.
      seed: of everything drawn.
      work: what there is to do in all: `steps` of every call, for the time that is left.
    """

    def __init__(self, session: Session, batch: int, seed: int, work: int):
        from tqdm import tqdm

        self.session, self.batch, self.seed = session, batch, seed
        self.bar = tqdm(total=work, disable=None, unit="step", dynamic_ncols=True)
        self.seconds: dict[str, float] = {}
        self._work, self._done, self._start = work, 0, time.perf_counter()

    def __call__(self, what: str, inputs: Mapping[str, Sequence], plans: Sequence[Target]) -> Generated:
        """Targets from inputs (as `fm4m.generate.inputs.make_canvas` takes them) of N samples; ``what`` names it."""
        start = time.perf_counter()
        size = len(next(iter(inputs.values())))
        ids, seen = ({plan.name: [] for plan in plans} for _ in range(2))
        for first in range(0, size, self.batch):
            rows = [min(first + i, size - 1) for i in range(min(self.batch, size))]
            part = {n: [v[i] for i in rows] if isinstance(v, list) else np.asarray(v)[rows] for n, v in inputs.items()}
            canvas = make_canvas(self.session.modalities, part)
            self.bar.set_description(what)
            canvas = self.session.generator(canvas, plans, seed=self.seed + 1000 * first, progress=self._tell)
            for plan in plans:
                ids[plan.name].append(np.asarray(canvas.ids[plan.name])[: size - first])
                seen[plan.name].append(np.asarray(canvas.seen[plan.name])[: size - first])
        self.seconds[what] = time.perf_counter() - start
        left = (time.perf_counter() - self._start) * (self._work / max(self._done, 1) - 1)
        # Where there is no terminal there is no bar.
        self.bar.write(f"{what}: {self.seconds[what]:.0f} s; about {left / 60:.1f} minutes left", file=sys.stderr)
        joined = ({n: np.concatenate(parts) for n, parts in side.items()} for side in (ids, seen))
        return Generated(self.session, *joined)

    def _tell(self, name: str, done: int, steps: int) -> None:
        sequence = self.session.modalities[name].kind == "sequence"
        count = SEQUENCE_STEPS * done if sequence else 1
        self._done += count
        self.bar.update(count)


def steps(session: Session, size: int, batch: int, plans: Sequence[Target]) -> int:
    """Steps of the bar that one call of a `Runner` takes."""
    each = [SEQUENCE_STEPS if session.modalities[p.name].kind == "sequence" else p.steps for p in plans]
    return -(-size // batch) * sum(each)
