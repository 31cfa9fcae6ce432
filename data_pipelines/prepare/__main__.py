"""Prepares token files from pictures and captions.

python -m data_pipelines.prepare --config=configs/prepare/folder.py --config.source.path=PHOTOS --out=DATA
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_pipelines.prepare import config as config_lib
from data_pipelines.prepare import runner
from fm4m.config_file import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 (parts are missing, run it again) or 2 (the configuration cannot be used)."""
    try:
        command = config_lib.from_flags(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return runner.run(command.config, command.out, command.processes)


if __name__ == "__main__":
    sys.exit(main())
