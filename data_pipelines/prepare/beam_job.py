"""The same preparation as an Apache Beam pipeline, for jobs of many machines.

    python -m data_pipelines.prepare.beam_job --config=configs/prepare/tars.py --out=/shared/DATA --runner=... (Beam's)

Beam distributes the parts of the plan and makes a part again if its worker is lost; each part is made and put into its
place exactly as by `data_pipelines.prepare`, so that both leave the same files, and one can finish what the other
began. At the end this program, which waits for the pipeline, puts the parts into the set. Sources, tokenizers and
``--out`` must be on a file system that all workers mount.

Beam's pins clash with SeqIO's: it needs an environment of its own, ``pip install '.[beam]'``, without ``[data]``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.prepare import config as config_lib
from data_pipelines.prepare import runner
from data_pipelines.prepare.crew import limit_threads
from data_pipelines.prepare.parts import Job, Part, PartMaker
from data_pipelines.prepare.plan import Plan
from data_pipelines.prepare.report import Progress
from data_pipelines.prepare.writer import read_part
from fm4m.config_file import ConfigError

USAGE = (
    "usage: python -m data_pipelines.prepare.beam_job --config=FILE [--config.SECTION.KEY=VALUE ...] --out=DIR "
    "[Beam's pipeline options]"
)


class MakeParts(beam.DoFn):
    """A part -> its number and counts. Tokenizers are loaded once for each instance; counters: read, quarantined."""

    def __init__(self, job: Job):
        self._job = job
        self._read = Metrics.counter("prepare", "read")
        self._quarantined = Metrics.counter("prepare", "quarantined")

    def setup(self) -> None:
        limit_threads(os.environ)
        self._maker = PartMaker(self._job)

    def process(self, part: Part):
        # Beam may give a part to two workers, or again after a failure: it is the same part whoever makes it.
        found = read_part(self._job.folder(part)) or self._maker.make(part, self._count)
        yield part.number, found["counts"]

    def _count(self, samples: int, quarantined: int) -> None:
        self._read.inc(samples)
        self._quarantined.inc(quarantined)


def execute(options: PipelineOptions) -> runner.Execute:
    """How `runner.prepare` makes its parts by a pipeline with these options."""

    def run(plan: Plan, todo: list[Part], progress: Progress) -> None:
        pipeline = beam.Pipeline(options=options)
        (
            pipeline
            | "Parts" >> beam.Create(todo)
            # Without it, Beam would fuse the steps and one worker would get all parts.
            | "Spread" >> beam.Reshuffle()
            | "Make" >> beam.ParDo(MakeParts(plan.job))
        )
        result = pipeline.run()
        result.wait_until_finish()
        totals = {c.key.metric.name: c.committed for c in result.metrics().query()["counters"]}
        progress.add(totals.get("read", 0), totals.get("quarantined", 0))

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; other flags go to Beam. Returns the exit codes of `data_pipelines.prepare`."""
    try:
        command = config_lib.from_flags(sys.argv[1:] if argv is None else argv, USAGE, foreign=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limit_threads(os.environ)
    return runner.run(command.config, command.out, 1, execute(PipelineOptions(list(command.rest))))


if __name__ == "__main__":
    sys.exit(main())
