"""People look before they train: pictures and numbers of a prepared set.

    python -m data_pipelines.show NAME [--modules=MODULE,...] [--split=train] [--samples=8] [--out=DIR]
                                       [--tokenizers=FOLDER] [--limit=10000] [--seed=0]

NAME is a registered mixture or task, or the path of a folder of token files. Writes to DIR

    samples.png       samples decoded back from their tokens
    masks.png         what the encoder sees of them and what the decoder has to predict (mixtures only)
    statistics.json   tokens, use of the vocabularies, duplicates, fill of the budgets, warnings

and prints the table and the warnings. Masks of ``train`` are those that a training run with this seed draws for the
first samples of its stream; of other splits, those of validation.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.show import decode, opened, sheets, statistics
from fm4m.files import complete_file

MASKED = 256  # samples whose masks are counted; the mean fill is then known to about 1 %


def show(
    name: str,
    split: str = "train",
    *,
    modules: Sequence[str] | None = None,
    samples: int = 8,
    out: str | os.PathLike | None = None,
    tokenizers: str | os.PathLike | None = None,
    limit: int = 10_000,
    seed: int = 0,
) -> dict:
    """Writes the pictures and statistics of a split, and returns the statistics; see the top of this file.

    Args:
      name, split, modules, seed: as in `opened.open_set`.
      samples: number of samples in the pictures.
      out: target folder; None: ``runs/show/<name>-<split>``.
      tokenizers: folder of tokenizers, for sets whose manifest does not say where theirs are.
      limit: number of samples that statistics are taken of, spread over the set.

    Raises:
      KeyError, ImportError, FileNotFoundError, ValueError: as `opened.open_set`, or while reading, naming the file.
    """
    from tqdm import tqdm

    data = opened.open_set(name, split, modules, seed)
    folder = pathlib.Path(out) if out is not None else pathlib.Path("runs", "show", f"{data.name}-{split}")
    showers, notes = decode.load_showers(
        data.modalities, data.origins, pathlib.Path(tokenizers) if tokenizers is not None else None
    )
    positions = data.positions(samples)
    shown = sheets.decode_samples(data.modalities, [data.at(p) for p in positions], showers)
    title = f"{data.name}, {split}: {len(positions)} of {len(data.samples)} samples"
    row_names = [f"sample {p}" if p < 10_000 else str(p) for p in positions]
    pictures = {"samples": sheets.sample_sheet(shown, row_names, f"{title}, decoded from their tokens")}

    chosen = opened.spread(len(data.samples), limit)
    with tqdm(total=len(chosen), desc="counting", unit="sample", disable=None) as bar:
        numbers = statistics.count_samples(data.modalities, map(data.samples.__getitem__, chosen), bar.update)
    result = {"name": data.name, "split": split, "samples": len(data.samples), **numbers, "masks": None}

    if data.stream is not None:
        from data_pipelines.show import masks

        # Those of the pictures first.
        masked = list(dict.fromkeys([*positions, *data.positions(MASKED)]))
        with tqdm(total=len(masked), desc="masking", unit="sample", disable=None) as bar:
            drawn = masks.draw_masks(data.stream, masked, bar.update)
        result["masks"] = masks.count_masks(drawn, data.stream.modalities)
        whose = f"as training with seed {seed} draws them" if data.in_training_order else "as validation draws them"
        pictures["masks"] = sheets.mask_sheet(shown, drawn[: len(positions)], f"{data.name}, {split}: masks {whose}")

    result["notes"] = [*notes, *shown.notes]
    result["warnings"] = statistics.warnings(result)
    _write(folder, pictures, result)
    _report(folder, data, pictures, result, len(chosen))
    return result


def _write(folder: pathlib.Path, pictures: dict, result: dict) -> None:
    from PIL import Image

    for stem, picture in pictures.items():
        with complete_file(folder / f"{stem}.png") as beside:
            Image.fromarray(picture).save(beside)
    if "masks" not in pictures:
        (folder / "masks.png").unlink(missing_ok=True)  # of an earlier call, it would be of something else
    with complete_file(folder / "statistics.json") as beside:
        beside.write_text(json.dumps(result, indent=1) + "\n")


def _report(folder: pathlib.Path, data: opened.Opened, pictures: dict, result: dict, counted: int) -> None:
    print(f"{data.name}, split {data.split}: {len(data.samples)} samples, numbers from {counted} of them\n")
    print(statistics.table(result) + "\n")
    for sentence in result["notes"]:
        print(f"note: {sentence}")
    for sentence in result["warnings"]:
        print(f"warning: {sentence}")
    if not result["warnings"]:
        print("no warnings")
    if data.stream is None:
        print("no masks: they belong to a mixture, and this is none (data_pipelines.registry.add_mixture makes one)")
    print(f"wrote {', '.join(str(folder / f'{stem}.png') for stem in pictures)} and {folder / 'statistics.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.show", description=__doc__.partition("\n")[0])
    parser.add_argument("name", metavar="NAME", help="a mixture, a task, or a folder of token files")
    parser.add_argument("--modules", help="modules that register NAME, with commas (default: the rooms')")
    parser.add_argument("--split", default="train")
    parser.add_argument("--samples", type=int, default=8, help="samples in the pictures (default: %(default)s)")
    parser.add_argument("--out", help="folder to write to (default: runs/show/NAME-SPLIT)")
    parser.add_argument("--tokenizers", help="folder of tokenizers: <modality> or <domain>.safetensors, text.json")
    parser.add_argument("--limit", type=int, default=10_000, help="samples of the statistics (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (config.seed; default: %(default)s)")
    args = parser.parse_args(argv)
    if args.samples < 1 or args.limit < 1:
        parser.error("--samples and --limit must be at least 1")
    # TensorFlow, which SeqIO imports, fills the terminal with its start-up notes otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    modules = None if args.modules is None else tuple(filter(None, args.modules.split(",")))
    options = {key: getattr(args, key) for key in ("samples", "out", "tokenizers", "limit", "seed")}
    try:
        show(args.name, args.split, modules=modules, **options)
    except (ImportError, KeyError, OSError, ValueError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
