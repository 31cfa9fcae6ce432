r"""A super-resolution model of rooms: the codes of a picture at 128 pixels from its pixels at 64.

Prepare:  rooms at 128 pixels, their tokenizer (both: configs/tokenizers/rooms128.py), then
          python -m data_pipelines.prepare --config=configs/prepare/rooms_larger.py --out=data/rooms_larger
Command:  python -m fm4m.train --config=configs/rooms_larger.py --workdir=runs/rooms_larger
Then:     python -m fm4m.generate --model=runs/rooms_long --inputs caption="a kitchen with a table" --targets=rgb \
              --out=small
          python -m fm4m.generate --model=runs/rooms_larger --codes=small/codes.npz \
              --inputs rgb=small/tok_rgb@64-0.png --targets=tok_rgb@128 --out=large
Cost:     tokens 2 minutes, training 36 minutes on two CPU cores that had other work, too.
Expect:   validation loss 3.62, where the codes' frequencies alone reach 6.67.
"""

from fm4m import recipes


def get_config():
    c = recipes.rooms_pretraining()
    c.data.mixture = "rooms_larger"
    c.data.modules = ("data_pipelines.mixtures.rooms_larger",)
    c.model.dim = 128
    c.model.encoder_depth = 3
    c.model.decoder_depth = 3
    c.model.num_heads = 2

    c.train.global_batch = 16
    c.train.total = "2400 steps"
    # Peak learning rate 2e-3 at batch 16.
    c.optimizer.blr = 3.2e-2
    c.optimizer.warmup = "100 steps"

    c.checkpoint.every = 400
    c.eval.every = 800
    c.log.every = 50
    c.log.picture_inputs = ("rgb@64",)
    c.log.picture_tokenizers = (
        "tok_rgb@128=image:data/rooms128/rgb.safetensors",
        "caption=text:data_pipelines/rooms/tokenizers/text.json",
    )
    return c
