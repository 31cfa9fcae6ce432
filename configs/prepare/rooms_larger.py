r"""Rooms at 128 pixels: the codes of their pictures, and what a model for 64 pixels would show of them.

For configs/rooms_larger.py. The smaller pictures went through their tokenizer, as generated ones do.

Needs:    rooms at 128 pixels and their tokenizer, see configs/tokenizers/rooms128.py.
Command:  python -m data_pipelines.prepare --config=configs/prepare/rooms_larger.py --out=data/rooms_larger
"""

from data_pipelines.prepare import config

PACKS = "data/rooms128"
TOKENIZERS = "data_pipelines/rooms/tokenizers"


def get_config():
    c = config.default()
    c.name = "rooms_larger_128"
    c.source = dict(kind="rooms", path=f"{PACKS}/rooms_train.zip")
    c.validation.source = dict(kind="rooms", path=f"{PACKS}/rooms_val.zip")
    c.text.tokenizer = f"{TOKENIZERS}/text.json"
    c.modalities = {
        "rgb@64": dict(make="pixels", size=64, patch_size=8, through=f"{TOKENIZERS}/rgb.safetensors"),
        "tok_rgb@128": dict(make="codes", input="rgb", tokenizer=f"{PACKS}/rgb.safetensors"),
        "caption": dict(make="caption", max_tokens=40),
    }
    return c
