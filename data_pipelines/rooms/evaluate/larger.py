"""Measures a super-resolution model of rooms (configs/rooms_larger.py) on held-out rooms, and draws a sheet.

    python -m data_pipelines.rooms.evaluate.larger --model=runs/rooms_larger --out=scores_larger

Of every picture the model is given the pixels at 64 pixels, through their tokenizer, as another model generates them.
What it makes of them stands beside enlarging them, and beside the truth through the tokenizer of the larger pictures,
the best that any model could do.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.rooms.evaluate import table
from fm4m.generate import command

SMALL, LARGE = "rgb@64", "tok_rgb@128"
ROOMS_IN_SHEET = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 with one sentence on standard error."""
    options = parse(argv)
    return command.exit_code(lambda: run(options))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser(
        "data_pipelines.rooms.evaluate.larger", "Measures a super-resolution model on held-out rooms."
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for results.json and larger.png")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data/rooms128"),
                        help="folder with rooms_val.zip and rooms_train.zip of the larger pictures "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, help="held-out samples (default: %(default)s)")
    parser.add_argument("--train-samples", type=int, default=512,
                        help="training samples, for the distance between real pictures "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=32, help="samples at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    command.add_pairs(parser, "--set", "KEY=VALUE", "change how the codes are generated, such as temperature=0.5")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Loads, generates, measures, prints and writes."""
    from data_pipelines.prepare.labels.pixels import resize
    from data_pipelines.rooms.evaluate import files, from_caption, settings, sheets, truth
    from data_pipelines.rooms.evaluate import run as run_lib
    from fm4m.generate import presets
    from fm4m.generate.generator import Target
    from fm4m.generate.session import known_modalities
    from fm4m.pictures import draw_sheet
    from fm4m.tokenizers import io, reconstruction

    asked = command.pairs(options.set, "--set", "KEY=VALUE")
    session = command.open_session(options)
    inputs, outputs = session.modalities.inputs, session.modalities.outputs
    if SMALL not in inputs or LARGE not in outputs or LARGE not in session.showers:
        raise ValueError(f"this evaluation needs a model that makes {LARGE}, whose tokenizer is known, from {SMALL}; "
                         f"{known_modalities(session.modalities)}")  # fmt: skip
    plan = presets.changed(Target(LARGE, **settings.CALM_LARGER), asked)
    rooms = truth.load_rooms(options.data / "rooms_val.zip", options.samples)
    train = truth.load_rooms(options.data / "rooms_train.zip", options.train_samples)
    extract = from_caption.lite0()
    small, large = io.load(settings.SMALL_RGB), session.showers[LARGE].tokenizer
    print(f"{LARGE} {settings.in_words(plan)}; {len(rooms)} samples of {len(set(rooms.scenes))} rooms", flush=True)
    given = small.decode(small.encode(resize(rooms.rgb, small.config.image_size, "bicubic")))
    work = run_lib.steps(session, len(rooms), options.batch, [plan])
    runner = run_lib.Runner(session, options.batch, options.seed, work)
    made = runner(f"{SMALL} to {LARGE}", {SMALL: given}, [plan])
    runner.bar.close()
    pictures = {
        "model": made.arrays(LARGE),
        "tokenizer": large.decode(large.encode(rooms.rgb)),
        "enlarged": resize(given, rooms.rgb.shape[1:3], "bicubic"),
    }
    decibels = {column: reconstruction.psnr_of_each(rooms.rgb, x) for column, x in pictures.items()}
    psnr = {column: table.number(table.mean(values), rooms.scenes) for column, values in decibels.items()}
    features, true = {column: extract(x) for column, x in pictures.items()}, extract(rooms.rgb)
    distance = from_caption.frechet_row(
        "frechet.true", "FD-lite0 to the true pictures", features, true, extract(train.rgb), rooms.scenes
    )
    rows = [table.Row("psnr", "PSNR in dB", "higher", psnr, 2), distance]
    print(table.render(f"{SMALL} to {LARGE}", rows))
    chosen = sheets.picked(rooms, ROOMS_IN_SHEET)
    titles = {"enlarged": "given: 64 pixels, enlarged", "model": "128 pixels: model", "tokenizer": "tokenizer"}
    columns = [(title, [[pictures[c][i]] for i in chosen]) for c, title in titles.items()]
    columns.append(("true picture", [[rooms.rgb[i]] for i in chosen]))
    step = session.model.meta.get("step")
    note = f"held-out rooms, {pathlib.Path(options.model).name}" + (f" at step {step}" if step is not None else "")
    results = {
        "model": str(options.model), "step": step, "samples": len(rooms), "train_samples": len(train),
        "seed": options.seed, "settings": settings.in_words(plan), "columns": table.COLUMNS,
        "larger": table.as_json(rows), "seconds": runner.seconds,
    }  # fmt: skip
    files.write(options.out, results, {"larger": draw_sheet(columns, ("",), note)})


if __name__ == "__main__":
    sys.exit(main())
