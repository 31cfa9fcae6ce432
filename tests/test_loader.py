from __future__ import annotations

import errno
import itertools
import json

import numpy as np
import pytest
import seqio
from token_sets import ALL, MASKING, arrays, write_set

from data_pipelines import loader, records, registry, storage
from data_pipelines.sources import ArraySource, TokenSource
from fm4m import modalities
from fm4m.batch import check_raw
from fm4m.errors import DataError
from fm4m.modalities import Modality

N = 20


@pytest.fixture
def mixture(tmp_path):
    """Task `x` from files (20 and 5 samples), task `y` in memory with the grid only (7 samples, no validation)."""
    write_set(tmp_path, "train", N)
    write_set(tmp_path, "validation", 5, shards=1)
    registry.add_task("x", TokenSource(tmp_path), [m.name for m in ALL])
    registry.add_task("y", ArraySource({"train": [{"t_grid": np.full(6, 1000 + i)} for i in range(7)]}), ["t_grid"])
    registry.add_mixture("xy", [("x", 3.0), ("y", 1.0)], masking=MASKING)
    yield tmp_path
    seqio.MixtureRegistry.remove("xy")
    for name in "xy":
        seqio.TaskRegistry.remove(name)


def take(stream, count, **kwargs):
    return list(itertools.islice(stream.batches(**kwargs), count))


def rows(batches):
    """All rows of batches, as one array a field."""
    fields = {k: np.concatenate([getattr(b, k) for b in batches]) for k in ("tokens", "length", "task")}
    return fields | {n: np.concatenate([b.dense[n] for b in batches]) for n in batches[0].dense}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_hold_the_samples(mixture):
    stream = loader.open_stream("xy", "validation", shuffle=False, num_epochs=1)
    (batch,) = take(stream, 2, position=0, global_batch=5)
    assert stream.size == 5 and stream.tasks == ("x", "y") and stream.masking == MASKING
    assert (batch.tokens.dtype, batch.length.dtype, batch.task.dtype) == (np.uint16, np.int16, np.uint8)
    check_raw(batch, stream.modalities)
    grid, text, pixels, states = (arrays(m, 5) for m in ALL)
    for i in range(5):
        np.testing.assert_array_equal(batch.tokens[i, :6], grid[i])
        np.testing.assert_array_equal(batch.tokens[i, 6 : 6 + len(text[i])], text[i])
        assert not batch.tokens[i, 6 + len(text[i]) :].any()
        np.testing.assert_array_equal(batch.dense["t_pixels"][i], pixels[i])
        np.testing.assert_array_equal(batch.dense["t_states"][i, : len(states[i])], states[i])
        assert batch.length[i].tolist() == [6, len(text[i]), 6, len(states[i])]


def test_what_a_task_lacks_has_length_0(mixture):
    stream = loader.open_stream("xy", "train")
    batch = take(stream, 1, position=0, global_batch=12)[0]
    assert sorted(batch.task.tolist()) == 9 * [0] + 3 * [1]
    lacking = batch.task == 1
    np.testing.assert_array_equal(batch.length[lacking], 3 * [[6, 0, 0, 0]])
    assert (batch.length[~lacking][:, 2] == 6).all() and not batch.dense["t_pixels"][lacking].any()


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_resume_with_other_shards_and_batches(mixture, shards):
    stream = loader.open_stream("xy", "train", seed=7)
    straight = rows(take(stream, 15, position=0, global_batch=8))
    # 40 samples in batches of 8 on 4 shards, then in batches of 16 on `shards` shards from a new process.
    resumed = loader.open_stream("xy", "train", seed=7)
    parts = [take(resumed, 5, position=40, global_batch=16, shard=h, shards=shards) for h in range(shards)]
    merged = rows(list(itertools.chain.from_iterable(zip(*parts, strict=True))))
    assert_same(merged, {k: v[40:] for k, v in straight.items()})
    # A position need not be a multiple of the batch.
    odd = rows(take(resumed, 4, position=37, global_batch=6, shards=1))
    assert_same(odd, {k: v[37:61] for k, v in straight.items()})


