"""The modalities of the prepared rooms, and the folder of their token files. Free of SeqIO: it imports quickly."""

from __future__ import annotations

import os
import pathlib

from fm4m.modalities import Modality, register

# Folder of the token files, one place for the command that writes them and the mixtures that read them.
ROOT = pathlib.Path(os.environ.get("FM4M_ROOMS", "data/rooms")).absolute()

GRID = (8, 8)
# Vocabularies of the tokenizers in data_pipelines/rooms/tokenizers. Surfaces need few codes: with 128 instead of 512,
# normals of earlier tokenizers were off by 11.0 instead of 10.4 degrees, and a model learns to predict them from far
# fewer pictures.
CODES = {"tok_rgb@64": 1024, "tok_depth@64": 128, "tok_normal@64": 128, "tok_semseg@64": 128, "tok_imnet@64": 1024}
WORDS = 4736

MODALITIES = tuple(
    register(modality).name
    for modality in (
        # What the encoder sees of the image itself, as in 4M; never predicted.
        Modality("rgb@64", "pixels", grid=GRID, patch_size=8, channels=3),
        # tok_imnet holds features of an ImageNet classifier (EfficientNet-lite0), in the place of 4M's CLIP features.
        *(Modality(name, "tokens", vocab_size=size, grid=GRID) for name, size in CODES.items()),
        Modality("caption", "sequence", vocab_size=WORDS, max_tokens=40),
        # Five or six tokens a box; the fullest sample of the shipped packs has 16 boxes in 81 tokens, the median 37.
        Modality("det", "sequence", vocab_size=WORDS, max_tokens=84),
    )
)
