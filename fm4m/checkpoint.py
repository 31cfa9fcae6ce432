"""Checkpoints of a run: Orbax steps under ``<workdir>/checkpoints``, each with everything that gives them a meaning.

A step holds one Orbax item for each part of the train state (``params``, ``opt_state``, ``ema`` where there is one) and
``meta``, a JSON file: the step, the position in the stream, the seed, the resolved mixture, the modality set, the
model, the whole configuration, the versions of the libraries, and fingerprints of all arrays. Nothing is pickled, and
`load_params` needs no other file. Steps are read and verified by `fm4m.stored_step`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import logging
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

import fm4m
from fm4m.agreement import all_or_none, of_lead
from fm4m.checkpoint_writer import SaveError as SaveError
from fm4m.checkpoint_writer import Writer
from fm4m.modalities import ModalitySet
from fm4m.sizes import ModelConfig
from fm4m.stored_step import (
    FORMAT,
    CheckpointError,
    DamagedError,
    StoredStep,
    array_table,
    brief,
    run_folder,
    seal,
    steps_in,
)

log = logging.getLogger("fm4m")

# What a run may not change on resume, with the configuration key (or file) to look at.
IDENTITY = {
    "seed": "seed",
    "mixture": "data.mixture, data.num_inputs, data.num_targets, or the files that the mixture reads",
    "modalities": "the modality set of the mixture",
    "model": "model",
}

# A stored step that is damaged is kept under this name, which no reader takes for a step.
ASIDE = "damaged-"
# What all processes raise if one does; the later one is graver.
ERRORS = (DamagedError, CheckpointError)


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
    """The checkpoints of one run folder; its methods are called by all processes of a run alike.

    Args:
      workdir: folder of the run, local or ``gs://...``; checkpoints go to ``<workdir>/checkpoints``.
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
        self._every = every
        self.folder = run_folder(workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_period or None,
            enable_async_checkpointing=asynchronous,
            # A write that was cut short leaves a folder that no reader sees; it is removed at the next start.
            cleanup_tmp_directories=True,
        )
        self._writer = Writer(self.folder, options, concurrent_gb)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(steps_in(self.folder), default=None)

    def due(self, step: int) -> bool:
        """Whether the policy wants ``step`` saved, or a write in the background has failed."""
        self._writer.look()
        return (bool(self._every) and step % self._every == 0) or self._writer.failed

    def save(self, state: Mapping[str, Any], meta: Mapping) -> None:
        """Saves a train state {"step", "params", "opt_state", ...} and its description; not twice.

        Raises SaveError if it cannot be written. A write in the background that failed is known later: a single
        process then saves again at the step that it has come to, and waits for that; several raise at the next save.
        """
        self._writer.finish()
        step = int(meta["step"])
        if step in of_lead(steps_in(self.folder)):
            return
        parts = {name: value for name, value in state.items() if name != "step"}
        table, unequal = array_table(parts)
        if unequal:
            log.error(
                "step %d: the copies of %s on several devices differ: a device has computed something else than the "
                "others; the step is saved, and will be found damaged if it was written from several of them",
                step, ", ".join(unequal[:5]),
            )  # fmt: skip
        self._writer.write(step, parts, seal(meta, table))

    def meta(self, step: int) -> dict:
        """The description stored with a step. Raises CheckpointError, or DamagedError if it is not what was saved."""
        return StoredStep(self.folder, step).meta()

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Restores and verifies the parts of a train state named in ``abstract`` (without "step"), sharded as its
        leaves say.

        Args:
          step: a step that exists.
          abstract: {"params": tree, ...} of `jax.ShapeDtypeStruct` with shardings.

        Raises CheckpointError naming the first array that is missing, left over, or of another shape or dtype, and
        DamagedError for a step that is damaged.
        """
        stored = StoredStep(self.folder, step)

        def read() -> dict[str, Any]:
            stored.check(abstract)
            return stored.restore(abstract)

        state = all_or_none(read, ERRORS)
        stored.verify(state)
        return state

    def restore_newest(
        self, abstract: Mapping[str, Any], check: Callable[[dict], None] = lambda meta: None
    ) -> tuple[dict[str, Any], dict] | None:
        """State and description of the newest step that is whole; None in a folder without steps.

        Steps that are damaged are reported, kept under another name (``damaged-STEP``) and not used. A step that is
        whole but does not fit is an error: ``check`` gets its description first, then shapes are compared.

        Raises CheckpointError for a step that does not fit, storage that does not answer, a folder that cannot be
        written to, or if every step is damaged.
        """
        for step in reversed(of_lead(steps_in(self.folder))):
            try:
                meta = all_or_none(functools.partial(self.meta, step), ERRORS)
                check(meta)
                state = self.restore(step, abstract)
            except DamagedError as error:
                self._set_aside(step, error)
                continue
            self._try_folder()
            return state, meta
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        if aside := sorted(name for name in names if name.startswith(ASIDE)):
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged: {', '.join(aside)} (the log said in what). Bring back "
                f"a copy of one under its own name (without {ASIDE!r}), or remove these folders or give another "
                "--workdir, to start at step 0"
            )
        self._try_folder()
        return None

    def _set_aside(self, step: int, error: DamagedError) -> None:
        new = next(
            path
            for n in itertools.count()
            if not (path := self.folder / f"{ASIDE}{step}{f'-{n}' if n else ''}").exists()
        )
        before = [s for s in steps_in(self.folder) if s < step]
        if jax.process_index() == 0:
            then = f"going back to step {before[-1]}" if before else "there is none before it"
            log.error("%s. It is kept as %s; %s", error, new, then)

        def move() -> None:
            if jax.process_index() == 0:
                try:
                    (self.folder / str(step)).rename(new)
                except OSError as why:
                    raise CheckpointError(f"{error}, and cannot be set aside as {new}: {brief(why)}") from why

        all_or_none(move, ERRORS)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises SaveError if that cannot be had."""
        self._writer.finish(last=True)

    def close(self) -> None:
        """Ends the threads that write, after they have finished. Raises nothing: see `wait`."""
        self._writer.close()

    def _try_folder(self) -> None:
        """Raises CheckpointError for a folder that cannot be written to, rather than at the first save."""

        def write() -> None:
            if jax.process_index() == 0:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    probe = self.folder / ".probe"
                    probe.write_text("")
                    probe.unlink()
                except OSError as error:
                    raise CheckpointError(f"{self.folder} cannot be written to: {brief(error)}") from error

        all_or_none(write, ERRORS)


