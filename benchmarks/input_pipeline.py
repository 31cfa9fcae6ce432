"""Samples a second that one process reads, decodes and batches: what the host of an accelerator has to keep up with.

    python -m benchmarks.input_pipeline --config=configs/demo.py [--seconds=10] [--batch=256]

Needs the [data] extra and the mixture's files. The step consumes global_batch / (hosts x step time) samples a second of
every host.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import jax

from fm4m import config as config_lib
from fm4m import configured


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input_pipeline", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to read")
    parser.add_argument("--batch", type=int, default=256, help="samples of a batch")
    args, rest = parser.parse_known_args(argv)
    try:
        config = config_lib.from_flags(rest, "usage: python -m benchmarks.input_pipeline --config=configs/NAME.py")
        stream, _ = configured.streams(config)
    except config_lib.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    batches = stream.batches(position=0, global_batch=args.batch)
    size = sum(x.nbytes for x in jax.tree.leaves(next(batches))) / args.batch
    samples, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        next(batches)
        samples += args.batch
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{config.data.mixture}: {samples / wall:.0f} samples/s with {len(os.sched_getaffinity(0))} cores to use, "
        f"{samples / cpu:.0f} samples a second of CPU time, {size:.0f} bytes a sample"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
