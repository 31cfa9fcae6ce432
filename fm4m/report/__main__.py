"""The command: ``python -m fm4m.report RUN_DIR [RUN_DIR ...] [--out=FILE]``."""

from __future__ import annotations

import argparse
import os
import sys

from etils import epath

from fm4m import files
from fm4m.report import page, read


def main(argv: list[str] | None = None) -> int:
    """Writes the report; returns the exit code: 0, or 2 where there is nothing to report on."""
    parser = argparse.ArgumentParser(prog="python -m fm4m.report", description="A report of runs as one HTML file.")
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="folder of a run; several are compared")
    parser.add_argument("--out", help="the file; default RUN_DIR/report.html, or comparison.html for several runs")
    options = parser.parse_args(argv)
    out = options.out or (
        "comparison.html" if len(options.folders) > 1 else os.fspath(epath.Path(options.folders[0]) / "report.html")
    )
    try:
        text = page.page([read.read_run(folder) for folder in options.folders])
        files.write_whole(out, text)
    except (read.ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out} ({len(text.encode()) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
