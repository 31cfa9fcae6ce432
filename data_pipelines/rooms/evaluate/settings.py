"""How every target of the evaluation is generated: the presets, with these changes.

Chosen on 160 rooms of training furniture that no model was trained on (`data_pipelines.rooms.generate --seed=977`), not
on the held-out rooms that are reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fm4m.generate import presets
from fm4m.generate.generator import Target
from fm4m.generate.session import Session, known_modalities
from fm4m.modalities import ModalitySet

PIXELS, RGB, CAPTION, BOXES = "rgb@64", "tok_rgb@64", "caption", "det"
DEPTH, NORMAL, SEMSEG, FEATURES = "tok_depth@64", "tok_normal@64", "tok_semseg@64", "tok_imnet@64"

# What each experiment generates. From RGB every target is generated from the picture alone, so that errors of one do
# not enter the others; from a caption each is a condition of the next.
TARGETS = {
    "rgb": (DEPTH, NORMAL, SEMSEG, BOXES, CAPTION),
    "caption": (SEMSEG, DEPTH, NORMAL, RGB, BOXES),
    "edit": (RGB,),
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "rgb": {},
    "caption": {},
    "edit": {},
}


def plans(modalities: ModalitySet, experiment: str, given: Sequence[str], asked: Mapping[str, str]) -> list[Target]:
    """The targets of an experiment in order, with what the user asked for: "EXPERIMENT.TARGET.KEY" to a text.

    Raises:
      ValueError: a setting of no such experiment, target or key, or a value that it cannot have.
    """
    out = []
    for name in TARGETS[experiment]:
        plan = dataclasses.replace(presets.target(modalities, name, given), **CHANGES[experiment].get(name, {}))
        prefix = f"{experiment}.{presets.base_name(name).removeprefix('tok_')}."
        out.append(presets.changed(plan, {k.removeprefix(prefix): v for k, v in asked.items() if k.startswith(prefix)}))
    return out


def check(asked: Mapping[str, str]) -> None:
    """Raises ValueError for a setting that no target of any experiment would get."""
    known = [f"{e}.{presets.base_name(n).removeprefix('tok_')}" for e, names in TARGETS.items() for n in names]
    for key in asked:
        if key.rpartition(".")[0] not in known:
            raise ValueError(f"--set {key}: expected EXPERIMENT.TARGET.KEY, beginning with one of {', '.join(known)}")


def in_words(plan: Target) -> str:
    """The settings of a target in a few words, for the head of the report."""
    parts = [plan.scheme or ("roar" if plan.name.startswith("tok_") else "left to right")]
    if plan.name.startswith("tok_"):
        parts.append(f"{plan.steps} step{'s' * (plan.steps > 1)}")
    falls = "" if plan.temperature_schedule == "constant" else f" {plan.temperature_schedule}"
    parts.append("greedy" if plan.temperature == 0 else f"temperature {plan.temperature:g}{falls}")
    if plan.temperature and 0 < plan.top_p < 1:
        parts.append(f"top-p {plan.top_p:g}{' tempered' * plan.tempered}")
    if plan.top_k:
        parts.append(f"top-k {plan.top_k:g}")
    if plan.guidance != 1:
        parts.append(f"guidance {plan.guidance:g}")
    return ", ".join(parts)


def check_model(session: Session) -> None:
    """Raises ValueError naming the modality that a model lacks, or that has no tokenizer."""
    m = session.modalities
    needed = {"input": (PIXELS, RGB, CAPTION), "output": tuple(dict.fromkeys(n for t in TARGETS.values() for n in t))}
    for side, names in needed.items():
        missing = [n for n in names if n not in (m.inputs if side == "input" else m.outputs)]
        if missing:
            raise ValueError(
                f"the model has no {side} {', '.join(missing)}, which this evaluation needs; its {known_modalities(m)}"
            )
    for name in needed["output"]:
        if name not in session.showers:
            kind = {CAPTION: "text", BOXES: "boxes"}.get(name, "image")
            raise ValueError(f"{name} has no tokenizer: pass --tokenizer={name}={kind}:FILE")
