"""The Beam pipeline, where Beam is installed: its environment has no SeqIO and no TensorFlow."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from prepare_cases import MadeUp, configuration, contents

from data_pipelines.prepare import parts, runner

TEXT = str(pathlib.Path(__file__).resolve().parents[1] / "data_pipelines/rooms/tokenizers/text.json")


def prepare(out, execute, source=None):
    config = configuration(text__tokenizer=TEXT, crops__count=2, validation__share=0.2)
    return runner.prepare(config, out, sources={"source": source or MadeUp()}, execute=execute, say=lambda text: None)


def here(plan, todo, progress):
    maker = parts.PartMaker(plan.job)
    for part in todo:
        maker.make(part, progress.add)


def test_the_steps_need_neither_seqio_nor_tensorflow():
    """What Beam's environment lacks must not be imported by anything that makes parts."""
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'seqio', 'grain', 'tensorflow_datasets'): sys.modules[name] = None\n"
        "from data_pipelines.prepare import __main__, crew, parts, plan, runner, steps, texts\n"
        "from data_pipelines.prepare import source_folder, source_rooms, source_tars\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_beam_makes_the_same_files_as_the_runner(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed (it has an environment of its own)")
    from apache_beam.options.pipeline_options import PipelineOptions

    from data_pipelines.prepare import beam_job

    prepare(tmp_path / "runner", here)
    prepare(tmp_path / "beam", beam_job.execute(PipelineOptions(["--runner=DirectRunner"])))
    expected, found = contents(tmp_path / "runner"), contents(tmp_path / "beam")
    assert set(expected) == set(found)
    # The module names the set's folder.
    assert [name for name in expected if expected[name] != found[name]] == ["made_up.py"]


def test_beam_finishes_what_the_runner_began(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed (it has an environment of its own)")
    from apache_beam.options.pipeline_options import PipelineOptions

    from data_pipelines.prepare import beam_job

    def begin(plan, todo, progress):
        here(plan, todo[:2], progress)

    with pytest.raises(runner.Unfinished):
        prepare(tmp_path / "set", begin)
    prepare(tmp_path / "set", beam_job.execute(PipelineOptions(["--runner=DirectRunner"])))
    prepare(tmp_path / "whole", here)
    assert contents(tmp_path / "set" / "train") == contents(tmp_path / "whole" / "train")
