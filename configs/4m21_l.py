r"""4M-L on twenty-one modalities (705M parameters without tables): the released recipe of the reference implementation.

Command:  python -m fm4m.train --config=configs/4m21_l.py --workdir=runs/4m21_l \
              --config.train.init_from=runs/4m_l
Prepare:  a trained 4M-L of seven modalities, and a module that registers the mixture "mod21" with your data, named in
          --config.data.modules; what it must hold is said in fm4m.recipes.mod21_pretraining.
Cost:     not published. Never run on a TPU by us; `python -m fm4m.aot` predicts it.
Expect:   239,218 steps, peak learning rate 1.6e-3 after 4,769 steps of warm-up. We have
          measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import recipes


def get_config():
    return recipes.mod21_pretraining("fm_large_24e_24d_swiglu_nobias")