def test_a_batch_may_be_one_sample(mixture):
    stream = loader.open_stream("xy", "train")
    assert_same(rows(take(stream, 4, position=3, global_batch=1)), rows(take(stream, 1, position=3, global_batch=4)))


def test_each_pass_has_each_sample_once_and_seeds_differ(mixture):
    stream = loader.open_stream("xy", "train", seed=1)
    everything = rows(take(stream, 8, position=0, global_batch=20))
    of_x = everything["tokens"][everything["task"] == 0][:, 0].tolist()
    passes = [of_x[i : i + N] for i in range(0, 120, N)]
    assert all(sorted(p) == list(range(N)) for p in passes)
    assert len({tuple(p) for p in passes}) == len(passes)
    other = rows(take(loader.open_stream("xy", "train", seed=2), 8, position=0, global_batch=20))
    assert (other["tokens"][:, 0] != everything["tokens"][:, 0]).any()


@pytest.mark.parametrize("shards", [1, 4])
def test_finite_stream_fills_up_its_last_batch(mixture, shards):
    stream = loader.open_stream("xy", "train", shuffle=False, num_epochs=1)
    assert stream.size == 27
    parts = [take(stream, 9, position=0, global_batch=8, shard=h, shards=shards) for h in range(shards)]
    assert {len(p) for p in parts} == {4}, "all shards have equally many batches"
    merged = rows(list(itertools.chain.from_iterable(zip(*parts, strict=True))))
    assert not merged["length"][27:].any() and not merged["tokens"][27:].any()
    assert sorted(merged["tokens"][:27, 0].tolist()) == [*range(N), *range(1000, 1007)]
    later = rows(take(stream, 9, position=20, global_batch=8))
    assert_same({k: v[:7] for k, v in later.items()}, {k: v[20:27] for k, v in merged.items()})
    assert take(stream, 1, position=27, global_batch=8) == []


def test_bad_requests_are_refused(mixture):
    stream = loader.open_stream("xy", "train")
    with pytest.raises(ValueError, match="global batch of 10 samples is not divisible by 4 shards"):
        stream.batches(position=0, global_batch=10, shards=4)
    with pytest.raises(ValueError, match="shard 4 of 4"):
        stream.batches(position=0, global_batch=8, shard=4, shards=4)
    with pytest.raises(KeyError, match="Did you mean 'xy'"):
        loader.open_stream("xyz", "train")
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        loader.open_stream("xy", "trains")


def test_faults_are_named_with_file_record_and_modality(mixture):
    for path in (mixture / "train" / "t_grid").iterdir():
        path.rename(path.with_suffix(".moved"))
    with pytest.raises(ValueError, match="t_grid/data-00000-of-00003.moved is not in the manifest"):
        loader.open_stream("xy", "train")
    for path in (mixture / "train" / "t_grid").iterdir():
        path.rename(path.with_suffix(".arrayrecord"))
    stream = loader.open_stream("xy", "train", shuffle=False, num_epochs=1)
    vanished = mixture / "train" / "t_text" / "data-00002-of-00003.arrayrecord"
    vanished.unlink()
    with pytest.raises(ValueError, match=f"{vanished}, record 0 cannot be read .the file has vanished.*copy"):
        take(stream, 9, position=0, global_batch=8)


def test_token_outside_the_vocabulary_stops_the_stream(mixture):
    wide = Modality("t_grid", "tokens", vocab_size=5000, grid=(2, 3))
    samples = arrays(wide, N)
    samples[3][2] = 4999
    records.write_modality(mixture, "train", wide, samples, [f"k{i}" for i in range(N)], overwrite=True)
    manifest = mixture / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 5000', '"vocab_size": 4096'))
    stream = loader.open_stream("xy", "train")
    with pytest.raises(ValueError, match=r"task 'x', modality 't_grid': .*t_grid/data-0000\d.*, record \d has token"):
        take(stream, 9, position=0, global_batch=8)


