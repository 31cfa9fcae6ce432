"""Opens a trained model wherever it lies: `fm4m.load`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from etils import epath

from fm4m import checkpoint
from fm4m.files import is_remote
from fm4m.interop import ml4m
from fm4m.modalities import ModalitySet
from fm4m.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model.

    Attributes:
      config: sizes and choices.
      modalities: what it sees and predicts.
      params: nested dict of float32 arrays, what `fm4m.model.forward` takes.
      meta: the description beside a checkpoint of a run (step, position, seed, mixture, configuration, versions); for
        other files only where they came from.
    """

    config: ModelConfig
    modalities: ModalitySet
    params: dict[str, Any]
    meta: dict[str, Any]


def load(
    path: str | os.PathLike, *, ema: bool = False, modalities: ModalitySet | None = None, tie_heads: bool | None = None
) -> LoadedModel:
    """Configuration and parameters of a trained model. Nothing in the file is executed.

    Args:
      path: a run folder (its newest checkpoint), one step of it (``RUN/checkpoints/2000``), both also on an object
        store (``gs://...``); a folder with ``model.safetensors`` and ``config.json``, or a safetensors file in the
        reference implementation's layout.
      ema: the moving average of the parameters, where there is one.
      modalities: the modality set, for files whose modalities have names that only you know. Runs say it themselves.
      tie_heads: keep one table for a modality's decoder tokens and its head, for files that hold two equal ones. Runs
        say it themselves.

    Raises:
      FileNotFoundError: nothing that could be a model is there; says what is looked for.
      ValueError: something is there and cannot be read; names the file and the key.
    """
    path = epath.Path(path)
    pickles = path.is_dir() and any(p.suffix in ml4m.PICKLES for p in path.iterdir())
    if path.is_file() or pickles or (path / ml4m.WEIGHTS).exists():
        if is_remote(path):
            raise ValueError(f"{path}: safetensors files are read from a disk only; copy the model to this machine")
        return _from_reference(pathlib.Path(path), ema, modalities, tie_heads)
    if run := run_of(path):
        if modalities is not None or tie_heads is not None:
            raise ValueError(f"{path} is a run, which has modalities and heads of its own: leave out both options")
        params, meta = checkpoint.load_params(*run, ema=ema)
        return LoadedModel(checkpoint.model_of(meta), ModalitySet.from_dict(meta["modalities"]), params, meta)
    raise FileNotFoundError(
        f"{path} is no model: expected a run folder (with checkpoints/), one of its steps, a folder with "
        f"{ml4m.WEIGHTS}, or a .safetensors file"
    )


def run_of(path: str | os.PathLike) -> tuple[epath.Path, int | None] | None:
    """The run folder and step that a path means; None if it is neither a run nor a step."""
    path = checkpoint.run_folder(path)
    if (path / "checkpoints").is_dir():
        return path, None
    if path.name == "checkpoints" and path.is_dir():
        return path.parent, None
    if path.name.isdecimal() and path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, int(path.name)
    return None


def _from_reference(
    path: pathlib.Path, ema: bool, modalities: ModalitySet | None, tie_heads: bool | None
) -> LoadedModel:
    source = ml4m.Source(path, modalities, tie_heads=tie_heads)
    try:
        params = source.load_ema() if ema else source.load().params
    finally:
        source.close()
    return LoadedModel(source.config, source.modalities, params, {"origin": {"format": "ml-4m", "path": str(path)}})
