"""Any modality from any others: generation with a trained model.

    generator.py   chains of targets with guidance: the entry
    inputs.py      arrays to a canvas, checked
    canvas.py      what the encoder sees of some samples
    engine.py      the jitted programs: a step on a grid, a whole sequence
    cached.py      the decoder one token at a time; absorbed.py: a few cells at a time
    probe.py       one input changed in steps, and how the predictions react; ensemble.py: samples averaged or ranked
    outpaint.py    pictures grown beyond a side; web.py (and page.py): a page to do all this by hand
    simple.py      everything given is visible, each target on its own: what sample pictures and exported artefacts need
    schedules.py   how many tokens every step writes, and at which temperature
    sampling.py    logits to tokens: temperature, top-k, top-p
"""

from fm4m.generate.generator import Condition, Generator, Target
from fm4m.generate.inputs import make_canvas
from fm4m.generate.simple import check_names, predict, predict_ids, visible_tokens

__all__ = ["Condition", "Generator", "Target", "make_canvas", "check_names", "predict", "predict_ids", "visible_tokens"]
