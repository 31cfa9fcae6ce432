"""The configuration of a model as the reference implementation stores it, and as ours.

It is stored twice: as JSON beside the weights (``config.json``), and in the metadata of the safetensors file, where
every value is the text of a Python object (``"False"``, ``"['caption', 'det']"``, ``"SiLU"``) that the reference parses
as YAML. Here such a text is read as a literal; nothing is executed.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from fm4m.modalities import Modality, ModalitySet
from fm4m.modality_sets import RELEASED, released
from fm4m.model import ModelConfig

log = logging.getLogger("fm4m")

# Field of the reference's configuration -> field of ours, for those that mean the same.
_SAME = {
    "dim": "dim", "encoder_depth": "encoder_depth", "decoder_depth": "decoder_depth", "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio", "gated_mlp": "gated_mlp", "qkv_bias": "qkv_bias", "proj_bias": "proj_bias",
    "mlp_bias": "mlp_bias", "norm_bias": "norm_bias", "qk_norm": "qk_norm",
    "num_register_tokens": "num_register_tokens", "decoder_sep_mask": "decoder_sep_mask",
    "decoder_causal_mask": "decoder_causal_mask", "share_modality_embeddings": "share_modality_embeddings",
}  # fmt: skip
# What the reference's class assumes where a file does not say (4M-7's files say nothing of the last).
_DEFAULTS = {
    "mlp_ratio": 4.0, "gated_mlp": False, "qkv_bias": True, "proj_bias": True, "mlp_bias": True, "norm_bias": True,
    "qk_norm": False, "num_register_tokens": 0, "decoder_sep_mask": True, "decoder_causal_mask": False,
    "share_modality_embeddings": True, "act_layer": "GELU", "image_size": 224, "patch_size": 16,
}  # fmt: skip
# Fields of ours that the reference has no name for.
OWN_FIELDS = {f.name for f in dataclasses.fields(ModelConfig)} - set(_SAME.values()) - {"activation"}
_NEEDED = ("domains_in", "domains_out", "dim", "encoder_depth", "decoder_depth", "num_heads")
_ACTIVATIONS = {"SiLU": "silu", "GELU": "gelu"}
# Said in files, and without a meaning for weights: what wrote them, and regularisation that is off when running.
_IRRELEVANT = {
    "format", "drop_path_rate_encoder", "drop_path_rate_decoder", "shared_drop_path", "use_act_checkpoint",
}  # fmt: skip
_LONGEST_VALUE = 10_000  # characters; the reference's own limit


class FormatError(ValueError):
    """A file of the reference's format that cannot be read as a model; the message names the file and the key."""


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """A configuration in the reference's terms, with every field present.

    Attributes:
      fields: by the reference's names, typed.
    """

    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def to_metadata(self) -> dict[str, str]:
        """The texts that the metadata of a safetensors file holds."""
        return {name: str(value) for name, value in self.fields.items()}

    def model_config(self, **overrides: Any) -> ModelConfig:
        """Our configuration; heads are untied, as in a stored model. Raises FormatError naming a bad field."""
        try:
            fields = {ours: self.fields[theirs] for theirs, ours in _SAME.items()}
            fields["activation"] = _ACTIVATIONS[self.fields["act_layer"]]
            return ModelConfig(**(fields | {"tied_heads": False} | overrides))
        except (ValueError, TypeError) as error:
            raise FormatError(f"the configuration makes no model: {error}") from error


def parse(values: Mapping[str, Any], where: str) -> ReferenceConfig:
    """Reads a configuration from typed values (JSON) or texts (a file's metadata).

    Args:
      values: by the reference's names. Keys that hold a dot are names of shared tensors and left alone; keys that mean
        nothing for weights are left alone; others that are not known are reported in the log.
      where: the file, for messages.

    Raises FormatError naming the field that is missing, unreadable or of another type.
    """
    fields = dict(_DEFAULTS)
    for name, value in values.items():
        if name in _NEEDED or name in _DEFAULTS:
            fields[name] = _typed(name, literal(value, name, where) if isinstance(value, str) else value, where)
        elif name == "allow_zero_attn":  # attention that may attend to nothing, never switched on in a released model
            if literal(value, name, where) if isinstance(value, str) else value:
                raise FormatError(f"{where}: {name} is set, which fm4m has no attention for")
        elif "." not in name and name not in _IRRELEVANT:
            log.warning("%s: configuration key %r is not known and has no effect", where, name)
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise FormatError(f"{where}: the configuration lacks {', '.join(missing)}")
    return ReferenceConfig(fields)


