"""Measures what a model trained on rooms generates, on held-out rooms, and draws contact sheets.

    python -m data_pipelines.rooms.evaluate --model=runs/rooms_long --out=evaluation
    python -m data_pipelines.rooms.evaluate --model=runs/demo --out=quick --samples=8 --train-samples=64

Prints two tables (everything from RGB, everything from a caption) and writes them with their settings to results.json,
and from_rgb.png, from_caption.png and edits.png. Every number stands beside the tokenizer's ceiling (the truth, encoded
and decoded) and the best constant guess (estimated from training rooms), all against the exact truth in the pack.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence

from data_pipelines.rooms.evaluate import settings
from data_pipelines.rooms.pack import SHIPPED
from fm4m.generate import command

ROOMS_IN_SHEETS = 4
_SET = "EXPERIMENT.TARGET.KEY=VALUE"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 with one sentence on standard error."""
    options = parse(argv)
    return command.exit_code(lambda: run(options))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser("data_pipelines.rooms.evaluate", "Measures generation on held-out rooms.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for results.json and the sheets")
    parser.add_argument("--data", type=pathlib.Path, default=SHIPPED,
                        help="folder with rooms_val.zip, to be measured on, and rooms_train.zip "
                        "(default: shipped)")  # fmt: skip
    parser.add_argument("--split", choices=("val", "train"), default="val",
                        help="which of them is measured on; choose settings on other rooms than those that you "
                        "report")  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, help="held-out samples (default: %(default)s)")
    parser.add_argument("--train-samples", type=int, default=512,
                        help="training samples for constant guesses and real pictures "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=32, help="samples at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    command.add_pairs(parser, "--set", _SET, "change how a target is generated, such as caption.rgb.guidance=2; "
                      f"experiments: {', '.join(settings.TARGETS)}")  # fmt: skip
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Loads, generates, measures, prints and writes."""
    asked = command.pairs(options.set, "--set", _SET)
    settings.check(asked)
    for name in ("samples", "train_samples", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")

    from data_pipelines.rooms.evaluate import files, from_caption, from_rgb, sheets, table, truth
    from data_pipelines.rooms.evaluate import run as run_lib

    start = time.perf_counter()
    rooms = truth.load_rooms(options.data / f"rooms_{options.split}.zip", options.samples)
    train = truth.load_rooms(options.data / "rooms_train.zip", options.train_samples)
    extract = from_caption.lite0()
    session = command.open_session(options)
    settings.check_model(session)
    plans = {name: settings.plans(session.modalities, name, asked) for name in settings.TARGETS}
    for name, chain in plans.items():
        for plan in chain:
            print(f"{name:<8} to {plan.name:<14} {settings.in_words(plan)}")
    print(f"{len(rooms)} samples of {len(set(rooms.scenes))} rooms, {rooms.pack.path}", flush=True)
    constant = truth.constant_guess(train)
    read_back = next(p for p in plans["rgb"] if p.name == settings.CAPTION)
    chosen = sheets.picked(rooms, ROOMS_IN_SHEETS)
    work = sum(
        run_lib.steps(session, size, options.batch, chain)
        for size, chain in (
            (len(rooms), plans["rgb"]), (len(rooms), plans["caption"]), (2 * len(rooms), [read_back]),
            *([(len(chosen), plans["edit"])] * sheets.EDITS),
        )
    )  # fmt: skip
    runner = run_lib.Runner(session, options.batch, options.seed, work)
    rgb_rows, found = from_rgb.evaluate(session, runner, plans["rgb"], rooms, train, constant)
    runner.bar.write(table.render("from RGB", rgb_rows))
    caption_rows, made = from_caption.evaluate(
        session, runner, plans["caption"], read_back, rooms, train, constant, extract
    )
    runner.bar.write(f"\n{table.render('from a caption', caption_rows)}")
    step = session.model.meta.get("step")
    note = "held-out rooms" if options.split == "val" else "training rooms"
    note += f", {pathlib.Path(options.model).name}" + (f" at step {step}" if step is not None else "")
    pictures = {
        "from_rgb": sheets.rgb_sheet(session, rooms, found, chosen, f"from the picture alone: {note}"),
        "from_caption": sheets.caption_sheet(session, rooms, made, chosen, f"from the caption alone: {note}"),
        "edits": sheets.edit_sheet(
            session, runner, plans["edit"][0], rooms, constant, chosen,
            f"the grey part of a picture generated anew, as its semantic map says: {note}",
        ),
    }  # fmt: skip
    runner.bar.close()
    for column, meaning in table.COLUMNS.items():
        print(f"{column}: {meaning}")
    print("±: standard error, bootstrap over rooms; of FD-lite0 between real sets, the spread of random draws")
    results = {
        "model": str(options.model),
        "step": step,
        "pack": str(rooms.pack.path),
        "samples": len(rooms),
        "train_samples": len(train),
        "seed": options.seed,
        "batch": options.batch,
        "settings": {name: {p.name: settings.in_words(p) for p in chain} for name, chain in plans.items()},
        "columns": table.COLUMNS,
        "from_rgb": table.as_json(rgb_rows),
        "from_caption": table.as_json(caption_rows),
        "seconds": {**runner.seconds, "all": time.perf_counter() - start},
    }
    files.write(options.out, results, pictures)


if __name__ == "__main__":
    sys.exit(main())
