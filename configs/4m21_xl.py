r"""4M-XL on twenty-one modalities (2.8B parameters without tables): the recipe that the reference released.

Command:  python -m fm4m.train --config=configs/4m21_xl.py --workdir=runs/4m21_xl \
              --config.train.init_from=runs/4m_xl
Prepare:  a trained 4M-XL of seven modalities, and a module that registers the mixture "mod21" with your data, named in
          --config.data.modules; what it must hold is said in fm4m.recipes.mod21_pretraining.
Cost:     not published. Never run on a TPU by us; `python -m fm4m.aot` predicts it.
Expect:   239,218 steps, peak learning rate 3.2e-4 after 4,769 steps of warm-up. We have
          measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import recipes


def get_config():
    return recipes.mod21_pretraining("fm_xlarge_24e_24d_swiglu_nobias")