def load_params(
    workdir: str | os.PathLike, step: int | None = None, *, ema: bool = False
) -> tuple[dict[str, Any], dict]:
    """Parameters (float32 arrays on the default device) and description of a run, for generation, export or evaluation.

    Args:
      workdir: folder of a run.
      step: a checkpoint of it; default the newest.
      ema: the moving average instead of the parameters.

    Raises CheckpointError if there is no such checkpoint, and DamagedError if it is damaged; they name the others.
    """
    return load_part(workdir, step, "ema" if ema else "params")


def load_part(workdir: str | os.PathLike, step: int | None, part: str) -> tuple[dict[str, Any], dict]:
    """One part of a stored train state ("params", "ema", "opt_state"), and its description; see `load_params`."""
    folder = run_folder(workdir) / "checkpoints"
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(f"no checkpoint{wanted} in {folder}; there are: {', '.join(map(str, steps)) or 'none'}")
    stored = StoredStep(folder, steps[-1] if step is None else step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        meta = stored.meta()
        shapes = stored.shapes(part)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
        state = stored.restore({part: abstract})
        stored.verify(state)
    except DamagedError as error:
        others = ", ".join(str(s) for s in steps if s != stored.step) or "none"
        raise DamagedError(f"{error}. Other steps there: {others}") from error
    return state[part], meta


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
