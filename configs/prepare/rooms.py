"""The built-in rooms with their exact labels, as an example of a source that has depth, normals, classes and boxes.

Command:  python -m data_pipelines.prepare --config=configs/prepare/rooms.py --out=data/my_rooms --processes=2
Expect:   the tokens that data_pipelines.rooms.prepare writes for the same modalities, in about two minutes.
"""

from data_pipelines.prepare import config

PACKS = "data_pipelines/rooms/pack"
TOKENIZERS = "data_pipelines/rooms/tokenizers"


def get_config():
    c = config.default()
    c.name = "my_rooms"
    c.source = dict(kind="rooms", path=f"{PACKS}/rooms_train.zip")
    c.validation.source = dict(kind="rooms", path=f"{PACKS}/rooms_val.zip")
    c.text.tokenizer = f"{TOKENIZERS}/text.json"

    c.modalities = {
        f"tok_{name}@64": dict(make="codes", input=name, tokenizer=f"{TOKENIZERS}/{name}.safetensors")
        for name in ("rgb", "depth", "normal", "semseg")
    }
    c.modalities["rgb@64"] = dict(make="pixels", size=64, patch_size=8)
    c.modalities["caption"] = dict(make="caption", max_tokens=40)
    c.modalities["det"] = dict(make="boxes", max_tokens=84)
    return c
