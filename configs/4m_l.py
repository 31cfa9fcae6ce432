"""4M-L on seven modalities (705M parameters without tables): the released recipe of the reference implementation.

Command:  python -m fm4m.train --config=configs/4m_l.py --workdir=runs/4m_l
Prepare:  a module that registers the mixture "mod7" with your data, named in --config.data.modules; what it must hold
          is said in fm4m.recipes.mod7_pretraining.
Cost:     the reference took 128 A100 x 3 days (9,216 GPU hours, 7.56k samples/s). Never run on a TPU by us.
Expect:   239,120 steps, peak learning rate 3.2e-3 after 4,769 steps of warm-up. We have
          measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import recipes


def get_config():
    return recipes.mod7_pretraining("fm_large_24e_24d_swiglu_nobias")
