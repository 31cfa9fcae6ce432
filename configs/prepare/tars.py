"""Tar shards in the reference's layout, one tar a modality: ROOT/rgb/00000.tar, ROOT/caption/00000.tar, ...

Command:  python -m data_pipelines.prepare --config=configs/prepare/tars.py --out=DATA --processes=8 \
              "--config.source.path=ROOT/[rgb,caption,det]/*.tar"
Expect:   token files under DATA for models of 64 pixels; for 224 pixels, name tokenizers of that size.
"""

from data_pipelines.prepare import config

TOKENIZERS = "data_pipelines/rooms/tokenizers"


def get_config():
    c = config.default()
    c.name = "my_shards"
    # Without brackets, "ROOT/*.tar" are shards that hold all modalities of a sample (WebDataset).
    c.source = dict(kind="tars", path="shards/[rgb,caption,det]/*.tar")
    c.validation.share = 0.01

    c.text.tokenizer = f"{TOKENIZERS}/text.json"
    c.modalities = {
        "rgb@64": dict(make="pixels", size=64, patch_size=8),
        "tok_rgb@64": dict(make="codes", tokenizer=f"{TOKENIZERS}/rgb.safetensors"),
        # A shard's depth would be its input; a label computed by a network of yours is one, too:
        #   "tok_depth@64": dict(make="codes", tokenizer=..., label=dict(kind="onnx", model="depth.onnx", ...)),
        # and shards that hold codes already, with their crop_settings, keep both:
        #   "tok_depth@224": dict(make="stored_codes", input="tok_depth", vocab_size=8192, grid=(14, 14)),
        "caption": dict(make="caption", max_tokens=64),
        "det": dict(make="boxes", max_tokens=96),
        "color_palette": dict(make="palette"),
    }
    return c
