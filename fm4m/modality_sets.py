"""The modality sets of the released 4M models: seven modalities (4M-7), twenty-one (4M-21), and super-resolution.

Names, vocabularies, lengths and grids are those of the reference implementation; the order of a set has no meaning to
the model. "@224" is the edge of the image in pixels; patches are 16 pixels wide, 14 for DINOv2 and ImageBind, whose
global features are 16 codes without a place in the image.
"""

from __future__ import annotations

from fm4m.modalities import Modality, ModalitySet, unknown_name

TEXT_VOCABULARY = 30000

# Codes of every tokenizer with a grid.
_CODES = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}


def _pixels(size: int) -> Modality:
    return Modality(f"rgb@{size}", "pixels", grid=(size // 16, size // 16), patch_size=16, channels=3)


def _codes(size: int) -> tuple[Modality, ...]:
    grid = (size // 16, size // 16)
    return tuple(Modality(f"tok_{name}@{size}", "tokens", codes, grid) for name, codes in _CODES.items())


def _text(name: str, length: int, **fields) -> Modality:
    return Modality(name, "sequence", TEXT_VOCABULARY, max_tokens=length, **fields)


_SEVEN = (_pixels(224), *_codes(224), _text("caption", 256), _text("det", 256))
_LARGE = (_pixels(448), *_codes(448))
_TWENTY_ONE = (
    # States of a T5-XXL encoder; an input only.
    Modality("t5_caption", "embedding", max_tokens=77, channels=4096),
    _text("metadata", 40),
    # 263 positions for 275 tokens: the reference's tables, kept because released weights were trained with them.
    _text("human_poses", 275, max_positions=263),
    _text("color_palette", 23),
    _text("sam_instance", 290),
    *(Modality(f"tok_{name}_edge@224", "tokens", 8192, (14, 14)) for name in ("canny", "sam")),
    *(Modality(f"tok_{name}@224", "tokens", 8192, (16, 16)) for name in ("dinov2", "imagebind")),
    *(
        Modality(f"tok_{name}_global", "tokens", 8192, (4, 4), learned_positions=True)
        for name in ("dinov2", "imagebind")
    ),
)

MOD7 = ModalitySet(_SEVEN)
MOD21 = ModalitySet((*_SEVEN, *_TWENTY_ONE))
# Everything at 224 and 448 pixels in, the codes at 448 pixels out.
MOD7_SUPER_RESOLUTION = ModalitySet((*_SEVEN, *_LARGE), outputs=tuple(m.name for m in _LARGE if m.discrete))

SETS = {"mod7": MOD7, "mod21": MOD21, "mod7_sr": MOD7_SUPER_RESOLUTION}

RELEASED = {m.name: m for m in (*_SEVEN, *_TWENTY_ONE, *_LARGE)}


def released(name: str) -> Modality:
    """The modality of the released models with that name. Raises KeyError naming the nearest one."""
    if name not in RELEASED:
        raise KeyError(unknown_name(name, RELEASED, "modality of the released 4M models"))
    return RELEASED[name]
