"""Changes one input in steps, holds the rest, and shows how the predictions react (4M, probing the representation).

    python -m fm4m.generate.probe --model=runs/demo --inputs rgb=photo.png det="v0=100 v1=400 v2=300 v3=700 bed" \\
        --vary det="1:+0.1,0|1:+0.2,0|1:+0.3,0" --targets=depth,rgb --out=strip.png
    python -m fm4m.generate.probe --model=runs/demo --inputs semseg=map.png --vary semseg="4>7|4>12" --targets=rgb
    python -m fm4m.generate.probe --model=runs/demo --vary caption="a red bed|a blue bed" --targets=rgb

A value of --vary is what --inputs takes (a text, a file), or a change of what --inputs gives for the same modality:
OLD>NEW replaces a word of a text or a class of a semantic map, N:+DX,DY moves box N (from 1) by shares of the picture.
The unchanged input is then the first step. The same seed is used at every step, so what differs is a reaction to the
change. Writes one picture: a column a step, a line a modality.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fm4m.generate import command
from fm4m.generate.canvas import Canvas
from fm4m.generate.ensemble import as_targets
from fm4m.generate.generator import Target
from fm4m.generate.presets import base_name
from fm4m.generate.session import Session, known_modalities, read_picture
from fm4m.modalities import Modality
from fm4m.pictures import draw_sheet

_MOVE = re.compile(r"(\d+):([+-]?[\d.]+),([+-]?[\d.]+)")
_GAP = re.compile(r"\s*\[S_\d+\]\s*$")


@dataclasses.dataclass(frozen=True)
class Probe:
    """What came out.

    Attributes:
      varied: name of the modality that was changed.
      held: names of the other given ones.
      targets: names of the generated ones.
      steps: a canvas of ``samples`` samples for every value.
    """

    varied: str
    held: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[Canvas, ...]

    def reaction(self, name: str) -> np.ndarray:
        """float64 [steps]: share of a modality's tokens that differ from the first step's, over all samples."""
        rows = [np.where(np.asarray(c.seen[name]), np.asarray(c.ids[name]), -1) for c in self.steps]
        used = [(row >= 0) | (rows[0] >= 0) for row in rows]
        return np.array([(row != rows[0]).sum() / max(u.sum(), 1) for row, u in zip(rows, used, strict=True)])


def probe(
    session: Session,
    inputs: Mapping[str, Any],
    vary: str,
    values: Sequence[Any],
    targets: Sequence[str | Target],
    *,
    samples: int = 1,
    seed: int = 0,
) -> Probe:
    """Generates the targets once for every value of one input.

    Args:
      session: the model with its tokenizers.
      inputs: what is held, see `Session.read`; another value of the varied modality in it is left out.
      vary: the modality that changes.
      values: its values, each as in ``inputs``; see `moved_box`, `recoloured` and `reworded` for making them.
      targets: names, with the presets' settings, or targets; generated in this order.
      samples: results for each value.
      seed: of everything drawn, the same at every step.

    Raises:
      ValueError: fewer than two values, no target, or see `Session.read` and `Generator`.
    """
    modalities = session.modalities
    everything = [*dict.fromkeys((*modalities.inputs, *modalities.outputs))]
    varied = session.name_of(vary, everything)
    held = {session.name_of(n, everything): value for n, value in inputs.items()}
    held.pop(varied, None)
    if len(values) < 2:
        raise ValueError(f"probing {varied!r} needs at least two values, got {len(values)}")
    plans = as_targets(session, targets, [*held, varied])
    if not plans:
        raise ValueError("nothing to look at: name at least one target")
    given = [session.read({**held, varied: value}, samples) for value in values]
    # One call a value, not one for all: what is drawn for a sample depends on its place in the batch.
    steps = tuple(session.generator(canvas, plans, seed=seed) for canvas in given)
    return Probe(varied, tuple(held), tuple(plan.name for plan in plans), steps)


def strip(session: Session, result: Probe, labels: Sequence[str], note: str = "") -> np.ndarray:
    """The picture strip: a column for every step, the changed input above its predictions. uint8 [H, W, 3]."""
    lines = [result.varied, *(n for n in result.targets if n != result.varied)]
    columns = []
    for label, canvas in zip(labels, result.steps, strict=True):
        cells = [session.cells(canvas, name) for name in lines]
        columns.append((label, [list(sample) for sample in zip(*cells, strict=True)]))
    return draw_sheet(columns, [base_name(n).removeprefix("tok_") for n in lines], note)


# ---- values


def moved_box(text: str, number: int, dx: float, dy: float) -> str:
    """A text of boxes with one of them moved.

    Args:
      text: as `fm4m.transforms.boxes.to_text` writes it.
      number: of the box, from 1 in the text's order; the order stays, and a gap at the end, so that only this box
        changes.
      dx, dy: shares of the picture; the box stops at its edge.

    Raises:
      ValueError: there is no such box.
    """
    from fm4m.transforms import boxes, values

    found = boxes.from_text(text).boxes
    if not 1 <= number <= len(found):
        raise ValueError(f"there is no box {number} in {text!r}: boxes 1 to {len(found)} can be moved")
    box = found[number - 1]
    dx, dy = np.clip(dx, -box.xmin, 1 - box.xmax), np.clip(dy, -box.ymin, 1 - box.ymax)
    corners = {"xmin": box.xmin + dx, "ymin": box.ymin + dy, "xmax": box.xmax + dx, "ymax": box.ymax + dy}
    found[number - 1] = dataclasses.replace(box, **{k: float(v) for k, v in corners.items()})
    scale = values.coordinate_bins(values.NUM_VALUES)
    parts = [(values.corners(scale.bin(v) for v in (b.xmin, b.ymin, b.xmax, b.ymax)), b.class_name) for b in found]
    gap = _GAP.search(text)
    return " ".join(" ".join([*corner, name]) for corner, name in parts) + (f" {gap[0].strip()}" if gap else "")


def reworded(text: str, old: str, new: str) -> str:
    """A text with a word (or several in a row) replaced wherever it stands. ValueError if it stands nowhere."""
    out, count = re.subn(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, text)
    if not count:
        raise ValueError(f"{old!r} is no word of {text!r}")
    return out


def recoloured(classes: np.ndarray, old: int, new: int) -> np.ndarray:
    """A semantic map uint8 [H, W] with one class replaced by another. ValueError if the class is not in it."""
    classes = np.asarray(classes)
    if classes.ndim != 2 or classes.dtype != np.uint8:
        raise ValueError(f"expected a map of classes uint8 [H, W], got {classes.dtype} {list(classes.shape)}")
    if not (classes == old).any():
        raise ValueError(f"the map has no class {old}, only {', '.join(map(str, np.unique(classes)))}")
    return np.where(classes == old, np.uint8(new), classes)


def changed(m: Modality, value: Any, change: str) -> Any:
    """An input with a change of the command line: OLD>NEW, or N:+DX,DY for a box.

    Raises:
      ValueError: the change is of neither form, or does not fit the input.
    """
    move = _MOVE.fullmatch(change.strip())
    old, arrow, new = (part.strip() for part in change.partition(">"))
    if m.kind == "sequence" and move:
        try:
            return moved_box(value, int(move[1]), float(move[2]), float(move[3]))
        except ValueError as error:
            raise ValueError(f"--vary {m.name}={change!r}: {error}") from None
    if not arrow or not old:
        raise ValueError(f"--vary {m.name}: {change!r} is neither OLD>NEW nor N:+DX,DY")
    if m.kind == "sequence":
        return reworded(value, old, new)
    if not (old.isdigit() and new.isdigit() and int(new) < 256):
        raise ValueError(f"--vary {m.name}: classes of {change!r} must be numbers from 0 to 255")
    return recoloured(_class_map(m, value), int(old), int(new))


def _class_map(m: Modality, value: Any) -> np.ndarray:
    if not isinstance(value, str | pathlib.Path):
        return value
    path = pathlib.Path(value)
    if path.suffix != ".npy":
        return read_picture(path, f"input {m.name!r}: {path}")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"input {m.name!r}: {path} is not a map of classes that can be read ({error})") from None


def _is_change(text: str) -> bool:
    return ">" in text or bool(_MOVE.fullmatch(text.strip()))


# ---- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 with one sentence on standard error."""
    parser = command.parser(
        "fm4m.generate.probe", "Changes one input in steps and draws how the predictions react."
    )  # fmt: skip
    command.add_pairs(parser, "--inputs", "NAME=VALUE",
                      "what is held: a picture, a .npy array, a text; or the start of what varies")  # fmt: skip
    parser.add_argument("--vary", required=True, metavar="NAME=VALUE|VALUE...",
                        help="what changes: values, or changes OLD>NEW or N:+DX,DY (box N) of the input")  # fmt: skip
    parser.add_argument("--targets", required=True, help="modalities to generate, comma-separated, in this order")
    parser.add_argument("--samples", type=int, default=1, help="results for every value, a line each")
    parser.add_argument("--seed", type=int, default=0, help="the same for every value")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("probe.png"), help="picture (%(default)s)")
    options = parser.parse_args(argv)
    return command.exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from PIL import Image

    if options.samples < 1:
        raise ValueError("--samples must be at least 1")
    if options.out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {options.out}: expected the name of a picture, such as probe.png")
    session = command.open_session(options)
    modalities = session.modalities
    everything = [*dict.fromkeys((*modalities.inputs, *modalities.outputs))]
    form = f"NAME=VALUE; this model's {known_modalities(modalities)}"
    given = command.pairs(options.inputs, "--inputs", form)
    inputs = {session.name_of(name, everything): value for name, value in given.items()}
    name, _, rest = options.vary.partition("=")
    varied = session.name_of(name, everything)
    m, texts = modalities[varied], rest.split("|")
    values, labels = list(texts), list(texts)
    if varied in inputs:
        start = inputs[varied]
        values = [start, *(changed(m, start, t) if _is_change(t) else t for t in texts)]
        labels = ["as given", *texts]
    elif changes := [t for t in texts if _is_change(t)]:
        raise ValueError(
            f"--vary {varied}: {changes[0]!r} is a change of what --inputs gives, and --inputs gives no {varied}"
        )
    targets = [n for n in options.targets.split(",") if n]
    result = probe(session, inputs, varied, values, targets, samples=options.samples, seed=options.seed)
    labels = [label if len(label) < 22 else f"step {i}" for i, label in enumerate(labels)]
    held = f"; held: {', '.join(result.held)}" if result.held else ""
    picture = strip(session, result, labels, f"{varied} varies{held}; seed {options.seed}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(options.out)
    print(f"wrote {options.out}")
    for target in result.targets:
        shares = ", ".join(f"{share:.1%}" for share in result.reaction(target)[1:])
        print(f"{target}: tokens that differ from the first step: {shares}")


if __name__ == "__main__":
    sys.exit(main())
