"""Compiles the train step of a configuration for TPU topologies, without a TPU.

    python -m fm4m.aot --config=configs/4m_l.py --topology=v4-128 [--config.a.b=VALUE ...]

The compiler is the real one (libtpu: ``pip install '.[aot]'``) and the step is the trainer's. Printed are the
memory of a chip by kind, the collectives, a roofline, and a predicted time with what follows from it: MFU, tokens a
second, days. A full compilation takes one to ten minutes on two cores, by the model's size; ``--fast`` ten seconds
to a minute.

Exit codes: 0; 1 if a step does not fit its chips; 2 for a configuration or topology that cannot be; 3 if the compiler
failed in another way.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from fm4m import config as config_lib
from fm4m.aot import compiler, kernel_cost, report, roofline, topology
from fm4m.config_file import ConfigError
from fm4m.files import complete_file

USAGE = "usage: python -m fm4m.aot --config=configs/NAME.py --topology=v4-128 [--config.SECTION.KEY=VALUE ...]"

DOES_NOT_FIT, FAILED, COMPILER_FAILED = 1, 2, 3


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code, the largest of all topologies'."""
    options, arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        topologies = [topology.parse(name, options.slices) for name in options.topology.split(",")]
        topology.require_libtpu()
        config_lib.from_flags(arguments, USAGE)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    results, code = [], 0
    for where in topologies:
        try:
            numbers = run(options, arguments, where)
        except (ConfigError, compiler.CompilerError) as error:
            print(f"error: {where.name}: {error}", file=sys.stderr)
            code = max(code, FAILED if isinstance(error, ConfigError) else COMPILER_FAILED)
            continue
        results.append(numbers)
        if not numbers["memory"]["fits"]:
            print(f"error: {report.does_not_fit(numbers)}", file=sys.stderr)
            code = max(code, DOES_NOT_FIT)
    if len(results) > 1:
        print(f"\n{report.comparison(results)}")
    if results:
        print(f"\n{report.DISCLAIMER}")
    if options.json:
        with complete_file(options.json) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
    return code


def run(options: argparse.Namespace, arguments: list[str], where: topology.Topology) -> dict[str, Any]:
    """Compiles for one topology and prints the report; returns its numbers."""
    if options.search:
        from fm4m.aot import search

        print(f"{where.describe()}: what fits\n{search.line(None)}", flush=True)
        found = search.search(arguments, where, lambda text: print(text, flush=True))
        if found is not None:
            print(f"use {' '.join(found)}\n", flush=True)
            arguments = arguments + found
    keep = str(pathlib.Path(options.keep) / where.name) if options.keep else ""
    compiled = compiler.compile_step(arguments, where, fast=options.fast, keep=keep)
    # Compiling the kernels once more takes longer than all of --fast.
    attention = None if options.fast else kernel_cost.attention_seconds
    numbers = roofline.analyse(compiled, where, attention)
    print(report.full(numbers), flush=True)
    if options.heaviest and numbers["schedule"]:
        print(f"\n{report.heaviest(numbers, options.heaviest)}")
    return numbers


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own flags, and those of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m fm4m.aot",
        description="Compiles the train step of a configuration for TPU topologies, without a TPU.",
        epilog="Flags --config=FILE and --config.SECTION.KEY=VALUE are the trainer's.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", required=True, help="slice types, such as v4-128 or v4-128,v5e-256")
    parser.add_argument("--slices", type=int, default=1, help="slices, joined by the data-center network")
    parser.add_argument("--search", action="store_true", help="find passes, remat and grouping of layers that fit")
    parser.add_argument("--fast", action="store_true", help="stop before code generation: memory and collectives only")
    parser.add_argument("--json", default="", help="write all numbers to this file")
    parser.add_argument("--heaviest", type=int, default=0, help="also list so many of the costliest instructions")
    parser.add_argument("--keep", default="", help="keep the optimized module and memory report in this folder")
    options, rest = parser.parse_known_args(argv)
    if options.slices < 1:
        parser.error("--slices must be at least 1")
    return options, rest


if __name__ == "__main__":
    sys.exit(main())