def from_model(config: ModelConfig, modalities: ModalitySet) -> ReferenceConfig:
    """The reference's configuration of one of our models."""
    fields = {theirs: getattr(config, ours) for theirs, ours in _SAME.items()}
    fields["act_layer"] = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    pixels = [m for m in modalities.modalities if m.kind == "pixels"]
    fields["image_size"] = pixels[0].grid[0] * pixels[0].patch_size if pixels else _DEFAULTS["image_size"]
    fields["patch_size"] = pixels[0].patch_size if pixels else _DEFAULTS["patch_size"]
    return ReferenceConfig(fields | {"domains_in": list(modalities.inputs), "domains_out": list(modalities.outputs)})


def modality_set(config: ReferenceConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> ModalitySet:
    """The modality set of a stored model: known names, with the sizes that the weights have.

    The lengths of sequences and embeddings are those of the released models: weights do not show them.

    Args:
      config: the stored configuration.
      shapes: of all tensors, by the reference's names.
      where: the file, for messages.

    Raises FormatError for a modality that is none of the released ones, and for weights that contradict its kind.
    """
    inputs, outputs = tuple(config["domains_in"]), tuple(config["domains_out"])
    found = {}
    for name in dict.fromkeys((*inputs, *outputs)):
        if name not in RELEASED:
            try:
                released(name)
            except KeyError as error:
                mend = "fm4m describes its own in fm4m.json beside the weights; for other files pass the modality set"
                raise FormatError(f"{where}: {error.args[0]} ({mend})") from None
        found[name] = _sized(released(name), name, shapes, where)
    # 4M-21 lists the states of its text encoder among the outputs, for which there is no decoder.
    return ModalitySet(tuple(found.values()), inputs, tuple(name for name in outputs if found[name].discrete))


def _sized(m: Modality, name: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> Modality:
    """The released modality with the vocabulary, grid and width of the weights."""

    def shape(*suffixes: str, rank: int) -> tuple[int, ...] | None:
        for side in ("encoder_embeddings", "decoder_embeddings"):
            for suffix in suffixes:
                key = f"{side}.{name}.{suffix}"
                if key in shapes:
                    if len(shapes[key]) != rank:
                        raise FormatError(f"{where}: {key} has shape {tuple(shapes[key])}; expected {rank} axes")
                    return tuple(shapes[key])
        return None

    changes: dict[str, Any] = {}
    if m.discrete and (table := shape("token_emb.weight", "to_logits.weight", rank=2)):
        changes["vocab_size"] = table[0]
    if m.grid and (positions := shape("pos_emb", rank=3)):
        edge = math.isqrt(positions[1])
        if edge * edge != positions[1]:
            raise FormatError(f"{where}: {name} has {positions[1]} positions, which is no square grid")
        changes |= {"grid": (edge, edge), "max_tokens": 0}
    if m.kind == "embedding" and (projection := shape("emb_proj.weight", rank=2)):
        changes["channels"] = projection[1]
    if m.kind == "pixels" and (projection := shape("proj.weight", rank=2)):
        patch = math.isqrt(projection[1] // m.channels)
        if patch * patch * m.channels != projection[1]:
            raise FormatError(f"{where}: {name} projects {projection[1]} values, which is no square patch of RGB")
        changes["patch_size"] = patch
    try:
        return dataclasses.replace(m, **changes)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError for anything else, naming the file."""
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def literal(text: str, name: str, where: str) -> Any:
    """The Python object that a text of a file's metadata spells; a text that spells none is returned as it is.

    Args:
      text: the value.
      name: its name, and
      where: the file, for messages.

    Raises FormatError for a text that is longer than the reference reads.
    """
    if len(text) > _LONGEST_VALUE:
        raise FormatError(f"{where}: the value of {name} has {len(text)} characters, at most {_LONGEST_VALUE} are read")
    # YAML's spellings of constants; the rest of what the reference writes are Python literals or plain words.
    plain = {"true": True, "false": False, "null": None, "none": None}
    if text.strip().lower() in plain:
        return plain[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text.strip()


def _typed(name: str, value: Any, where: str) -> Any:
    if name in ("domains_in", "domains_out"):
        ok = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        ok = ok and len(set(value)) == len(value)
        wanted, result = "a list of different names", list(value) if ok else None
    elif name == "act_layer":
        # Some files hold the class's path.
        value = value.rsplit(".", 1)[-1].strip("'>") if isinstance(value, str) else value
        ok = isinstance(value, str) and value in _ACTIVATIONS
        wanted, result = f"one of {', '.join(_ACTIVATIONS)}", value
    elif name == "mlp_ratio":
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1000
        wanted, result = "a positive number", float(value) if ok else None
    elif isinstance(_DEFAULTS.get(name), bool):
        ok, wanted, result = isinstance(value, bool), "True or False", value
    else:
        # Bounds that no model reaches, so that a damaged file cannot ask for more memory than there is.
        least, most = (0, 4096) if name == "num_register_tokens" else (1, 65536)
        ok = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        wanted, result = f"a whole number from {least} to {most}", value
    if not ok:
        raise FormatError(f"{where}: {name} is {value!r}; expected {wanted}")
    return result
