from __future__ import annotations

import numpy as np
import pytest
import seqio

from benchmarks import records as benchmark
from data_pipelines.records import Records


def test_a_sample_of_seven_modalities_is_as_large_as_those_of_4m():
    size = sum(np.mean([a.nbytes for a in benchmark.made_up(m, 2000)]) for m in benchmark.MODALITIES)
    assert size == pytest.approx(2260, rel=0.02)


def test_reading_goes_on_where_the_set_ends(tmp_path):
    chosen = benchmark.MODALITIES[4:6]
    cost = benchmark.write_set(tmp_path, chosen, 10)
    assert cost.cpu > 0 and cost.wall > 0
    for m in chosen:
        read = Records(tmp_path, "train", m)
        for i, array in enumerate(benchmark.made_up(m, 10)):
            np.testing.assert_array_equal(read[i], array)
    step = benchmark.through_records(tmp_path, chosen, np.arange(10)[::-1])
    assert [step() for _ in range(3)] == [10, 10, 10]


def test_cost_is_of_the_timed_calls_only():
    calls = iter((5, 7, 7))
    done, cost = benchmark.measure(lambda: next(calls), 0.0)
    assert done == 7 and next(calls) == 7, "one call to warm up, one that is counted"
    assert 0 <= cost.cpu <= cost.wall + 1


def test_command_prints_a_line_a_measurement(tmp_path, capsys):
    before = set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())
    flags = ["--samples=40", "--modalities=2", "--seconds=0.01", f"--folder={tmp_path}"]
    assert benchmark.main(flags) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["modalities", "bytes/sample", "us", "CPU/sample", "samples/s/core", "samples/s"]
    assert len(lines) == 5
    for line in lines:
        micros, per_core = (float(cell.replace(",", "")) for cell in line.split()[-3:-1])
        assert micros > 0 and per_core == pytest.approx(1e6 / micros, rel=0.01, abs=1)
    assert (set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())) == before
    assert not list(tmp_path.iterdir()), "the sets are removed"
    with pytest.raises(SystemExit):
        benchmark.main(["--modalities=1,8"])
