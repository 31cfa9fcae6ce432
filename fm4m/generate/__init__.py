"""Any modality from any others: generation with a trained model.

    simple.py      everything given is visible, each target on its own: what sample pictures and exported artefacts need
    schedules.py   how many tokens every step writes, and at which temperature
    sampling.py    logits to tokens: temperature, top-k, top-p
"""

from fm4m.generate.simple import check_names, predict, predict_ids, visible_tokens

__all__ = ["check_names", "predict", "predict_ids", "visible_tokens"]
