"""The modalities of the prepared rooms, and the folder of their token files. Free of SeqIO: it imports quickly."""

from __future__ import annotations

import os
import pathlib

from fm4m.modalities import Modality, register

# Folder of the token files, one place for the command that writes them and the mixtures that read them.
ROOT = pathlib.Path(os.environ.get("FM4M_ROOMS", "data/rooms")).absolute()

GRID = (8, 8)
# Codebook of every image tokenizer, and vocabulary of the text tokenizer, in data_pipelines/rooms/tokenizers.
CODES = 1024
WORDS = 4736

MODALITIES = tuple(
    register(modality).name
    for modality in (
        # What the encoder sees of the image itself, as in 4M; never predicted.
        Modality("rgb@64", "pixels", grid=GRID, patch_size=8, channels=3),
        Modality("tok_rgb@64", "tokens", vocab_size=CODES, grid=GRID),
        Modality("tok_depth@64", "tokens", vocab_size=CODES, grid=GRID),
        Modality("tok_normal@64", "tokens", vocab_size=CODES, grid=GRID),
        Modality("tok_semseg@64", "tokens", vocab_size=CODES, grid=GRID),
        # Features of an ImageNet classifier (EfficientNet-lite0), in the place that CLIP features have in 4M.
        Modality("tok_imnet@64", "tokens", vocab_size=CODES, grid=GRID),
        Modality("caption", "sequence", vocab_size=WORDS, max_tokens=40),
        # Five or six tokens a box; the fullest sample of the shipped packs has 16 boxes in 81 tokens, the median 37.
        Modality("det", "sequence", vocab_size=WORDS, max_tokens=84),
    )
)
