"""4M-XL on seven modalities (2.8B parameters without tables): the released recipe of the reference implementation.

Command:  python -m fm4m.train --config=configs/4m_xl.py --workdir=runs/4m_xl
Prepare:  a module that registers the mixture "mod7" with your data, named in --config.data.modules; what it must hold
          is said in fm4m.recipes.mod7_pretraining.
Cost:     the reference took 128 A100 x 8 days (24,576 GPU hours, 2.83k samples/s). Never run on a TPU by us.
Expect:   239,120 steps, peak learning rate 6.4e-4 after 4,769 steps of warm-up. We have
          measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import recipes


def get_config():
    return recipes.mod7_pretraining("fm_xlarge_24e_24d_swiglu_nobias")
