"""Models as the reference implementation (and its users on Hugging Face) store them.

A folder holds ``model.safetensors`` (weights, with the configuration and the names of shared tensors in its metadata)
and ``config.json``. fm4m adds ``fm4m.json``, the exact modality set and model, which lets modalities that the reference
does not know come back; ``ema.safetensors`` and ``optimizer.safetensors`` where asked for. A single file will do for
reading if its metadata holds the configuration.

Heads that were tied are written as two tensors, as the reference's own class stores them; position tables and the zero
biases of its norms are written too, because it loads with strict keys.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fm4m.files import complete_folder
from fm4m.interop import reference_config, tensor_file
from fm4m.interop.layout import Layout
from fm4m.interop.reference_config import FormatError, read_json
from fm4m.modalities import ModalitySet
from fm4m.model import ModelConfig

WEIGHTS, CONFIG, DESCRIPTION, EMA, OPTIMIZER = (
    "model.safetensors", "config.json", "fm4m.json", "ema.safetensors", "optimizer.safetensors",
)  # fmt: skip
# Names of Adam's moments, ours and PyTorch's.
MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}

# Files that PyTorch writes by pickling.
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# How far a stored position may be from ours, by dtype. The reference computes in float32: one part in 2^24 of 511
# radians is 3e-5.
_ROUNDING = {"F64": 1e-4, "F32": 1e-4, "F16": 1e-3, "BF16": 8e-3}

Progress = Callable[[int], object]


@dataclasses.dataclass
class Model:
    """A model read from the reference's format.

    Attributes:
      config, modalities: what the weights belong to.
      params: numpy arrays.
      positions: the file's position tables by key, where their bytes differ from those that our formula gives (the
        reference computes them in float32, up to 2e-5 away at position 511). Kept so that a model that is imported and
        exported again is the same file.
    """

    config: ModelConfig
    modalities: ModalitySet
    params: dict[str, Any]
    positions: dict[str, np.ndarray]


class Source:
    """A stored model, opened and checked: every tensor is there with its shape, and none is left over.

    Args:
      path: a folder, or a safetensors file (then ``config.json`` and ``fm4m.json`` beside it count too).
      modalities: the modality set, for names that are not those of the released models, and for sequences of another
        length than theirs (weights do not show it).
      tie_heads: read the head of every modality as its decoder's token table; the file must hold them equal. Default:
        as ``fm4m.json`` says, else no.

    Raises:
      FileNotFoundError: there is no such file.
      TensorFileError: the file is truncated or damaged.
      FormatError: keys are missing or left over, shapes or configuration contradict each other; it names them.
    """

    def __init__(self, path: str | os.PathLike, modalities: ModalitySet | None = None, tie_heads: bool | None = None):
        path = pathlib.Path(path)
        self.path = path / WEIGHTS if path.is_dir() else path
        self._refuse_pickles()
        self.file = tensor_file.TensorFile(self.path)
        try:
            self.reference = self._read_config()
            beside = self.path.with_name(DESCRIPTION)
            described, own = read_description(beside) if beside.is_file() else (None, {})
            modalities = modalities or described
            self.modalities = modalities or reference_config.modality_set(
                self.reference, self.file.shapes, str(self.path)
            )
            self.config = self.reference.model_config(**own | ({} if tie_heads is None else {"tied_heads": tie_heads}))
            self.layout = Layout(self.config, self.modalities)
            self._check_keys()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.__exit__()

    def _refuse_pickles(self) -> None:
        folder = self.path.parent
        pickled = [self.path] if self.path.suffix in PICKLES else []
        if not self.path.exists():
            pickled += [p for p in sorted(folder.glob("*")) if p.suffix in PICKLES]
        if pickled and pickled[0].exists():
            raise FormatError(
                f"{pickled[0]} is a pickle, which could execute anything and is never opened; convert it to "
                "safetensors with the program that wrote it"
            )

    def _read_config(self) -> reference_config.ReferenceConfig:
        beside, where = self.path.with_name(CONFIG), str(self.path)
        # The metadata may hold anything; it is a configuration if it says how wide the model is.
        from_file = self.file.metadata if "dim" in self.file.metadata else {}
        if not beside.is_file():
            if not from_file:
                raise FormatError(f"{where} holds no configuration in its metadata, and there is no {CONFIG} beside it")
            return reference_config.parse(from_file, where)
        values = read_json(beside)
        config = reference_config.parse(values, str(beside))
        if from_file:
            inside = reference_config.parse(from_file, where)
            different = [k for k in config.fields if config[k] != inside[k]]
            if different:
                k = different[0]
                raise FormatError(
                    f"{k} is {config[k]!r} in {beside} but {inside[k]!r} in the metadata of {self.path}: they are of "
                    "two models"
                )
        return config

    def _check_keys(self) -> None:
        have, layout = self.file.shapes, self.layout
        for key in (*layout.parameters, *layout.buffers):
            if self._stored_as(key) is None:
                raise FormatError(f"{self.path} lacks {key}, which its configuration asks for ({_sizes(self.config)})")
        known = {*layout.parameters, *layout.buffers}
        extra = sorted(key for key in have if key not in known)
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise FormatError(
                f"{self.path} holds {extra[0]}{more}, which its configuration has no place for ({_sizes(self.config)})"
            )
        for key, shape in have.items():
            if shape != layout.shape(key):
                wanted = layout.shape(key)
                raise FormatError(f"{self.path}: {key} has shape {shape}; its configuration asks for {wanted}")

    def _stored_as(self, key: str) -> str | None:
        """The key that a file holds a tensor under: its own, one that the metadata names, or that of its twin."""
        candidates = (key, self.file.metadata.get(key), self.layout.twins.get(key))
        return next((name for name in candidates if name in self.file.shapes), None)

    def load(self, progress: Progress = lambda elements: None) -> Model:
        """Reads all tensors, one at a time, into arrays of our layout.

        Raises FormatError for constants that are not those of the format, and for tensors that should be equal.
        """
        params, positions, layout = self.layout.zeros(), {}, self.layout
        for key in (*layout.parameters, *layout.buffers):
            tensor = self.file.read(self._stored_as(key))
            if key in layout.buffers:
                self._check_buffer(key, tensor, positions)
            else:
                self._check_equal(key, tensor, self.file)
                layout.set(params, key, tensor)
            progress(tensor.size)
        return Model(self.config, self.modalities, params, positions)

    def _check_buffer(self, key: str, tensor: np.ndarray, positions: dict[str, np.ndarray]) -> None:
        ours = self.layout.buffer(key)
        is_table, rounding = key.endswith(".pos_emb"), _ROUNDING[self.file.dtypes[key]]
        if not np.allclose(tensor, ours, rtol=0, atol=rounding if is_table else 0):
            kind = f"what the formula of its positions ({self.config.grid_positions} for grids) gives"
            what = kind if is_table else "zero (norms have no bias here)"
            raise FormatError(f"{self.path}: {key} is not {what}; a model with other constants cannot be represented")
        if self.file.dtypes[key] == "F32" and tensor.tobytes() != ours.tobytes():
            positions[key] = tensor

    def _check_equal(self, key: str, tensor: np.ndarray, file: tensor_file.TensorFile, prefix: str = "") -> None:
        twin = self.layout.twins.get(key)
        # Each pair is looked at from one side.
        if twin is None or key > twin or prefix + twin not in file.shapes:
            return
        if not np.array_equal(tensor, file.read(prefix + twin)):
            what = "share_modality_embeddings is set" if key.endswith("mod_emb") else "tied heads were asked for"
            raise FormatError(f"{file.path}: {prefix}{key} and {prefix}{twin} differ, but {what}")

    def load_moments(self, progress: Progress = lambda elements: None) -> tuple[dict[str, Any], int]:
        """Adam's moments {"mu", "nu"} from ``optimizer.safetensors`` beside the weights, and their step."""
        path = self.path.with_name(OPTIMIZER)
        with tensor_file.TensorFile(path) as file:
            moments = {}
            for ours, theirs in MOMENTS.items():
                moments[ours] = self._read_like_params(file, f"{theirs}.", progress)
            step = file.metadata.get("step", "")
        if not step.isdecimal():
            raise FormatError(f"{path}: the metadata's step is {step!r}; expected a whole number")
        return moments, int(step)

    def load_ema(self, progress: Progress = lambda elements: None) -> dict[str, Any]:
        """The moving average of the parameters from ``ema.safetensors`` beside the weights."""
        with tensor_file.TensorFile(self.path.with_name(EMA)) as file:
            return self._read_like_params(file, "", progress)

    def _read_like_params(self, file: tensor_file.TensorFile, prefix: str, progress: Progress) -> dict[str, Any]:
        tree = self.layout.zeros()
        for key in self.layout.parameters:
            if key in self.layout.aliases:
                continue
            name = prefix + key
            if file.shapes.get(name) != self.layout.shape(key):
                found = file.shapes.get(name, "nothing")
                raise FormatError(f"{file.path}: {name} should have shape {self.layout.shape(key)}, found {found}")
            tensor = file.read(name)
            self._check_equal(key, tensor, file, prefix)
            self.layout.set(tree, key, tensor)
            progress(tensor.size)
        return tree


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    modalities: ModalitySet,
    params: Any,
    *,
    ema: Any = None,
    opt_state: Mapping[str, Any] | None = None,
    step: int = 0,
    positions: Mapping[str, np.ndarray] | None = None,
    progress: Progress = lambda elements: None,
) -> None:
    """Writes a model as a folder that the reference implementation loads.

    Everything is written beside the folder and put in place at the end, so that a failure leaves no part of it.

    Args:
      folder: must not exist, or be empty.
      config, modalities: of the model.
      params: its parameters (or their moving average, if that is what should be loaded).
      ema: also write this moving average, as ``ema.safetensors``.
      opt_state: also write Adam's moments {"mu", "nu"} with ``step``, as ``optimizer.safetensors``.
      positions: see `Model.positions`.
      progress: called with the number of elements written.

    Raises FileExistsError if the folder holds something.
    """
    layout, reference = Layout(config, modalities), reference_config.from_model(config, modalities)
    positions = dict(positions or {})

    def tensor(key: str) -> np.ndarray:
        if key in layout.buffers:
            return positions[key] if key in positions else layout.buffer(key)
        return layout.get(params, key).astype(np.float32, copy=False)

    with complete_folder(folder) as beside:
        shapes = {key: layout.shape(key) for key in layout.stored}
        metadata = {"format": "pt", **layout.aliases, **reference.to_metadata()}
        tensor_file.write(beside / WEIGHTS, shapes, tensor, metadata, progress)
        trained = {key: shapes[key] for key in layout.stored if key not in layout.buffers}
        if ema is not None:
            tensor_file.write(beside / EMA, trained, lambda key: layout.get(ema, key), {}, progress)
        if opt_state is not None:
            prefixes = {theirs: opt_state[ours] for ours, theirs in MOMENTS.items()}
            moments = {f"{prefix}.{key}": shape for prefix in prefixes for key, shape in trained.items()}

            def moment(name: str) -> np.ndarray:
                prefix, _, key = name.partition(".")
                return layout.get(prefixes[prefix], key)

            tensor_file.write(beside / OPTIMIZER, moments, moment, {"step": str(step)}, progress)
        (beside / CONFIG).write_text(json.dumps(dict(reference.fields), indent=2) + "\n")
        described = {"modalities": modalities.to_dict(), "model": dataclasses.asdict(config)}
        (beside / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def read_description(path: str | os.PathLike) -> tuple[ModalitySet, dict[str, Any]]:
    """What ``fm4m.json`` says: the modality set, and the model's fields that the reference has no names for.

    Raises FormatError if it does not, FileNotFoundError if there is none.
    """
    try:
        described = read_json(pathlib.Path(path))
        own = {k: v for k, v in described["model"].items() if k in reference_config.OWN_FIELDS}
        return ModalitySet.from_dict(described["modalities"]), own
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} describes no model: {error}") from error


def _sizes(config: ModelConfig) -> str:
    return f"{config.encoder_depth} + {config.decoder_depth} layers of width {config.dim}"
