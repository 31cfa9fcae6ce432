"""Whole preparations: what ends up in the files, resuming, adding, and what goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from prepare_cases import MadeUp, Other, configuration, contents

from data_pipelines import manifest, records
from data_pipelines.prepare import parts, registration, runner, writer
from data_pipelines.prepare.crew import Crew
from data_pipelines.prepare.samples import in_validation
from fm4m.config_file import ConfigError
from fm4m.modalities import Modality

TEXT = str(pathlib.Path(__file__).resolve().parents[1] / "data_pipelines/rooms/tokenizers/text.json")


def here(plan, todo, progress):
    """Makes the parts in this process."""
    maker = parts.PartMaker(plan.job)
    for part in todo:
        maker.make(part, progress.add)


def prepare(out, config=None, source=None, *, validation=None, execute=here, processes=1, **changes):
    sources = {"source": source or MadeUp()}
    if validation is not None:
        sources["validation"] = validation
    config = config or configuration(**{"text__tokenizer": TEXT, **changes})
    return runner.prepare(config, out, sources=sources, execute=execute, processes=processes, say=lambda text: None)


def workers(out, processes=2, **arguments):
    return prepare(out, execute=Crew(processes).execute, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A set with two crops and a validation share, made without workers."""
    out = tmp_path_factory.mktemp("finished") / "set"
    result = prepare(out, validation__share=0.2, crops__count=2)
    return out, result


def stored(root, split, name):
    entry = manifest.read_manifest(root, split)["modalities"][name]
    return records.Records(root, split, Modality.from_dict(entry["modality"]))


def test_every_sample_is_in_the_set_or_in_the_report(finished):
    out, result = finished
    for split in result.splits:
        records.verify(out, split)
    listed = [s for split in result.splits for s in records.read_samples(out, split)]
    usable = [key for i, key in enumerate(MadeUp().keys) if i % 11 != 10]
    assert sorted(s["key"] for s in listed) == sorted([*usable, *(f"{key}#1" for key in usable)])
    for split in result.splits:
        for sample in records.read_samples(out, split):
            assert (split == "validation") == in_validation(sample["sample"], 0.2)
    lines = [json.loads(line) for line in (result.report_folder / "quarantine.jsonl").read_text().splitlines()]
    assert {e["key"] for e in lines if e["reason"] == "truncated"} == {"s010", "s021", "s032"}
    assert [e["key"] for e in lines if e.get("listing")] == ["stray.txt"]
    assert all(e["sentence"] and e["origin"] == "source" for e in lines if "modality" not in e)
    without = {e["key"] for e in lines if e.get("modality") == "caption"}
    assert without == {f"s{i:03d}{row}" for i in (6, 13, 20, 27, 34) for row in ("", "#1")}
    report = json.loads((result.report_folder / "report.json").read_text())
    assert report["read"] == 40 and report["quarantined"] == {"truncated": 3} and report["listing"] == {"no_picture": 1}
    assert report["missing"] == {"caption": {"caption_encoding": 10}} and report["notes"]["rotated"] == 5
    assert sum(report["records"].values()) == 74
    assert not (out / ".prepare").exists()


