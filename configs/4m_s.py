"""4M-S on seven modalities, with the schedule that the reference implementation released for 4M-B (none for S).

Command:  python -m fm4m.train --config=configs/4m_s.py --workdir=runs/4m_s
Prepare:  a module that registers the mixture "mod7" with your data, named in --config.data.modules; what it must hold
          is said in fm4m.recipes.mod7_pretraining.
Cost:     not known; 59M parameters without tables, 0.3 of 4M-B's. Never run on a TPU by us.
Expect:   239,120 steps, peak learning rate 3.2e-3 after 4,769 steps of warm-up. We have
          measured no loss with it, on a TPU or elsewhere.
"""

from fm4m import recipes


def get_config():
    return recipes.mod7_pretraining("fm_small_8e_8d_swiglu_nobias")
