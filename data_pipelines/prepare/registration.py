"""The module that makes a prepared set a mixture that training can name."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines.manifest import read_manifest
from fm4m.modalities import Modality

# Share of a full sample's tokens that each side gets, and its bounds; the released 4M-7 models have 128.
_SHARE, _LEAST, _MOST = 3, 8, 128


def module_text(name: str, out: str | os.PathLike, splits: Sequence[str]) -> str:
    """The text of a Python module that registers a set's modalities, one task and one mixture.

    Args:
      name: of task and mixture.
      out: the set's folder.
      splits: names of its splits.
    """
    out = pathlib.Path(out).absolute()
    modalities = modalities_of(out, splits)
    discrete = [m for m in modalities if m.discrete]
    lines = [
        f'"""The mixture {name!r}, as data_pipelines.prepare made it. Adapt the masking to what shall be learned."""',
        "",
        "from data_pipelines import registry",
        "from data_pipelines.sources import TokenSource",
        "from fm4m.masking import Masking, MaskingComponent",
        "from fm4m.modalities import Modality",
        "",
        f"ROOT = {str(out)!r}",
        "MODALITIES = (",
        *(f"    {_modality(m)}," for m in modalities),
        ")",
        "for modality in MODALITIES:",
        "    registry.add_modality(modality)",
        "",
        f"registry.add_task({name!r}, TokenSource(ROOT, {tuple(splits)!r}), [m.name for m in MODALITIES])",
    ]
    if not discrete:
        lines.append("# No modality has codes to predict: add one with make='codes' or a text before training.")
        return "\n".join(lines) + "\n"
    budget = max(_LEAST, min(_MOST, sum(m.max_tokens for m in discrete) // _SHARE // 8 * 8))
    pixels = [m.name for m in modalities if m.kind == "pixels"]
    components = ["MaskingComponent(inputs=0.5, targets=0.5)"]
    if pixels:
        components.insert(0, f"MaskingComponent(inputs={{{pixels[0]!r}: 1.0}}, targets=0.5)")
    lines += [
        "# Half of the samples show the picture alone, half show some of everything; any code may be asked for."
        if pixels
        else "# Samples show some of everything; any code may be asked for.",
        "MASKING = Masking(",
        f"    num_inputs={budget},",
        f"    num_targets={budget},",
        '    tasks={"*": (',
        *(f"        {component}," for component in components),
        "    )},",
        "    refill=True,",
        ")",
        f"registry.add_mixture({name!r}, [({name!r}, 1.0)], masking=MASKING)",
    ]
    return "\n".join(lines) + "\n"


def _modality(modality: Modality) -> str:
    fields = modality.to_dict()
    positional = [repr(fields.pop("name")), repr(fields.pop("kind"))]
    if "grid" in fields:
        fields["grid"] = tuple(fields["grid"])
    return f"Modality({', '.join([*positional, *(f'{key}={value!r}' for key, value in fields.items())])})"


def modalities_of(out: pathlib.Path, splits: Sequence[str]) -> list[Modality]:
    """The modalities that every split has."""
    manifests: list[Mapping] = [read_manifest(out, split)["modalities"] for split in splits]
    names = [name for name in manifests[0] if all(name in manifest for manifest in manifests)]
    return [Modality.from_dict(manifests[0][name]["modality"]) for name in sorted(names)]


def instructions(name: str, text: str, path: pathlib.Path, splits: Sequence[str]) -> str:
    """What a user does with the module: where it goes, and the command that trains on it.

    Args:
      name: of the mixture.
      text: the module's.
      path: a copy of it beside the set.
      splits: of the set.
    """
    target = f"data_pipelines/mixtures/{name}.py"
    evaluation = "" if "validation" in splits else f" --config.eval.split={splits[0]} --config.eval.samples=256"
    return (
        f"To train on it, copy this module to {target} (cp {path} {target}):\n\n{text}\n"
        "and name it, for example in a first small run:\n\n"
        f"  python -m fm4m.train --config=configs/demo.py --workdir=runs/{name} \\\n"
        f"    --config.data.mixture={name} \"--config.data.modules=('data_pipelines.mixtures.{name}',)\" \\\n"
        f'    "--config.log.picture_inputs=()" "--config.log.picture_tokenizers=()"{evaluation}\n'
    )