def test_all_modalities_of_a_record_are_of_one_crop(finished):
    out, _ = finished
    from fm4m.tokenizers.text import TextTokenizer
    from fm4m.transforms import images
    from fm4m.transforms.crops import Crop

    tokenizer = TextTokenizer.load(TEXT)
    source = MadeUp()
    for i, sample in enumerate(records.read_samples(out, "train")):
        index = source.keys.index(sample["sample"])
        picture = source.read(index).fields["rgb"]
        assert sample["size"] == list(picture.shape[:2])
        crop = Crop(*sample["crop"])
        np.testing.assert_array_equal(stored(out, "train", "rgb@8")[i], images.rgb(picture, crop, (8, 8)))
        text = tokenizer.decode(stored(out, "train", "caption")[i])
        captions = [f"a {('red', 'green', 'blue')[index % 3]} picture", f"number {index}"]
        assert text == ("" if index % 7 == 6 else captions[sample["row"]])
        boxes = tokenizer.decode(stored(out, "train", "det")[i])
        assert boxes.count("dog") == index % 3
        if sample["row"] == 0:
            height, width = picture.shape[:2]
            assert crop == Crop(0, (width - height) // 2, height, height)


def test_worker_processes_make_the_same_files(finished, tmp_path):
    workers(tmp_path / "set", validation__share=0.2, crops__count=2)
    expected, found = contents(finished[0]), contents(tmp_path / "set")
    assert {k: v for k, v in found.items() if k != "made_up.py"} == {
        k: v for k, v in expected.items() if k != "made_up.py"
    }


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
from prepare_cases import MadeUp, configuration
from data_pipelines.prepare import runner
if __name__ == "__main__":
    runner.prepare(configuration(text__tokenizer={text!r}, part_samples=3), {out!r}, processes=2,
                   sources={{"source": MadeUp(60, pause=0.02)}})
"""


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    """SIGKILL of the whole process group at random moments; in the end the bytes equal those of an undisturbed run."""
    prepare(tmp_path / "calm", source=MadeUp(60), part_samples=3)
    out, script = tmp_path / "set", tmp_path / "run.py"
    script.write_text(_KILLED.format(tests=str(pathlib.Path(__file__).parent), text=TEXT, out=str(out)))
    rng, kept = np.random.default_rng(), []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        process = subprocess.Popen([sys.executable, script], start_new_session=True, env=environment,
                                   stderr=subprocess.PIPE)  # fmt: skip
        deadline = time.monotonic() + 60
        before = len(kept)
        while len(kept) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            kept = [p.name for p in (out / ".prepare" / "parts").glob("[0-9]*")]
        time.sleep(float(rng.uniform(0, 0.3)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    if (out / ".prepare").exists():  # else even the second one came to its end
        parts_made = {p.name: (p / "part.json").stat().st_mtime_ns for p in (out / ".prepare/parts").glob("[0-9]*")}
        made = []

        def watched(plan, todo, progress):
            made.extend(f"{part.number:06d}" for part in todo)
            here(plan, todo, progress)

        prepare(out, source=MadeUp(60), part_samples=3, execute=watched)
        assert parts_made and not set(made) & set(parts_made), "a finished part was made again"
        assert len(made) + len(parts_made) == 20
    expected, found = contents(tmp_path / "calm"), contents(out)
    assert set(found) == set(expected)
    assert [k for k in expected if found[k] != expected[k] and k != "made_up.py"] == []


def test_a_worker_that_is_killed_is_reported_and_its_part_made_again(tmp_path, capfd):
    workers(tmp_path / "set", source=MadeUp(16, dies=str(tmp_path / "died")), processes=1)
    message = capfd.readouterr().err
    assert "part 0 (source, 0 to 7): its worker process was ended by signal 9 (SIGKILL)" in message
    assert "fewer --processes" in message and "made once more" in message
    assert len(list(records.read_samples(tmp_path / "set", "train"))) == 15


def test_a_part_that_always_kills_its_worker_is_left_and_the_rest_is_kept(tmp_path, capfd):
    message = r"1 of 2 parts could not be made, the first being part 0 .*same command"
    with pytest.raises(runner.Unfinished, match=message):
        workers(tmp_path / "set", source=MadeUp(16, dies=str(tmp_path / "always")), processes=1)
    assert "for the second time" in capfd.readouterr().err
    prepare(tmp_path / "set", source=MadeUp(16))
    assert len(list(records.read_samples(tmp_path / "set", "train"))) == 15


def test_a_full_disk_leaves_a_state_that_can_be_resumed(tmp_path, monkeypatch):
    """ENOSPC on the second part, as Python's own files raise it."""
    calls, real = [], writer.write_line

    def full(file, value):
        calls.append(value)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, value)

    monkeypatch.setattr(writer, "write_line", full)
    with pytest.raises(writer.DiskFull, match=r"The 1 parts finished so far are kept: free some space and run"):
        prepare(tmp_path / "set")
    assert not list((tmp_path / "set/.prepare/parts").glob(".*")), "partial files still take space"
    monkeypatch.undo()
    prepare(tmp_path / "set")
    prepare(tmp_path / "calm")
    assert contents(tmp_path / "set" / "train") == contents(tmp_path / "calm" / "train")


