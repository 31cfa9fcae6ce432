"""Tokenizers: arrays and text to sequences of integers and back.

    io.load(path)              a Tokenizer for one modality, from our or the reference implementation's safetensors file
    text.TextTokenizer.load    WordPiece with the special-token layout of 4M
    train                      python -m fm4m.tokenizers.train --config=configs/tokenizers/rooms.py:rgb --out=...
    train_text                 python -m fm4m.tokenizers.train_text --pack=... --out=text.json

Nothing is imported here, so that a data-loading process that needs `text` does not pay for JAX. What writes boxes,
poses and other records as text is `fm4m.transforms`.
"""
