"""4M-B on seven modalities (198M parameters without tables): the released recipe of the reference implementation.

Command:  python -m fm4m.train --config=configs/4m_b.py --workdir=runs/4m_b
Prepare:  a module that registers the mixture "mod7" with your data, named in --config.data.modules; what it must hold
          is said in fm4m.recipes.mod7_pretraining.
Cost:     the reference took 64 A100 x 1.5 days (2,304 GPU hours, 15.1k samples/s). Never run on a TPU by us.
Expect:   239,120 steps, peak learning rate 3.2e-3 after 4,769 steps of warm-up. We have
          measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import recipes


def get_config():
    return recipes.mod7_pretraining("fm_base_12e_12d_swiglu_nobias")
