"""Weights that travel: imports models of the reference implementation, exports runs for others.

    python -m fm4m.export import --from=model.safetensors --to=RUN_DIR
    python -m fm4m.export export --from=RUN_DIR --to=FOLDER --format=ml-4m
    python -m fm4m.export export --from=RUN_DIR --to=FOLDER --format=stablehlo --inputs=rgb@224 --targets=tok_depth@224

``ml-4m`` is the folder that the reference implementation's `FM.from_pretrained` loads; ``stablehlo`` is inference that
runs from plain JAX without fm4m. An imported run folder is read by everything that reads runs; a training run starts
from it with ``train.init_from``. ``--with=ema,optimizer`` takes along the moving average and Adam's moments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Sequence

import jax

from fm4m import checkpoint, loading
from fm4m.files import complete_folder
from fm4m.interop import ml4m, stablehlo, tensor_file
from fm4m.modalities import ModalitySet

FORMATS = ("ml-4m", "stablehlo")
EXTRAS = ("ema", "optimizer")
# Position tables of an imported model as its file holds them (see `fm4m.interop.ml4m.Model`).
POSITIONS = "imported_positions.safetensors"


def import_model(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    modalities: ModalitySet | None = None,
    tie_heads: bool | None = None,
    extras: Sequence[str] = (),
) -> ml4m.Source:
    """Makes a run folder with one checkpoint from a model of the reference implementation.

    Args:
      source: a folder or safetensors file, see `fm4m.interop.ml4m.Source`.
      target: the run folder; must not exist, or be empty.
      modalities: the modality set, for names that are not those of the released models.
      tie_heads: keep one table for decoder tokens and head.
      extras: of "ema" and "optimizer", what to take along from the files beside the weights.

    Returns the source, closed again; its ``config`` and ``modalities`` describe the model.

    Raises FileExistsError for a target that holds something, and what `Source` raises; then no target is left.
    """
    parts = 1 + ("ema" in extras) + 2 * ("optimizer" in extras)
    with (
        complete_folder(target) as beside,
        contextlib.closing(ml4m.Source(source, modalities, tie_heads=tie_heads)) as model,
    ):
        with _progress(f"import {model.path.name}", parts * model.layout.size) as bar:
            loaded = model.load(bar.update)
            state, step = {"params": _to_jax(loaded.params)}, 0
            if "ema" in extras:
                state["ema"] = _to_jax(model.load_ema(bar.update))
            if "optimizer" in extras:
                moments, step = model.load_moments(bar.update)
                state["opt_state"] = {name: _to_jax(tree) for name, tree in moments.items()}
        meta = checkpoint.make_meta(
            step=step, position=0, seed=None, mixture=None, modalities=model.modalities, model=model.config, config={},
            origin={"format": "ml-4m", "file": model.path.name},
        )  # fmt: skip
        # The least that Orbax takes: its limit must hold the largest array.
        largest = max(x.nbytes for x in jax.tree.leaves(state))
        checkpoints = checkpoint.Checkpoints(beside, asynchronous=False, concurrent_gb=1 + largest // 10**9)
        checkpoints.save(state, meta)
        checkpoints.close()
        if loaded.positions:
            shapes = {key: table.shape for key, table in loaded.positions.items()}
            tensor_file.write(beside / POSITIONS, shapes, loaded.positions.__getitem__, {})
    return model


def _to_jax(tree: dict) -> dict:
    """The same tree of JAX arrays, emptying the given one: Orbax copies whatever is a NumPy array, all at once."""
    for name, value in tree.items():
        tree[name] = _to_jax(value) if isinstance(value, dict) else jax.block_until_ready(jax.device_put(value))
    return tree


def export_ml4m(
    source: str | os.PathLike, target: str | os.PathLike, *, weights: str = "params", extras: Sequence[str] = ()
) -> loading.LoadedModel:
    """Writes a run (or any model that `fm4m.load` reads) as a folder of the reference implementation.

    Args:
      source: see `fm4m.load`.
      target: the folder; must not exist, or be empty.
      weights: "params", or "ema" for the moving average as the model itself.
      extras: of "ema" and "optimizer", what to write beside the model; needs a run.
    """
    model = loading.load(source, ema=weights == "ema")
    run = loading.run_of(source)
    if extras and run is None:
        raise ValueError(f"--with={','.join(extras)} needs a run folder; {source} holds a model only")
    if run:  # all parts from one checkpoint, even if the run saves another meanwhile
        run = run[0], model.meta["step"]
    options, positions = {}, {}
    if "ema" in extras:
        options["ema"] = checkpoint.load_part(*run, "ema")[0]
    if "optimizer" in extras:
        options["opt_state"] = checkpoint.load_part(*run, "opt_state")[0]
    if run and (run[0] / POSITIONS).is_file():
        with tensor_file.TensorFile(run[0] / POSITIONS) as file:
            positions = {key: file.read(key) for key in file.shapes}
    layout = ml4m.Layout(model.config, model.modalities)
    parts = 1 + ("ema" in extras) + 2 * ("optimizer" in extras)
    with _progress(f"export {pathlib.Path(target).name}", parts * layout.size) as bar:
        ml4m.save(
            target, model.config, model.modalities, model.params, step=model.meta.get("step", 0), positions=positions,
            progress=bar.update, **options,
        )  # fmt: skip
    return model


def _progress(title: str, elements: int):
    from tqdm import tqdm

    return tqdm(total=elements, desc=title, unit="", unit_scale=True, disable=None)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fm4m.export", description="Imports and exports models.")
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--from", dest="source", required=True, help="what to read: a run, a folder or a file")
    both.add_argument("--to", dest="target", required=True, help="the folder to make")
    both.add_argument("--with", dest="extras", type=_names, default=(), help=f"also {' and '.join(EXTRAS)}")
    into = commands.add_parser("import", parents=[both], help="a model of the reference implementation to a run folder")
    into.add_argument("--modalities", help="a fm4m.json, for modalities that the released models do not have")
    into.add_argument("--tie-heads", action="store_true", default=None, help="one table for decoder tokens and head")
    out = commands.add_parser("export", parents=[both], help="a run to files that others read")
    out.add_argument("--format", choices=FORMATS, required=True)
    out.add_argument("--weights", choices=("params", "ema"), default="params", help="which weights (default: params)")
    out.add_argument("--inputs", type=_names, default=(), help="stablehlo: modalities that are given")
    out.add_argument("--targets", type=_names, default=(), help="stablehlo: modalities to predict (default: all)")
    out.add_argument("--platforms", type=_names, default=stablehlo.PLATFORMS, help="stablehlo: default cpu,cuda,tpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one sentence on standard error."""
    parser = _parser()
    args = parser.parse_args(argv)
    for extra in args.extras:
        if extra not in EXTRAS:
            parser.error(f"--with={extra}: choose from {', '.join(EXTRAS)}")
    if args.command == "export" and args.format == "stablehlo" and args.extras:
        parser.error("--with is for --format=ml-4m; a StableHLO folder holds one set of weights (--weights)")
    if args.command == "export" and args.format == "ml-4m" and (args.inputs or args.targets):
        parser.error("--inputs and --targets are for --format=stablehlo")
    try:
        if args.command == "import":
            modalities = ml4m.read_description(args.modalities)[0] if args.modalities else None
            options = {"modalities": modalities, "tie_heads": args.tie_heads, "extras": args.extras}
            model = import_model(args.source, args.target, **options)
        elif args.format == "ml-4m":
            model = export_ml4m(args.source, args.target, weights=args.weights, extras=args.extras)
        else:
            model = loading.load(args.source, ema=args.weights == "ema")
            stablehlo.save(args.target, model, args.inputs, args.targets, platforms=args.platforms)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    sizes = model.config
    print(
        f"wrote {args.target}: {sizes.encoder_depth} + {sizes.decoder_depth} layers of width {sizes.dim}; inputs "
        f"{', '.join(model.modalities.inputs)}; outputs {', '.join(model.modalities.outputs)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
