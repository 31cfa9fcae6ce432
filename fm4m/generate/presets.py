"""Settings of the released models' demonstration, as targets (the reference implementation's `Demo4MSampler`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fm4m.generate.generator import Target
from fm4m.modalities import ModalitySet

TOP_P = 0.8
ORDER = (
    "tok_clip", "tok_imnet", "tok_dinov2", "tok_imagebind", "tok_depth", "tok_normal", "tok_semseg", "tok_canny_edge",
    "tok_sam_edge", "tok_rgb", "caption", "det", "human_poses", "sam_instance", "color_palette", "metadata",
)  # fmt: skip
_SEQUENCE_TEMPERATURE = {"caption": 0.3, "det": 0.3, "sam_instance": 0.01}
# What a user may set of a target by its name.
SETTINGS = tuple(f.name for f in dataclasses.fields(Target) if f.name not in ("name", "conditions"))
_FEATURES = ("tok_dinov2", "tok_imagebind")
# From here on a grid is generated at the larger resolution of a super-resolution model.
_LARGE_GRID = 784


def base_name(name: str) -> str:
    """The name without its resolution: tok_depth of tok_depth@224."""
    return name.partition("@")[0]


def in_order(names: Iterable[str]) -> list[str]:
    """Targets in the order in which the demonstration generates them; what it does not know comes last."""
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(names, key=lambda name: place.get(base_name(name), len(ORDER)))


def target(modalities: ModalitySet, name: str, given: Sequence[str]) -> Target:
    """How the demonstration generates a modality.

    With an RGB image among what is given every grid is predicted in one parallel step and almost greedily; without it,
    in several steps at temperatures that fall. Grids are guided, texts are not.
    """
    m, base = modalities[name], base_name(name)
    if m.kind == "sequence":
        return Target(name, temperature=_SEQUENCE_TEMPERATURE.get(base, 0.1), top_p=TOP_P)
    if m.max_tokens >= _LARGE_GRID:
        return Target(name, "maskgit", steps=8, temperature=1.0, top_p=TOP_P, guidance=2.0)
    if any(base_name(n) in ("rgb", "tok_rgb") for n in given):
        return Target(name, steps=1, temperature=0.01, top_p=TOP_P, guidance=2.0)
    falling = {"temperature_schedule": "onex:0.5:0.5", "top_p": TOP_P}
    if base in ("tok_clip", "tok_imnet"):
        return Target(name, steps=50, temperature=5.0, guidance=3.0, **falling)
    if base in _FEATURES:
        return Target(name, steps=8, temperature=0.01, guidance=2.0, top_p=TOP_P)
    return Target(name, steps=25 if base == "tok_rgb" else 8, temperature=3.0, guidance=2.0, **falling)


def changed(target: Target, settings: Mapping[str, str]) -> Target:
    """A target with settings from a command line, their values as texts.

    Raises:
      ValueError: there is no such setting, or the text is not of its type.
    """
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in SETTINGS:
            raise ValueError(f"--set: there is no setting {key!r}; known: {', '.join(SETTINGS)}")
        kind = type(getattr(target, key))
        try:
            values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            wanted = "true or false" if kind is bool else kind.__name__
            raise ValueError(f"--set: {key}={text!r} is no {wanted}") from None
    return dataclasses.replace(target, **values)
