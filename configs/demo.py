"""The demo: a small 4M on the built-in rooms, from the shipped tokens to a picture.

Command:  make demo   (or: python -m data_pipelines.rooms.prepare --out=data/rooms
                       python -m fm4m.train --config=configs/demo.py --workdir=runs/demo)
Cost:     less than five minutes of training on two CPU cores; no accelerator.
Expect:   a table in which every modality's validation loss ends below its start, and depth, normals and semantic
          classes below what their token frequencies alone reach; and a picture of what RGB alone predicts.
"""

from fm4m import config as config_lib

TOKENIZERS = "data_pipelines/rooms/tokenizers"


def get_config():
    c = config_lib.default()
    c.data.mixture = "rooms"
    c.data.modules = ("data_pipelines.mixtures.rooms",)

    c.model.name = "fm_tiny_6e_6d_swiglu_nobias"
    c.model.dim = 128
    c.model.encoder_depth = 3
    c.model.decoder_depth = 2
    c.model.num_heads = 2
    c.model.attention_init = "aligned"
    c.model.grid_positions = "fourier"
    # CPUs have no fast bfloat16 products.
    c.model.dtype = "float32"

    c.train.global_batch = 16
    c.train.total = "550 steps"
    # The mean over tokens: the mean over modalities gives captions and boxes two sevenths of the loss for few targets.
    c.train.loss = "token"
    # Peak learning rate 2.5e-3 at batch 16.
    c.optimizer.blr = 4e-2
    c.optimizer.warmup = "50 steps"
    c.optimizer.clip_norm = 3.0

    c.checkpoint.every = 275
    c.eval.every = 275
    c.eval.batch = 64
    c.log.every = 50
    c.log.picture_inputs = ("rgb@64",)
    c.log.picture_tokenizers = (
        f"tok_rgb@64=image:{TOKENIZERS}/rgb.safetensors",
        f"tok_depth@64=image:{TOKENIZERS}/depth.safetensors",
        f"tok_normal@64=image:{TOKENIZERS}/normal.safetensors",
        f"tok_semseg@64=image:{TOKENIZERS}/semseg.safetensors",
        f"tok_imnet@64=image:{TOKENIZERS}/features.safetensors",
        f"caption=text:{TOKENIZERS}/text.json",
        f"det=boxes:{TOKENIZERS}/text.json",
    )
    return c
