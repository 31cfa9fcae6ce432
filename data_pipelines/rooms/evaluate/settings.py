"""How every target of the evaluation is generated: the presets, with these changes.

Chosen on 160 rooms of training furniture that no model was trained on (`data_pipelines.rooms.generate --seed=977`), not
on the held-out rooms that are reported.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from fm4m.generate import presets
from fm4m.generate.generator import Target
from fm4m.generate.session import Session, known_modalities
from fm4m.modalities import ModalitySet

PIXELS, RGB, CAPTION, BOXES = "rgb@64", "tok_rgb@64", "caption", "det"
DEPTH, NORMAL, SEMSEG, FEATURES = "tok_depth@64", "tok_normal@64", "tok_semseg@64", "tok_imnet@64"

# What each experiment is given, and what it generates. From RGB every target is generated from the picture alone, so
# that errors of one do not enter the others; from a caption each is a condition of the next.
GIVEN = {"rgb": (PIXELS,), "caption": (CAPTION,), "edit": (RGB, SEMSEG)}
TARGETS = {
    "rgb": (DEPTH, NORMAL, SEMSEG, BOXES, CAPTION),
    "caption": (SEMSEG, DEPTH, NORMAL, RGB, BOXES),
    "edit": (RGB,),
}
# The likeliest tokens in one step, without guidance: guidance of 2 makes depth 0.163 instead of 0.155 (AbsRel) and
# normals 27.5 instead of 23.5 degrees, eight steps 0.160 and 24.3 (64 rooms, 600 steps of configs/rooms_long.py).
_LIKELIEST = {"temperature": 0.0, "guidance": 1.0}
# From a caption the presets' temperatures, made for larger models, give noise. Frechet distance (see from_caption.py;
# 32 axes, 64 rooms, 1,200 steps): RGB alone at temperature 1 57, at 0.5 38; with classes, depth and normals first 18.
_CALM = {"temperature": 0.5, "temperature_schedule": "constant", "top_p": 0.9, "guidance": 2.0}
# Of a super-resolution model (larger.py), and through what the pictures go that it gets.
SMALL_RGB = pathlib.Path(__file__).parents[1] / "tokenizers" / "rgb.safetensors"
CALM_LARGER = {"steps": 8, "temperature": 0.0}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "rgb": dict.fromkeys(TARGETS["rgb"], _LIKELIEST),
    "caption": {**{n: {**_CALM, "steps": 8} for n in (SEMSEG, DEPTH, NORMAL)}, RGB: {**_CALM, "steps": 16},
                BOXES: _LIKELIEST},
    "edit": {RGB: {**_CALM, "temperature": 0.3, "guidance": 3.0, "steps": 8}},
}  # fmt: skip


def plans(modalities: ModalitySet, experiment: str, asked: Mapping[str, str]) -> list[Target]:
    """The targets of an experiment in order, with what the user asked for: "EXPERIMENT.TARGET.KEY" to a text.

    Raises:
      ValueError: a setting of no such experiment, target or key, or a value that it cannot have.
    """
    out = []
    for name in TARGETS[experiment]:
        plan = presets.target(modalities, name, GIVEN[experiment])
        plan = dataclasses.replace(plan, **CHANGES[experiment].get(name, {}))
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
    given, made = (tuple(dict.fromkeys(n for names in side.values() for n in names)) for side in (GIVEN, TARGETS))
    needed = {"input": given, "output": made}
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
