r"""The longer recipe on the built-in rooms: five times the pictures, a larger model; about an hour on two CPU cores.

Prepare:  4,000 more rooms (the furniture catalogues are in Debian's package sweethome3d-furniture), then tokens of all:
          python -m data_pipelines.rooms.generate --out=data/packs --count=4000 --seed=1 --processes=2
          python -m data_pipelines.rooms.prepare --out=data/rooms_long \
              --pack=data_pipelines/rooms/pack/rooms_train.zip --pack=data/packs/rooms_train-00000-of-00002.zip \
              --pack=data/packs/rooms_train-00001-of-00002.zip --pack=data_pipelines/rooms/pack/rooms_val.zip
Command:  FM4M_ROOMS=data/rooms_long python -m fm4m.train --config=configs/rooms_long.py --workdir=runs/rooms_long
Cost:     rooms 4 minutes, tokens 4 minutes, training 55 to 77 minutes on two CPU cores that had
          other work, too.
Expect:   validation loss of depth 3.38, normals 2.72, semantic classes 2.40, where their token frequencies alone reach
          4.69, 4.41 and 4.05; captions 1.74, boxes 3.44.
"""

from fm4m import recipes


def get_config():
    c = recipes.rooms_pretraining()
    c.model.dim = 192
    c.model.encoder_depth = 4
    c.model.decoder_depth = 3
    c.model.num_heads = 3

    c.train.global_batch = 32
    c.train.total = "1200 steps"
    # Peak learning rate 2e-3 at batch 32.
    c.optimizer.blr = 1.6e-2
    c.optimizer.warmup = "100 steps"

    c.checkpoint.every = 300
    c.eval.every = 300
    c.log.every = 50
    c.log.pictures_every = 300
    return c
