"""Generates modalities from others with a trained model.

    python -m fm4m.generate --model=runs/demo --inputs rgb=photo.png --targets=depth,normal,caption --out=out
    python -m fm4m.generate --model=runs/demo --inputs caption="a bedroom with a desk [S_1]" --targets=rgb --samples=4
    python -m fm4m.generate --model=runs/demo --inputs tok_rgb=photo.png --edit tok_rgb=mask.png --out=out
    python -m fm4m.generate --model=runs/rooms_larger --codes=out/codes.npz --inputs rgb=photo.png --out=large

Writes OUT/sheet.png (what was given and what was generated, a line a sample), a picture or text for every target and
sample, and the codes (codes.npz). Every target becomes a condition of the next ones.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from fm4m.generate import command, presets
from fm4m.generate.generator import Target
from fm4m.generate.session import Session, known_modalities, read_codes, read_mask


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 with one sentence on standard error."""
    options = parse(argv)
    return command.exit_code(lambda: run(options))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser("fm4m.generate", "Generates modalities from others.")
    command.add_pairs(parser, "--inputs", "NAME=VALUE",
                      "a picture, a .npy array, or a text; a text that ends with [S_1] may go on")  # fmt: skip
    parser.add_argument("--codes", type=pathlib.Path, metavar="FILE",
                        help="codes.npz of an earlier run, perhaps with another model: what it has and this model "
                        "takes is given")  # fmt: skip
    parser.add_argument("--targets", default="", help="modalities to generate, comma-separated, in this order; "
                        "default: all outputs that are not given")  # fmt: skip
    command.add_pairs(parser, "--edit", "NAME=MASK",
                      "generate a part of a given modality anew: a mask picture (white changes) or "
                      "xmin,ymin,xmax,ymax from 0 to 1 of what the model sees, the picture's centre")  # fmt: skip
    command.add_pairs(parser, "--set", "[NAME.]KEY=VALUE",
                      f"settings of all targets or of one: {', '.join(presets.SETTINGS)}")  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, help="how many results to draw from the same inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("generated"), help="folder (%(default)s)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Loads the model, generates, writes and prints."""
    if options.samples < 1:
        raise ValueError("--samples must be at least 1")
    session = command.open_session(options)
    modalities = session.modalities
    if not options.inputs and not options.codes:
        raise ValueError(f"--inputs are missing; this model's {known_modalities(modalities)}")
    codes = read_codes(options.codes) if options.codes else {}
    if codes and not set(codes) & set(modalities.inputs):
        raise ValueError(f"--codes has {', '.join(codes)}; this model's {known_modalities(modalities)}")
    canvas = session.read(command.pairs(options.inputs, "--inputs"), options.samples, codes)
    given = list(canvas.seen)
    edited = []
    for name, where in command.pairs(options.edit, "--edit").items():
        name = session.name_of(name, [n for n in given if modalities[n].kind == "tokens"])
        canvas = session.open_cells(canvas, name, read_mask(where))
        edited.append(name)
    asked = list(dict.fromkeys(session.name_of(n, modalities.outputs) for n in options.targets.split(",") if n))
    names = asked or edited or presets.in_order(n for n in modalities.outputs if n not in given)
    names = [*(n for n in edited if n not in names), *names]
    settings = list(command.pairs(options.set, "--set").items())
    for key, _ in settings:
        whose = key.rpartition(".")[0]
        if whose and session.name_of(whose, modalities.outputs) not in names:
            raise ValueError(f"--set {key}: {whose} is not generated; targets: {', '.join(names)}")
    # A part of a modality that is generated anew is not generated from itself being given.
    targets = [_target(session, name, [n for n in given if n != name], settings) for name in names]

    options.out.mkdir(parents=True, exist_ok=True)  # or a folder that cannot be made would be known at the end only

    from tqdm import tqdm

    with tqdm(total=len(targets), disable=None, unit="target") as bar:

        def progress(name: str, done: int, steps: int) -> None:
            bar.set_description(f"{name} {done}/{steps}")
            bar.update(done == steps)

        canvas = session.generator(canvas, targets, seed=options.seed, progress=progress)
    for path in session.write(canvas, given, names, options.out, f"seed {options.seed}"):
        print(f"wrote {path}")
    for name in names:
        if modalities[name].kind == "sequence" and name in session.showers:
            for text in session.texts(canvas, name):
                print(f"{name}: {text}")


def _target(session: Session, name: str, given: Sequence[str], settings: Sequence[tuple[str, str]]) -> Target:
    values = {}
    for key, value in settings:
        whose, _, field = key.rpartition(".")
        if not whose or session.name_of(whose, session.modalities.outputs) == name:
            values[field] = value
    return presets.changed(presets.target(session.modalities, name, given), values)


if __name__ == "__main__":
    sys.exit(main())
