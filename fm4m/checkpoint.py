"""Checkpoints of a run: Orbax steps under ``<workdir>/checkpoints``, each with everything that gives them a meaning.

A step holds one Orbax item for each part of the train state (``params``, ``opt_state``, ``ema`` where there is one) and
``meta``, a JSON file: the step, the position in the stream, the seed, the resolved mixture, the modality set, the
model, the whole configuration, and the versions of the libraries. Nothing is pickled, and `load_params` needs no other
file.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

import fm4m
from fm4m.modalities import ModalitySet
from fm4m.optim import path_name
from fm4m.sizes import ModelConfig

log = logging.getLogger("fm4m")

FORMAT = 1

# What a run may not change on resume, with the configuration key (or file) to look at.
IDENTITY = {
    "seed": "seed",
    "mixture": "data.mixture, data.num_inputs, data.num_targets, or the files that the mixture reads",
    "modalities": "the modality set of the mixture",
    "model": "model",
}


class CheckpointError(ValueError):
    """A checkpoint that does not fit what is asked of it. The message names the first difference and what to do."""


def make_meta(
    *,
    step: int,
    position: int,
    seed: int | None,
    mixture: Mapping | None,
    modalities: ModalitySet,
    model: ModelConfig,
    config: Mapping,
    origin: Mapping | None = None,
) -> dict:
    """The JSON-able description that is stored beside the arrays.

    Args:
      step: optimizer steps made.
      position: samples of the training stream consumed.
      seed: seed of the run; None for imported weights.
      mixture: `Stream.resolved`, with the masking recipe; None for imported weights.
      modalities: the modality set.
      model: the model's configuration.
      config: the whole configuration, a nested dict.
      origin: where imported weights came from.
    """
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    versions |= {"fm4m": fm4m.__version__, "python": platform.python_version()}
    return _plain({
        "format": FORMAT, "step": step, "position": position, "seed": seed, "mixture": mixture,
        "modalities": modalities.to_dict(), "model": model.identity, "config": config, "versions": versions,
        **({"origin": origin} if origin else {}),
    })  # fmt: skip


def model_of(meta: Mapping) -> ModelConfig:
    """The model's configuration in a description. Raises CheckpointError if this version cannot represent it."""
    try:
        return ModelConfig(**meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's model cannot be built by fm4m {fm4m.__version__}: {error}") from error


def check_same_run(saved: Mapping, now: Mapping, workdir: str | os.PathLike) -> None:
    """Refuses to continue a run as another one.

    Raises CheckpointError naming everything in `IDENTITY` that differs: the position in the stream means something only
    for the same mixture and seed, and the parameters only for the same model and modalities.
    """
    found = []
    for part, where in IDENTITY.items():
        if saved.get(part) is None:  # imported weights do not say what they were trained on
            continue
        for path, old, new in _differences(saved.get(part), now.get(part), part):
            found.append(f"{path} was {old!r}, is {new!r} (see {where})")
    if found:
        more = f", and {len(found) - 5} more differences" if len(found) > 5 else ""
        raise CheckpointError(
            f"{workdir} holds a checkpoint of another run (step {saved.get('step')}): {'; '.join(found[:5])}{more}. "
            "Continue it with its own configuration (config.json beside it), or give this run another --workdir"
        )


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      workdir: folder of the run; checkpoints go to ``<workdir>/checkpoints``.
      every: steps between saves; 0 means only those that are forced.
      keep: how many of the newest stay.
      keep_period: over 0, steps that are multiples of it stay for good.
      asynchronous: write in the background; `save` then blocks only while arrays are copied to the host.
      concurrent_gb: about how much may be on its way to the disk at a time (Orbax's default: 96 GB).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        every: int = 1000,
        keep: int = 3,
        keep_period: int = 0,
        asynchronous: bool = True,
        concurrent_gb: int = 96,
    ):
        self._workdir, self._every = workdir, every
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_period or None,
            enable_async_checkpointing=asynchronous,
            # A write that was cut short leaves a folder that no reader sees; it is removed at the next start.
            cleanup_tmp_directories=True,
        )
        # Named here so that shapes can be looked at before anything is restored.
        handlers: dict[str, Any] = {
            name: ocp.StandardCheckpointHandler(save_concurrent_gb=concurrent_gb)
            for name in ("params", "opt_state", "ema")
        }
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether the policy wants ``step`` saved."""
        return bool(self._every) and step % self._every == 0

    def save(self, state: Mapping[str, Any], meta: Mapping) -> None:
        """Saves a train state {"step", "params", "opt_state", ...} and its description; not twice."""
        step = int(meta["step"])
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(value) for name, value in state.items() if name != "step"}
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(dict(meta))), force=True)

    def meta(self, step: int) -> dict:
        """The description stored with a step."""
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.folder / str(step)} has format {found.get('format')!r}; this version of fm4m reads {FORMAT}"
            )
        return found

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the parts of a train state named in ``abstract`` (without "step"), sharded as its leaves say.

        Args:
          step: a step that exists.
          abstract: {"params": tree, ...} of `jax.ShapeDtypeStruct` with shardings.

        Raises CheckpointError naming the first array that is missing, left over, or of another shape.
        """
        for name in sorted(abstract, key=lambda name: name != "params"):  # so that an error names a parameter
            self._check_arrays(self.shapes(step, name), abstract[name], step, name)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in abstract}

    def shapes(self, step: int, part: str) -> Any:
        """The tree of shapes and dtypes of one part of a stored train state."""
        stored = dict(self._manager.item_metadata(step).items()).get(part)
        if stored is None:
            where = f"the checkpoint of step {step} in {self.folder}"
            why = " (optimizer.ema was 0)" if part == "ema" else ""
            if part == "opt_state":
                why = ": imported weights without it cannot be continued; start a new run from them (train.init_from)"
            raise CheckpointError(f"{where} has no {part!r}{why}")
        return getattr(stored, "tree", stored)

    def _check_arrays(self, stored: Any, wanted: Any, step: int, part: str) -> None:
        have, want = (
            {path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(t)} for t in (stored, wanted)
        )
        where = f"the checkpoint of step {step} in {self.folder}"
        mend = "it belongs to another model: use the configuration beside it, or another --workdir"
        for name, shape in want.items():
            if name not in have:
                raise CheckpointError(f"{where} has no array {part}/{name} (expected shape {shape}); {mend}")
            if have[name] != shape:
                raise CheckpointError(
                    f"{where} has {part}/{name} of shape {have[name]}, but the model's is {shape}; {mend}"
                )
        for name, shape in have.items():
            if name not in want:
                raise CheckpointError(
                    f"{where} has an array {part}/{name} {shape} that the model does not have; {mend}"
                )

    def wait(self) -> None:
        """Returns when everything is on disk. Raises what a background write raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_params(
    workdir: str | os.PathLike, step: int | None = None, *, ema: bool = False
) -> tuple[dict[str, Any], dict]:
    """Parameters (float32 arrays on the default device) and description of a run, for generation, export or evaluation.

    Args:
      workdir: folder of a run.
      step: a checkpoint of it; default the newest.
      ema: the moving average instead of the parameters.

    Raises CheckpointError if there is no such checkpoint; it names those there are.
    """
    return load_part(workdir, step, "ema" if ema else "params")


def load_part(workdir: str | os.PathLike, step: int | None, part: str) -> tuple[dict[str, Any], dict]:
    """One part of a stored train state ("params", "ema", "opt_state"), and its description; see `load_params`."""
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(f"no checkpoint{wanted} in {folder}; there are: {', '.join(map(str, steps)) or 'none'}")
    step = steps[-1] if step is None else step
    checkpoints = Checkpoints(workdir)
    try:
        meta = checkpoints.meta(step)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), checkpoints.shapes(step, part)
        )
        return checkpoints.restore(step, {part: abstract})[part], meta
    finally:
        checkpoints.close()


def _plain(value: Any) -> Any:
    """Tuples become lists and keys strings, as a round trip through JSON would do; other objects become their text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in [*old, *(k for k in new if k not in old)]:
            out += _differences(old.get(key), new.get(key), f"{path}.{key}")
        return out
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new)) for d in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [(path, old, new)]
