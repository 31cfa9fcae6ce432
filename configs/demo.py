"""The demo: a small 4M on the built-in rooms, from the shipped tokens to a picture.

Command:  make demo   (or: python -m data_pipelines.rooms.prepare --out=data/rooms
                       python -m fm4m.train --config=configs/demo.py --workdir=runs/demo)
Cost:     less than five minutes of training on two CPU cores; no accelerator.
Expect:   a table in which every modality's validation loss ends below its start, and depth, normals and semantic
          classes below what their token frequencies alone reach; and a picture of what RGB alone predicts.
"""

from fm4m import recipes


def get_config():
    c = recipes.rooms_pretraining()
    c.model.dim = 128
    c.model.encoder_depth = 3
    c.model.decoder_depth = 2
    c.model.num_heads = 2

    c.train.global_batch = 16
    c.train.total = "550 steps"
    # Peak learning rate 2.5e-3 at batch 16.
    c.optimizer.blr = 4e-2
    c.optimizer.warmup = "50 steps"

    c.checkpoint.every = 275
    c.eval.every = 275
    c.log.every = 50
    return c
