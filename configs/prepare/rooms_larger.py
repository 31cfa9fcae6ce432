r"""Rooms at 128 pixels with the codes of their pictures at 64 and at 128 pixels, for configs/rooms_larger.py.

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
        "tok_rgb@64": dict(make="codes", input="rgb", tokenizer=f"{TOKENIZERS}/rgb.safetensors"),
        "tok_rgb@128": dict(make="codes", input="rgb", tokenizer=f"{PACKS}/rgb.safetensors"),
        "caption": dict(make="caption", max_tokens=40),
    }
    return c
