"""Render rooms into pack files.

    python -m data_pipelines.rooms.generate --out=DIR --split=train --count=1024 --resolution=64 --seed=0 --processes=2

Every scene has its own random stream derived from (seed, split, scene number), so the result does not depend on the
number of processes. Needs numba, tqdm and the furniture catalogues of the Debian package sweethome3d-furniture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from data_pipelines.rooms.furniture import Catalogue, open_catalogues
from data_pipelines.rooms.library import ModelLibrary, split_models, usable_models
from data_pipelines.rooms.pack import encode_sample, write_pack
from fm4m.files import complete_file

GENERATOR_VERSION = 1
_SPLIT_STREAM = {"train": 0, "val": 1}
_worker: dict[str, Any] = {}


def write_split_file(path: pathlib.Path, catalogues: list[Catalogue]) -> None:
    """JSON with the model ids of train and val, and the class and the creator of each model."""
    split: dict[str, Any] = dict(split_models(catalogues))
    models = [m for c in catalogues for m in usable_models(c)]
    split["class_of"] = {m.model_id: m.label.class_name for m in models}
    split["creator_of"] = {m.model_id: m.entry.creator for m in models}
    split["catalogues"] = [c.path.name for c in catalogues]
    with complete_file(path) as partial:
        partial.write_text(json.dumps(split, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _start_worker(paths: list[str], license: str, split: str, seed: int, views: int, resolution: int) -> None:
    _worker["library"] = ModelLibrary(open_catalogues(paths, license), split)
    _worker["settings"] = (seed, split, views, resolution)


def _render(scene: int) -> list[dict[str, bytes]]:
    from data_pipelines.rooms.render import render_scene

    seed, split, views, resolution = _worker["settings"]
    name = f"{split}-{seed}-{scene:06d}"
    samples = render_scene((seed, _SPLIT_STREAM[split], scene), _worker["library"], name, views, resolution)
    return [encode_sample(sample) for sample in samples]


def render_samples(
    paths: list[str],
    license: str,
    split: str,
    count: int,
    resolution: int = 64,
    seed: int = 0,
    views: int = 2,
    processes: int = 1,
) -> Iterator[dict[str, bytes]]:
    """Encoded samples in order, `views` consecutive ones from every scene; the same for any number of processes."""
    settings = (paths, license, split, seed, views, resolution)
    scenes = range(-(-count // views))
    done = 0
    if processes <= 1:
        _start_worker(*settings)
        for scene in scenes:
            for sample in _render(scene)[: count - done]:
                yield sample
                done += 1
        return
    context = multiprocessing.get_context("spawn")  # fork and numba's or a caller's threads do not go together
    with context.Pool(processes, _start_worker, settings) as pool:
        for samples in pool.imap(_render, scenes, chunksize=4):
            for sample in samples[: count - done]:
                yield sample
                done += 1


def shard_paths(out: pathlib.Path, split: str, count: int, shard_size: int) -> list[tuple[pathlib.Path, int]]:
    """(path, number of samples) of every shard; a single one is called rooms_<split>.zip."""
    number = -(-count // shard_size)
    if number == 1:
        return [(out / f"rooms_{split}.zip", count)]
    names = [out / f"rooms_{split}-{i:05d}-of-{number:05d}.zip" for i in range(number)]
    return [(name, min(shard_size, count - i * shard_size)) for i, name in enumerate(names)]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.rooms.generate",
        description="Render furnished rooms with RGB, depth, normals, semantic labels, boxes and captions.",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="directory for the packs")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--count", type=int, required=True, help="number of samples")
    parser.add_argument("--resolution", type=int, default=64, help="pixels per side (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--views", type=int, default=2, help="samples per scene (default 2)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard_size", type=int, default=2048, help="samples per pack file (default 2048)")
    parser.add_argument("--catalogue", nargs="*", help=".sh3f files or directories (default: where Debian puts them)")
    parser.add_argument(
        "--licence",
        choices=("cc0", "all"),
        default="cc0",
        help="cc0: public-domain models only; all: also CC-BY models",
    )
    args = parser.parse_args(argv)
    for name in ("count", "resolution", "views", "processes", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(argv)
    try:
        import tqdm

        import data_pipelines.rooms.rasterizer  # noqa: F401  (says what to install when numba is missing)

        catalogues = open_catalogues(args.catalogue, args.licence)
    except (ImportError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    paths = [str(c.path) for c in catalogues]
    args.out.mkdir(parents=True, exist_ok=True)
    write_split_file(args.out / "split.json", catalogues)
    generator = {
        "command": (
            f"python -m data_pipelines.rooms.generate --split={args.split} --count={args.count} "
            f"--resolution={args.resolution} --seed={args.seed} --views={args.views} --shard_size={args.shard_size} "
            f"--licence={args.licence}"
        ),
        "version": GENERATOR_VERSION,
        "seed": args.seed,
        "catalogues": [c.path.name for c in catalogues],
    }
    license_text = "CC0-1.0"
    if not all(c.is_cc0 for c in catalogues):
        license_text = "CC-BY-3.0; credit the authors named in LICENSE.TXT of: " + ", ".join(generator["catalogues"])
    samples = render_samples(
        paths, args.licence, args.split, args.count, args.resolution, args.seed, args.views, args.processes
    )
    samples = iter(tqdm.tqdm(samples, total=args.count, desc=f"rooms {args.split}", unit="sample"))
    first = 0
    for path, size in shard_paths(args.out, args.split, args.count, args.shard_size):
        part = (sample for _, sample in zip(range(size), samples, strict=False))
        write_pack(path, part, split=args.split, license=license_text, generator=generator, first=first)
        first += size
    return 0


if __name__ == "__main__":
    sys.exit(main())
