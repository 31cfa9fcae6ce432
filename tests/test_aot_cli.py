"""The command line of fm4m.aot: what it prints, refuses and finds, with the real compiler where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from fm4m.aot import __main__ as cli
from fm4m.aot import compiler, roofline, search, topology
from fm4m.aot.chips import GIB

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT = 900

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


def run(*arguments):
    """The command line in a process of its own: (exit code, standard output, standard error)."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "fm4m.aot", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


TINY = "--config=tests/aot_tiny.py"


# ---- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--config=configs/4m_ti.py", "--topology=v4-100"), "error: --topology: there is no v4-100"),
        (("--config=configs/none.py", "--topology=v4-8"), "error: there is no configuration file"),
        (("--config=configs/4m_ti.py", "--topology=v4-8", "--config.train.bach=1"), "Did you mean"),
        (("--config=configs/4m_ti.py",), "--topology"),
        (("--config=configs/4m_ti.py", "--topology=v4-8", "--slices=0"), "--slices must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, message, capsys):
    try:
        code = cli.main(list(arguments))
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_missing_libtpu_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--config=configs/4m_ti.py", "--topology=v4-8"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install '.[aot]'")


@needs_libtpu
def test_what_the_worker_refuses_comes_back_as_a_sentence():
    code, _, err = run("--config=configs/4m_ti.py", "--topology=v4-8", "--fast", "--config.train.global_batch=33")
    assert code == 2 and "train.global_batch = 33 is not divisible" in err and "Traceback" not in err


# ---- the real compiler


@needs_libtpu
@pytest.mark.slow
def test_a_step_to_the_end_of_compilation(tmp_path):
    code, out, err = run(TINY, "--topology=v4-8", f"--json={tmp_path / 'n.json'}", "--heaviest=3")
    assert code == 0, err
    (numbers,) = json.loads((tmp_path / "n.json").read_text())
    assert numbers["chips"] == 4 and numbers["batch_per_chip"] == 8 and numbers["complete"]
    memory = numbers["memory"]
    assert memory["fits"] and memory["limit"] == int(30.75 * GIB)
    assert memory["optimizer state"] == 2 * memory["parameters"] and memory["activations and temporaries"] > 0
    parts = [memory[k] for k in ("parameters", "optimizer state", "EMA", "batch", "activations and temporaries")]
    assert sum(parts) == memory["peak"]
    kinds = {c["kind"] for c in numbers["collectives"]}
    assert {"all-gather", "reduce-scatter"} <= kinds and all(c["network"] == "ICI" for c in numbers["collectives"])
    # No activation is computed twice without remat, so the program runs what the formula counts, and little beside: of
    # 73 targets a modality, the loss makes blocks of 64.
    e, r = numbers["estimate"], numbers["roofline"]
    assert 0.95 < r["product_flops"] / r["model_flops"] < 1.6
    assert r["ideal_seconds"] < e["est_seconds"] <= e["step_seconds"] < 1
    assert e["mfu_bound"] == pytest.approx(r["ideal_seconds"] / e["est_seconds"]) and 0 < e["mfu_bound"] < 1
    assert e["days"] == pytest.approx(numbers["steps"] * e["step_seconds"] / 86400)
    assert e["chip_hours"] == pytest.approx(e["days"] * 24 * 4)
    assert e["tokens_per_second"] == pytest.approx(32 * 128 / e["step_seconds"])
    assert memory["compiler"]["argument_size_in_bytes"] > 0
    assert "MFU bound" in out and "ms a step" in out
    assert "nothing was run on a TPU" in out and "1 + 1 layers" in out
    assert err == ""


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit():
    # A state of 25 GiB a chip and activations of 13; a batch as large would take the compiler three times as long.
    code, out, err = run(
        TINY, "--topology=v4-8", "--fast", "--config.model.dim=16384", "--config.model.num_heads=256"
    )
    assert code == 1 and "Traceback" not in out + err
    assert "it does not fit: the step needs" in err and "v4-8 has 30.75" in err
    assert "total at the peak" in out and "optimizer state" in out


