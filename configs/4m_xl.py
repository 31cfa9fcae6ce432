"""4M-XL on seven modalities (2.8B parameters without tables): the released recipe of the reference implementation.

Command:  python -m fm4m.train --config=configs/4m_xl.py --workdir=runs/4m_xl
Prepare:  a module that registers the mixture "mod7" with your data, named in data.modules below: pixels rgb@224 (input
          only), tok_rgb@224 (vocabulary 16,384), tok_depth@224, tok_normal@224, tok_clip@224 (8,192 each),
          tok_semseg@224 (4,096), caption and det (30,000 each, at most 256 tokens), and the masking recipe: for half of
          the samples all inputs from rgb@224, for half from every modality with Dirichlet concentration 0.5; targets
          always with 0.5.
Cost:     the reference took 128 A100 x 8 days (24,576 GPU hours, 2.83k samples/s). Never run on a TPU by us.
Expect:   239,120 steps, peak learning rate 6.4e-4 after 4,769 steps of warm-up. We
          have measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import config as config_lib


def get_config():
    c = config_lib.default()
    c.model.name = "fm_xlarge_24e_24d_swiglu_nobias"
    # Activations do not fit otherwise; the loop over layers keeps compilation short.
    c.model.remat = "residual"
    c.data.mixture = "mod7"
    c.data.modules = ()
    c.data.num_inputs = 128
    c.data.num_targets = 128

    c.train.global_batch = 8192
    c.train.total = "500B tokens"
    c.train.epoch_samples = config_lib.REFERENCE_EPOCH_SAMPLES
    c.optimizer.blr = 2e-5
    c.optimizer.warmup = "10B tokens"
    c.optimizer.clip_norm = 3.0

    c.checkpoint.every = 1220
    c.checkpoint.keep_period = 20 * 1220
    c.eval.every = 1220
    c.eval.samples = 49152
    c.log.every = 50
    return c
