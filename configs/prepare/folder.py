"""A folder of pictures with captions, for models of 64 pixels.

Command:  python -m data_pipelines.prepare --config=configs/prepare/folder.py --config.source.path=PHOTOS --out=DATA
          (--processes=8 on a larger machine; the same command resumes what was cut off)
Expect:   token files under DATA, a report of what could not be used, and the module that registers the mixture.
"""

from data_pipelines.prepare import config

TOKENIZERS = "data_pipelines/rooms/tokenizers"


def get_config():
    c = config.default()
    c.name = "my_photos"
    # cat.jpg has its caption in cat.txt or cat.json beside it; captions="captions.csv" reads a table instead.
    c.source = dict(kind="folder", path="photos")
    c.validation.share = 0.05
    # The centred square and one random crop of every picture.
    c.crops.count = 2

    c.modalities = {
        "rgb@64": dict(make="pixels", size=64, patch_size=8),
        "tok_rgb@64": dict(make="codes", tokenizer=f"{TOKENIZERS}/rgb.safetensors"),
        # Its text tokenizer is trained from the captions, since none is named here.
        "caption": dict(make="caption", max_tokens=64),
        "color_palette": dict(make="palette"),
        "metadata": dict(make="metadata"),
    }
    return c
