"""What writing and reading token files costs of one core, by the number of modalities that are joined.

    python -m benchmarks.records [--samples=20000] [--modalities=1,3,7] [--seconds=2] [--folder=DIR]

Writes sets of made-up samples of the size of 4M's (five grids of 14 x 14 codes, a caption, boxes: 2,260 bytes for all
seven) and reads them in random order: through `data_pipelines.records.Records`, through the stream of a registered
task, and as batches from the loader. CPU time is that of all threads of the process; a host with n cores to spare does
n times the samples a second of a core. `benchmarks.input_pipeline` measures a mixture of your own, as it stands.

Measured when the format was chosen, in samples a second of a core, all from the page cache: 39,000 from one file set
and 6,600 from seven in random order; 3,700 to 4,900 batched from seven file sets; 19,000 written to seven.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipelines import manifest, records
from fm4m import modalities as modalities_lib
from fm4m.modalities import Modality

BATCH = 256
# At most this many samples between two looks at the clock.
CHUNK = 256
MODALITIES = (
    *(Modality(f"bench_{n}", "tokens", vocab_size=8192, grid=(14, 14)) for n in ("rgb", "depth", "normal", "semseg")),
    Modality("bench_clip", "tokens", vocab_size=8192, grid=(14, 14)),
    Modality("bench_caption", "sequence", vocab_size=30_000, max_tokens=256),
    Modality("bench_det", "sequence", vocab_size=30_000, max_tokens=256),
)
# Mean length of the two texts: with 980 codes of grids, 1,130 tokens a sample.
MEAN_LENGTH = {"bench_caption": 40, "bench_det": 110}


def made_up(modality: Modality, samples: int) -> list[np.ndarray]:
    """Arrays of random codes."""
    rng = np.random.default_rng(sum(modality.name.encode()))
    if modality.grid:
        return list(rng.integers(0, modality.vocab_size, (samples, modality.max_tokens), np.uint16))
    mean = MEAN_LENGTH[modality.name]
    lengths = rng.integers(mean // 2, mean // 2 + mean + 1, samples)
    return [rng.integers(204, modality.vocab_size, n, np.uint16) for n in lengths]


class Cost:
    """CPU and wall seconds of a ``with`` block."""

    def __enter__(self) -> Cost:
        self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.cpu, self.wall = time.process_time() - self._start[0], time.perf_counter() - self._start[1]


def write_set(root: pathlib.Path, chosen: Sequence[Modality], samples: int) -> Cost:
    """Writes the modalities of a set, hashes and manifest included; the samples are made before the clock starts."""
    arrays = [made_up(m, samples) for m in chosen]
    keys = [f"{i:08d}" for i in range(samples)]
    with Cost() as cost:
        for modality, of_modality in zip(chosen, arrays, strict=True):
            records.write_modality(root, "train", modality, of_modality, keys)
    return cost


def measure(step: Callable[[], int], seconds: float) -> tuple[int, Cost]:
    """Calls ``step``, which returns a number of samples, once to warm up and then for ``seconds`` of wall time."""
    step()
    done, start = 0, time.perf_counter()
    with Cost() as cost:
        while not done or time.perf_counter() - start < seconds:
            done += step()
    return done, cost


def through_records(root: pathlib.Path, chosen: Sequence[Modality], order: np.ndarray) -> Callable[[], int]:
    """A step that reads the next samples in the given order."""
    opened = [records.Records(root, "train", m) for m in chosen]
    endless = itertools.cycle(order.tolist())

    def step() -> int:
        count = min(CHUNK, len(order))
        for index in itertools.islice(endless, count):
            for of_modality in opened:
                of_modality[index]
        return count

    return step


@contextlib.contextmanager
def registered(root: pathlib.Path, chosen: Sequence[Modality]) -> Iterator[str]:
    """A mixture of one task over the set, by name; the registries are as before afterwards."""
    import seqio

    from data_pipelines import registry
    from data_pipelines.sources import TokenSource
    from fm4m.masking import Masking, MaskingComponent

    name, names = f"benchmark_records_{len(chosen)}", [modalities_lib.register(m).name for m in chosen]
    masking = Masking(256, 256, {"*": (MaskingComponent(1.0, 1.0),)})
    registry.add_task(name, TokenSource(root, splits=("train",)), names)
    try:
        registry.add_mixture(name, [(name, 1.0)], masking)
        yield name
    finally:
        for entries in (seqio.MixtureRegistry, seqio.TaskRegistry):
            if name in entries.names():
                entries.remove(name)


def through_stream(name: str) -> Callable[[], int]:
    """A step that reads the next samples of the mixture's shuffled stream, one by one."""
    from data_pipelines import registry

    stream = registry.get_mixture(name).stream("train")
    position = itertools.count()

    def step() -> int:
        for index in itertools.islice(position, CHUNK):
            stream[index]
        return CHUNK

    return step


def through_loader(name: str) -> Callable[[], int]:
    """A step that takes the next batch."""
    from data_pipelines import loader

    batches = loader.open_stream(name, "train").batches(position=0, global_batch=BATCH)
    return lambda: next(batches).size


def run(root: pathlib.Path, samples: int, counts: Sequence[int], seconds: float) -> Iterator[tuple]:
    """Yields (what, modalities, bytes of the files a sample, us of CPU a sample, samples a second of wall time)."""
    for count in counts:
        chosen, folder = MODALITIES[:count], root / str(count)
        cost = write_set(folder, chosen, samples)
        entries = manifest.read_manifest(folder, "train")["modalities"].values()
        stored = sum(f["bytes"] for entry in entries for f in entry["files"]) / samples
        yield "write", count, stored, 1e6 * cost.cpu / samples, samples / cost.wall
        orders = {"in order": np.arange(samples), "random": np.random.default_rng(0).permutation(samples)}
        for what, order in orders.items():
            done, cost = measure(through_records(folder, chosen, order), seconds)
            yield f"Records, {what}", count, stored, 1e6 * cost.cpu / done, done / cost.wall
        with registered(folder, chosen) as name:
            for what, make in (("stream, random", through_stream), (f"loader, batches of {BATCH}", through_loader)):
                done, cost = measure(make(name), seconds)
                yield what, count, stored, 1e6 * cost.cpu / done, done / cost.wall


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description="Cost of token files per core.")
    parser.add_argument("--samples", type=int, default=20_000, help="samples of a set (default: %(default)s)")
    parser.add_argument("--modalities", default="1,3,7", help="how many are joined, with commas (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one reading (default: %(default)s)")
    parser.add_argument("--folder", help="where to write, for another disk than that of temporary files")
    args = parser.parse_args(argv)
    counts = [int(n) if n.strip().isdigit() else 0 for n in args.modalities.split(",")]
    if args.samples < 1 or not all(1 <= n <= len(MODALITIES) for n in counts):
        parser.error(f"--samples must be at least 1, --modalities numbers in 1..{len(MODALITIES)}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    heads = ("modalities", 10), ("bytes/sample", 13), ("us CPU/sample", 14), ("samples/s/core", 15), ("samples/s", 10)
    print(" " * 26, *(head.rjust(width) for head, width in heads))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in run(pathlib.Path(folder), args.samples, counts, args.seconds):
            what, count, stored, micros, rate = row
            core = 1e6 / max(micros, 1e-9)
            print(f"{what:26} {count:10d} {stored:13,.0f} {micros:14.1f} {core:15,.0f} {rate:10,.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