def test_fingerprint_changes_with_what_gives_a_position_its_meaning(mixture):
    def fingerprint(**kwargs):
        return loader.fingerprint(loader.open_stream("xy", "train", **kwargs).resolved)

    first = fingerprint()
    assert first == fingerprint() and len(first) == 64
    assert len({first, fingerprint(seed=1), fingerprint(shuffle=False), fingerprint(num_epochs=1)}) == 4
    json.dumps(loader.open_stream("xy", "train").resolved)
    seqio.MixtureRegistry.remove("xy")
    registry.add_mixture("xy", [("x", 6.0), ("y", 2.0)], masking=MASKING)
    assert fingerprint() == first, "only the proportions of the rates count"
    seqio.MixtureRegistry.remove("xy")
    registry.add_mixture("xy", [("x", 3.0), ("y", 2.0)], masking=MASKING)
    rates = fingerprint()
    grid = ALL[0]
    records.write_modality(mixture, "train", grid, arrays(grid, N, 1), [f"k{i}" for i in range(N)], overwrite=True)
    assert len({first, rates, fingerprint()}) == 3, "the files have changed"


def test_import_mixture_modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import something_else_entirely\n")
    (tmp_path / "my_mixtures.py").write_text(
        "from data_pipelines import registry\nregistry.add_modality(registry.Modality('t_mine', 'tokens', 8, (1, 1)))\n"
    )
    loader.import_mixture_modules(["my_mixtures"])
    assert modalities.get("t_mine").vocab_size == 8
    with pytest.raises(
        ModuleNotFoundError, match=r"no module 'data_pipelines.mixtures.nope' \(named by data.modules\)"
    ):
        loader.import_mixture_modules(["data_pipelines.mixtures.nope"])
    with pytest.raises(ModuleNotFoundError, match="No module named 'something_else_entirely'"):
        loader.import_mixture_modules(["needs_more"])


def test_errors_of_storage_that_pass_are_waited_for(mixture, monkeypatch, caplog):
    monkeypatch.setattr(storage, "DELAYS", (0.0, 0.001))
    stream = loader.open_stream("xy", "validation", shuffle=False, num_epochs=1, threads=2)
    expected = rows(take(stream, 1, position=0, global_batch=5))
    real, left = records.Records._reader, {"t_text": 2, "t_grid": 1}

    class Failing:
        def __init__(self, reader, name):
            self.reader, self.name = reader, name

        def read(self, *where):
            if left.get(self.name, 0) > 0:
                left[self.name] -= 1
                # What the C++ reader says of a file server that has restarted.
                raise RuntimeError("pread() failed: Stale file handle; reading /data/x; at byte 512")
            return self.reader.read(*where)

    monkeypatch.setattr(records.Records, "_reader", lambda self, i: Failing(real(self, i), self.modality.name))
    assert_same(rows(take(stream, 1, position=0, global_batch=5)), expected)
    assert left == {"t_text": 0, "t_grid": 0}
    assert "Stale file handle; reading /data/x; at byte 512; again in 0 s (1 of 2)" in caplog.text
    left["t_text"] = 10**6
    with pytest.raises(DataError, match=r"t_text/data-.*, record \d cannot be read: pread.. failed: Stale file handle"):
        take(stream, 1, position=0, global_batch=5)


def test_any_source_is_read_again(mixture, monkeypatch):
    monkeypatch.setattr(storage, "DELAYS", (0.0,))
    errors = [OSError(errno.EIO, "Input/output error"), None, TimeoutError("slow"), TimeoutError("slow")]

    class Flaky(ArraySource):
        def open_split(self, split, modalities):
            samples = super().open_split(split, modalities)

            class Samples(type(samples)):
                def __getitem__(self, index):
                    if errors and (error := errors.pop(0)):
                        raise error
                    return super().__getitem__(index)

            samples.__class__ = Samples
            return samples

    samples = Flaky({"train": [{"t_grid": np.arange(6)}]}).open("train", ["t_grid"])
    assert samples[0]["t_grid"].tolist() == list(range(6))
    with pytest.raises(DataError, match="split 'train', sample 0 cannot be read: slow"):
        samples[0]
    assert not storage.passes(FileNotFoundError(errno.ENOENT, "no")) and not storage.passes(RuntimeError("Corrupted"))
