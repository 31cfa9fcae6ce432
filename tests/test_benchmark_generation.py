"""The benchmark's two forms of generation give the same tokens."""

from __future__ import annotations

import re

import pytest

from benchmarks import generation


@pytest.mark.slow
def test_both_forms_give_the_same_tokens(capsys):
    flags = ["--model=fm_tiny_6e_6d_swiglu_nobias", "--batch=1", "--tokens=4", "--steps=2", "--rounds=1"]
    assert generation.main(flags) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"100\.0% of the tokens equal", printed)) == 2, printed