@needs_libtpu
@pytest.mark.slow
def test_two_slices_reduce_gradients_over_the_network(tmp_path):
    code, _, err = run(TINY, "--topology=v4-8", "--slices=2", "--fast", f"--json={tmp_path / 'n.json'}")
    assert code == 0, err
    (numbers,) = json.loads((tmp_path / "n.json").read_text())
    assert not numbers["complete"] and numbers["estimate"] is None
    r = numbers["roofline"]
    assert r["floor_days"] == pytest.approx(numbers["steps"] * r["floor_seconds"] / 86400) and r["floor_days"] > 0
    assert numbers["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    networks = {(c["kind"], c["network"]) for c in numbers["collectives"]}
    assert ("all-reduce", "DCN") in networks and ("all-gather", "ICI") in networks
    assert ("all-gather", "DCN") not in networks


# ---- the parts, without a compiler


@pytest.mark.parametrize(
    "message, sizes",
    [
        ("... the total memory required for HLO temporaries (75.50G) exceeds available HBM (30.75G).",
         (75.5 * GIB, 30.75 * GIB)),
        ("Ran out of memory in memory space hbm. Used 37.50G of 30.75G hbm. Exceeded hbm capacity by 6.75G.",
         (37.5 * GIB, 30.75 * GIB)),
        ("INTERNAL: Mosaic failed to compile", (0, 0)),
    ],
)  # fmt: skip
def test_sizes_in_the_compilers_message(message, sizes):
    assert compiler.too_large(message) == sizes


def test_hbm_of_the_memory_report():
    report = "Memory Space: default (color=0)\nTotal bytes: 120 (120B)\n\nMemory Space: hbm (color=3)\nTotal bytes: 7\n"
    assert compiler.hbm_of_report(report) == 120
    with pytest.raises(compiler.CompilerError, match="no line for HBM"):
        compiler.hbm_of_report("")


PER_ROW = {"none": 1.6, "dots": 1.0, "projections": 0.5, "residual": 0.3, "full": 0.15}
WORK = {"none": 1.0, "dots": 1.02, "projections": 1.1, "residual": 1.25, "full": 1.33}


class FakeCompiler:
    """Memory is state plus activations of a policy's size per row; the roofline grows with recomputation and passes."""

    ROWS, LIMIT, STATE = 128, 30.0, 5.0

    def __init__(self, **changes):
        self.calls = []
        for name, value in changes.items():
            setattr(self, name, value)

    def __call__(self, flags):
        given = dict(flag.removeprefix("--config.").split("=") for flag in flags)
        remat, passes = given["model.remat"], int(given["train.accumulation"])
        group = int(given.get("model.scan_group", 1))
        self.calls.append((remat, passes, group))
        activations = PER_ROW[remat] * self.ROWS / passes
        floor = WORK[remat] + 0.02 * passes + 0.1 * (group == 1)
        return {
            "model": {"remat": remat, "scan_group": group, "encoder_depth": 12, "decoder_depth": 12},
            "accumulation": passes,
            "rows_per_pass": self.ROWS // passes,
            "memory": {"fits": self.STATE + activations <= self.LIMIT, "limit": self.LIMIT,
                       "peak": self.STATE + activations, "activations and temporaries": activations},
            "roofline": {"floor_seconds": floor},
        }  # fmt: skip


def test_search_takes_the_shortest_roofline_that_fits():
    fake, lines = FakeCompiler(), []
    flags = search.search([], topology.parse("v4-128"), lines.append, fake)
    # none: 1.6 GiB a row needs 16 passes; dots 8; projections 4, residual 2; full fits whole but computes most.
    fits = {(r, p) for r, p, _ in fake.calls if PER_ROW[r] * 128 / p <= 25}
    assert fits == {("none", 16), ("dots", 8), ("projections", 4), ("residual", 2), ("full", 1)}
    assert flags == ["--config.model.remat=dots", "--config.train.accumulation=8", "--config.model.scan_group=0"]
    assert ("dots", 8, 0) in fake.calls and ("dots", 8, 4) in fake.calls
    assert len(lines) == len(fake.calls) <= 13 and sum("does not fit" in line for line in lines) == len(lines) - 7


def test_search_stops_when_nothing_has_to_be_given_up():
    fake = FakeCompiler(ROWS=8)
    flags = search.search([], topology.parse("v4-128"), lambda line: None, fake)
    assert {c[:2] for c in fake.calls} == {("none", 1)} and "--config.model.remat=none" in flags


def test_search_says_when_nothing_fits():
    fake = FakeCompiler(STATE=31.0)
    assert search.search([], topology.parse("v4-8"), lambda line: None, fake) is None
    assert len(fake.calls) == 5  # one for each policy: passes do not shrink the state


def test_search_goes_on_when_the_compiler_fails_at_a_choice():
    fake, lines = FakeCompiler(), []

    def trial(flags):
        if "--config.model.remat=dots" in flags:
            raise compiler.CompilerError("INTERNAL: RET_CHECK failure")
        return fake(flags)

    flags = search.search([], topology.parse("v4-128"), lines.append, trial)
    assert "--config.model.remat=projections" in flags and any("RET_CHECK" in line for line in lines)

    def broken(flags):
        raise compiler.CompilerError("INTERNAL: RET_CHECK failure")

    with pytest.raises(compiler.CompilerError, match="RET_CHECK"):
        search.search([], topology.parse("v4-128"), lines.append, broken)


def test_roofline_hides_asynchronous_collectives_behind_arithmetic():
    assert roofline._exposed(10.0, 1.0, 8.0) == 1.0
    assert roofline._exposed(10.0, 1.0, 12.0) == 3.0