def test_a_limit_on_files_is_told_by_the_library_that_writes_records(tmp_path):
    """ArrayRecord's writer fails in its own way; the limit makes it fail for certain."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, old[1]))
    try:
        with pytest.raises(writer.DiskFull, match="is full"):
            prepare(tmp_path / "set", source=MadeUp(300), part_samples=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    prepare(tmp_path / "set", source=MadeUp(300), part_samples=300)
    records.verify(tmp_path / "set", "train")


def test_a_modality_is_added_without_touching_the_others(finished, tmp_path):
    changes = {"validation__share": 0.2, "crops__count": 2}
    first = {k: v for k, v in configuration().modalities.to_dict().items() if k != "det"}
    prepare(tmp_path / "set", modalities=first, **changes)
    before = contents(tmp_path / "set")
    result = prepare(tmp_path / "set", **changes)
    assert result.written == ("det",) and result.report["records"] == {"train": 64, "validation": 10}
    after = contents(tmp_path / "set")
    for path, data in before.items():
        assert after[path] == data or path.endswith(("manifest.json", "made_up.py")), path
    for split in ("train", "validation"):
        records.verify(tmp_path / "set", split)
        whole, added = stored(finished[0], split, "det"), stored(tmp_path / "set", split, "det")
        for i in range(len(whole)):
            np.testing.assert_array_equal(added[i], whole[i])
    assert prepare(tmp_path / "set", **changes).written == ()


def test_a_modality_from_another_source_needs_a_word_and_lacks_what_that_source_lacks(tmp_path):
    prepare(tmp_path / "set", source=MadeUp(20))
    edge = {"make": "stored_codes", "input": "tok_edge", "vocab_size": 64, "grid": (2, 2)}
    other = Other(19)
    with pytest.raises(ConfigError, match=r"source\.source\.samples was 20 and is 19 now.*other_source = True"):
        prepare(tmp_path / "set", source=other, modalities={"tok_edge": edge})
    result = prepare(tmp_path / "set", source=other, modalities={"tok_edge": edge}, other_source=True)
    assert result.report["missing"] == {"tok_edge": {"corrupt": 1, "sample_gone": 1}}
    codes = stored(tmp_path / "set", "train", "tok_edge")
    keys = [s["key"] for s in records.read_samples(tmp_path / "set", "train")]
    found = {key: codes[i].tolist() for i, key in enumerate(keys)}
    assert found["s001"] == found["s019"] == [] and found["s018"] == [18, 19, 20, 21]
    entry = manifest.read_manifest(tmp_path / "set", "train")["modalities"]["tok_edge"]
    assert entry["made_from"]["source"]["source"]["samples"] == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops__count": 3}, "crops.count was 1 and is 3 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"modalities": {"caption": {"make": "caption", "max_tokens": 8}}}, "already.*max_tokens was 16 and is 8 now"),
    ],
)
def test_what_is_written_cannot_be_changed_by_the_way(tmp_path_factory, changes, message):
    out = tmp_path_factory.getbasetemp() / "unchanged"
    if not out.exists():
        prepare(out, source=MadeUp(16))
    before = contents(out)
    with pytest.raises(ConfigError, match=message):
        prepare(out, source=MadeUp(16), **changes)
    assert contents(out) == before


def test_a_modality_is_replaced_only_when_asked(tmp_path):
    prepare(tmp_path / "set", source=MadeUp(16))
    shorter = {"caption": {"make": "caption", "max_tokens": 3}}
    result = prepare(tmp_path / "set", source=MadeUp(16), modalities=shorter, replace=("caption",))
    assert result.written == ("caption",) and result.report["notes"]["caption_cut"] > 0
    assert records.verify(tmp_path / "set", "train")["caption"] == 15
    assert max(len(stored(tmp_path / "set", "train", "caption")[i]) for i in range(15)) == 3


def test_an_unfinished_run_goes_on_only_as_it_was_begun(tmp_path):
    def nothing(plan, todo, progress):
        return None

    with pytest.raises(runner.Unfinished, match="2 of 2 parts"):
        prepare(tmp_path / "set", source=MadeUp(16), execute=nothing)
    with pytest.raises(ConfigError, match=r"unfinished preparation .*crops.count was 1 and is 2 now.*\.prepare"):
        prepare(tmp_path / "set", source=MadeUp(16), crops__count=2)
    with pytest.raises(ConfigError, match="begun in another way: modalities.caption.* and is null now"):
        pixels = {"rgb@8": {"make": "pixels", "size": 8, "patch_size": 4}}
        prepare(tmp_path / "set", source=MadeUp(16), modalities=pixels)


def test_a_damaged_part_is_made_again(tmp_path):
    made = []

    def first_half(plan, todo, progress):
        made.extend(part.number for part in todo)
        here(plan, todo[:2], progress)

    with pytest.raises(runner.Unfinished):
        prepare(tmp_path / "set", source=MadeUp(32), execute=first_half)
    with (tmp_path / "set/.prepare/parts/000001/train/caption.arrayrecord").open("ab") as file:
        file.write(b"x")
    with pytest.raises(runner.Unfinished):
        prepare(tmp_path / "set", source=MadeUp(32), execute=first_half)
    assert made == [0, 1, 2, 3, 1, 2, 3]


def test_a_validation_source_of_its_own(tmp_path):
    result = prepare(tmp_path / "set", source=MadeUp(16), validation=MadeUp(9, prefix="v"))
    assert result.splits == ("train", "validation")
    assert {s["key"][0] for s in records.read_samples(tmp_path / "set", "validation")} == {"v"}
    assert records.verify(tmp_path / "set", "validation")["rgb@8"] == 9


def test_wrong_configurations_end_at_once_and_say_why(tmp_path):
    wrong = {"t": {"make": "embedding", "width": 3, "max_tokens": 2, "input": "depth"}}
    with pytest.raises(ConfigError, match=r"modalities\.t: its step failed on all 8 records of part 0 .*ValueError"):
        prepare(tmp_path / "a", source=MadeUp(16), modalities=wrong)
    nowhere = {"t": {"make": "stored_codes", "input": "tok_x", "vocab_size": 4, "grid": (2, 2)}}
    with pytest.raises(ConfigError, match=r"modalities\.t: not one sample has it \(\{'field_missing': 15\}\)"):
        prepare(tmp_path / "b", source=MadeUp(16), modalities=nowhere)
    with pytest.raises(ConfigError, match=r"modalities\.t: no sample of the source has 'tok_y'; there are rgb, depth"):
        prepare(tmp_path / "d", source=MadeUp(16), modalities={"t": nowhere["t"] | {"input": "tok_y"}})
    missing = {"t": {"make": "codes", "tokenizer": "nowhere.safetensors"}}
    with pytest.raises(ConfigError, match=r"modalities\.t: there is no tokenizer file nowhere"):
        prepare(tmp_path / "c", source=MadeUp(16), modalities=missing)


def test_two_commands_do_not_share_a_folder(tmp_path):
    def second(plan, todo, progress):
        with pytest.raises(ConfigError, match="another command is preparing"):
            prepare(tmp_path / "set", source=MadeUp(16))
        here(plan, todo, progress)

    prepare(tmp_path / "set", source=MadeUp(16), execute=second)


def test_the_text_tokenizer_is_trained_from_the_captions(tmp_path):
    from fm4m.tokenizers.text import TextTokenizer

    config = {"text__tokenizer": "", "text__samples": 12}
    prepare(tmp_path / "set", source=MadeUp(16), **config)
    tokenizer = TextTokenizer.load(tmp_path / "set" / "text.json")
    caption = stored(tmp_path / "set", "train", "caption")
    assert caption.modality.vocab_size == tokenizer.vocab_size < 8192
    assert tokenizer.decode(caption[0]) == "a red picture"
    assert prepare(tmp_path / "set", source=MadeUp(16), **config).written == ()
    with pytest.raises(ConfigError, match=r"text\.vocab_size = 5000: .*trained with 8192"):
        prepare(tmp_path / "set", source=MadeUp(16), text__vocab_size=5000, **config)


def test_the_printed_module_registers_a_mixture_that_gives_batches(finished, monkeypatch):
    from data_pipelines import loader
    from fm4m import modalities

    # Other tests of this process may have registered another "caption".
    monkeypatch.setattr(modalities, "_REGISTRY", {})
    _, result = finished
    names: dict = {}
    exec(compile(result.module.read_text(), str(result.module), "exec"), names)
    stream = loader.open_stream("made_up", "train")
    batch = next(iter(stream.batches(position=0, global_batch=4)))
    assert batch.tokens.shape[0] == 4 and set(names["ROOT"]) and batch.length.any()
    printed = registration.instructions("made_up", result.module.read_text(), result.module, result.splits)
    assert "--config.data.mixture=made_up" in printed and "Modality('caption'" in printed


@pytest.mark.slow
def test_training_runs_on_the_printed_module(finished, tmp_path):
    _, result = finished
    (tmp_path / "made_up_module.py").write_text(result.module.read_text())
    size = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_ratio": 3.0}
    flags = [f"--config.model.{key}={value}" for key, value in size.items()]
    flags += ["--config.data.mixture=made_up", "--config.data.modules=('made_up_module',)"]
    flags += ["--config.train.total=2 steps", "--config.train.global_batch=4", "--config.optimizer.warmup=1 steps"]
    flags += ["--config.eval.batch=4", "--config.data.num_inputs=8", "--config.data.num_targets=8"]
    flags += ["--config.log.picture_inputs=()", "--config.log.picture_tokenizers=()", "--config.eval.every=0"]
    flags += ["--config.checkpoint.every=0", "--config.eval.baseline_batches=1", f"--workdir={tmp_path / 'run'}"]
    config = pathlib.Path(__file__).resolve().parents[1] / "configs/demo.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "fm4m.train", f"--config={config}", *flags],
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2/2" in done.stderr + done.stdout or (tmp_path / "run" / "metrics.jsonl").is_file()


def test_the_command_line_prints_everything(tmp_path, capsys, monkeypatch):
    from data_pipelines.prepare import __main__ as command
    from data_pipelines.prepare import plan

    monkeypatch.setattr(plan, "_open_sources", lambda config: {"source": MadeUp(16)})
    monkeypatch.setattr(runner, "Crew", lambda processes: type("Here", (), {"execute": staticmethod(here)}))
    file = tmp_path / "c.py"
    file.write_text(
        "import sys\nfrom prepare_cases import configuration\n"
        f"def get_config():\n    return configuration(text__tokenizer={TEXT!r}, validation__share=0.2)\n"
    )
    assert command.main([f"--config={file}", f"--out={tmp_path / 'set'}"]) == 0
    printed = capsys.readouterr()
    assert "16 samples read" in printed.out and "quarantined: 1 (truncated 1)" in printed.out
    assert "registry.add_mixture('made_up'" in printed.out and "16 of 16 samples (100 %)" in printed.err
    assert command.main([f"--config={file}", f"--out={tmp_path / 'set'}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command.main([f"--config={file}", f"--out={tmp_path / 'set'}", "--config.seed=4"]) == 2
    assert "seed was 0 and is 4 now" in capsys.readouterr().err
