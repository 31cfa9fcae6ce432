from __future__ import annotations

import collections
import importlib
import importlib.util
import itertools
import pathlib
import runpy
import sys

import numpy as np
import pytest
import seqio
from token_sets import ALL, EXTRA, GRID, MASKING, TEXT, arrays, keys, write_set

from data_pipelines import records, registry
from data_pipelines.sources import ArraySource, TokenSource
from fm4m import modalities
from fm4m.masking import Masking, MaskingComponent
from fm4m.modalities import Modality


@pytest.fixture(autouse=True)
def clean_registries():
    """Every test sees what was there before it, and leaves nothing behind."""
    before = [(r, dict(r._REGISTRY)) for r in (seqio.TaskRegistry, seqio.MixtureRegistry)]
    yield
    for registered, known in before:
        for name in set(registered.names()) - set(known):
            registered.remove(name)


def listed(n: int, modality=GRID, first: int = 0):
    return [{modality.name: np.full(modality.max_tokens, (first + i) % modality.vocab_size)} for i in range(n)]


def two_tasks(tmp_path, sizes=(20, 7)):
    """`a` has all four modalities from files, `b` has a grid and one more modality, in memory."""
    write_set(tmp_path, "train", sizes[0])
    registry.add_task("a", TokenSource(tmp_path), [m.name for m in ALL])
    second = [{**s, **e} for s, e in zip(listed(sizes[1], first=1000), listed(sizes[1], EXTRA), strict=True)]
    registry.add_task("b", ArraySource({"train": second, "validation": second[:3]}), ["t_grid", "t_extra"])


def ids(stream, n):
    return [int(stream[i]["t_grid"][0]) for i in range(n)]


def test_every_pass_has_every_sample_once_in_another_order():
    task = registry.add_task("t", ArraySource({"train": listed(50)}), ["t_grid"])
    stream = task.stream("train", seed=3)
    passes = [[int(stream[50 * e + i]["t_grid"][0]) for i in range(50)] for e in range(3)]
    assert all(sorted(p) == list(range(50)) for p in passes)
    assert len({tuple(p) for p in [*passes, range(50)]}) == 4
    # The next seed is not this seed's next pass.
    assert ids(task.stream("train", seed=4), 50) not in passes
    assert ids(task.stream("train", seed=3), 50) == passes[0]
    assert ids(task.stream("train", shuffle=False), 100) == 2 * list(range(50))
    assert len(task.stream("train", num_epochs=2)) == 100


@pytest.mark.parametrize("rates", [(0.6, 0.3, 0.1), (1, 1.009, 3), (1e-3, 1, 1 / 3)])
def test_rates_are_exact(rates):
    for i in range(len(rates)):
        registry.add_task(f"t{i}", ArraySource({"train": listed(5)}), ["t_grid"])
    mixture = registry.add_mixture("m", [(f"t{i}", r) for i, r in enumerate(rates)], masking=MASKING)
    weights = mixture.weights("train")
    np.testing.assert_allclose(np.array(weights) / sum(weights), np.array(rates) / sum(rates), rtol=1e-15)
    stream = mixture.stream("train", shuffle=False)
    drawn = np.array([stream[i]["task"] for i in range(4000)])
    counts = np.cumsum([drawn == i for i in range(len(rates))], axis=1)
    wanted = np.outer(np.array(weights) / sum(weights), np.arange(1, 4001))
    assert np.abs(counts - wanted).max() < len(rates)
    for block in range(4000 // sum(weights)):
        in_block = drawn[block * sum(weights) : (block + 1) * sum(weights)]
        assert collections.Counter(in_block.tolist()) == dict(enumerate(weights))


def test_a_task_goes_through_its_own_samples_whatever_the_rates(tmp_path):
    two_tasks(tmp_path)
    mixture = registry.add_mixture("m", [("a", 1.0), ("b", 2.5)], masking=MASKING)
    stream = mixture.stream("train", seed=1)
    of_b = [s for s in (stream[i] for i in range(28)) if s["task"] == 1][:14]
    values = [int(s["t_grid"][0]) for s in of_b]
    assert values == ids(registry.get_mixture("m").tasks[1].stream("train", seed=1), 14)
    assert sorted(values[:7]) == sorted(values[7:]) == list(range(1000, 1007))


def test_finite_mixture_has_every_sample_of_every_task(tmp_path):
    two_tasks(tmp_path)
    mixture = registry.add_mixture("m", [("a", 1.0), ("b", 100.0)], masking=MASKING)
    stream = mixture.stream("train", num_epochs=1)
    assert len(stream) == mixture.size("train") == 27
    assert sorted(ids(stream, 27)) == [*range(20), *range(1000, 1007)]


def test_tasks_of_a_mixture_may_have_different_modalities_and_splits(tmp_path):
    two_tasks(tmp_path)
    mixture = registry.add_mixture("m", [("b", 1.0), ("a", 1.0)], masking=MASKING)
    assert mixture.modalities.names == ("t_grid", "t_extra", "t_text", "t_pixels", "t_states")
    sample = next(s for s in (mixture.stream("train")[i] for i in range(9)) if s["task"] == 1)
    assert {n: sample[n].shape for n in mixture.modalities.names} == {
        "t_grid": (6,), "t_extra": (4,), "t_text": (0,), "t_pixels": (0, 12, 3), "t_states": (0, 7)
    }  # fmt: skip
    seqio.TaskRegistry.remove("a")
    registry.add_task("a", TokenSource(tmp_path, splits=["train"]), [m.name for m in ALL])
    mixture = registry.add_mixture("only_b_validates", [("b", 1.0), ("a", 1.0)], masking=MASKING)
    stream = mixture.stream("validation")
    assert [int(stream[i]["task"]) for i in range(3)] == [1, 1, 1], "the index does not depend on the split"
    with pytest.raises(ValueError, match=r"mixture 'only_b_validates': .*split.* Did you mean 'validation'"):
        mixture.stream("validaton")


@pytest.mark.parametrize("shards", [1, 4])
def test_seqio_get_dataset_gives_the_same_samples_in_the_same_order(tmp_path, shards):
    two_tasks(tmp_path)
    registry.add_mixture("m", [("a", 2.0), ("b", 1.0)], masking=MASKING)
    for name, provider in (("m", seqio.MixtureRegistry.get("m")), ("a", seqio.TaskRegistry.get("a"))):
        stream = provider.stream("train", seed=5)
        parts = [
            seqio.get_dataset(
                name, {}, seqio.PassThroughFeatureConverter(), "train", shuffle=True, num_epochs=None, seed=5,
                shard_info=seqio.ShardInfo(h, shards), verbose=False,
            )
            .take(48 // shards)
            .as_numpy_iterator()
            for h in range(shards)
        ]  # fmt: skip
        merged = itertools.chain.from_iterable(zip(*parts, strict=True))
        for i, example in enumerate(merged):
            for feature in provider.output_features:
                np.testing.assert_array_equal(example[feature], stream[i][feature])
            assert set(example) == set(provider.output_features)


def test_seqio_batches_cuts_and_ends(tmp_path):
    two_tasks(tmp_path)
    dataset = seqio.get_dataset(
        "a", {"t_text": 3}, seqio.PassThroughFeatureConverter(), "train", shuffle=False, num_epochs=1, verbose=False
    )
    texts = [e["t_text"] for e in dataset.as_numpy_iterator()]
    assert len(texts) == 20 and max(map(len, texts)) == 3
    np.testing.assert_array_equal(texts[5], arrays(TEXT, 20)[5][:3])
    with pytest.raises(ValueError, match="use_cached=True is not supported"):
        seqio.TaskRegistry.get("a").get_dataset(use_cached=True)


def test_preprocessors_run_in_order_and_are_checked():
    def double(sample):
        return {**sample, "t_grid": sample["t_grid"] * 2}

    def drop_last(sample):
        return {**sample, "t_grid": sample["t_grid"][:-1]}

    source = ArraySource({"train": listed(4)})
    task = registry.add_task("doubled", source, ["t_grid"], [double, double])
    assert ids(task.stream("train", shuffle=False), 4) == [0, 4, 8, 12]
    short = registry.add_task("short", source, ["t_grid"], [drop_last])
    with pytest.raises(ValueError, match="task 'short', modality 't_grid': split 'train', sample 2 has 5 tokens"):
        short.stream("train", shuffle=False)[2]


def test_unknown_names_are_answered_with_the_nearest():
    registry.add_task("one", ArraySource({"train": listed(2)}), ["t_grid"])
    registry.add_mixture("mix", [("one", 1.0)], masking=MASKING)
    with pytest.raises(KeyError, match="Did you mean 't_grid'"):
        registry.add_task("two", ArraySource({"train": []}), ["t_gird"])
    with pytest.raises(KeyError, match="Did you mean 'one'"):
        registry.add_mixture("mix2", [("onee", 1.0)], masking=MASKING)
    with pytest.raises(KeyError, match=r"data\.modules.* Did you mean 'mix'"):
        registry.get_mixture("mxi")
    with pytest.raises(ValueError, match="'one' is a task, which has no masking recipe"):
        registry.get_mixture("one")
    with pytest.raises(ValueError, match="t_grd"):
        masking = Masking(4, 4, tasks={"*": (MaskingComponent({"t_grd": 1.0}, 1.0),)})
        registry.add_mixture("mix3", [("one", 1.0)], masking=masking)


def test_bad_definitions_are_refused():
    registry.add_task("one", ArraySource({"train": listed(2)}), ["t_grid"])
    registry.add_task("none", ArraySource({"train": []}), ["t_grid"])
    for tasks, message in (([], "1 to 256"), ([("one", 0)], "is 0, expected"), ([("one", 1), ("one", 2)], "twice")):
        with pytest.raises(ValueError, match=message):
            registry.add_mixture("m", tasks, masking=MASKING)
    with pytest.raises(ValueError, match="split 'train' has no samples"):
        registry.add_mixture("m", [("none", 1)], masking=MASKING).stream("train")
    with pytest.raises(TypeError, match="expected a data_pipelines.sources.RandomAccessSource"):
        registry.add_task("two", seqio.FunctionDataSource(lambda split, shuffle_files: None, ["train"]), ["t_grid"])


def test_registering_again_must_be_the_same():
    def define(n=2, rate=1.0, factor=1):
        registry.add_modality(Modality("t_again", "tokens", vocab_size=8, grid=(1, 1)))
        task = registry.add_task(
            "one", ArraySource({"train": listed(n)}), ["t_grid"], [lambda s: {k: v * factor for k, v in s.items()}]
        )
        return task, registry.add_mixture("mix", [("one", rate)], masking=MASKING)

    assert define() == define()
    with pytest.raises(
        ValueError, match=r"task 'one' is registered already, with another definition: .*remove\('one'\)"
    ):
        define(n=3)
    with pytest.raises(ValueError, match="mixture 'mix' is registered already"):
        define(rate=2.0)
    with pytest.raises(ValueError, match="'t_again' is registered already, differently"):
        registry.add_modality(Modality("t_again", "tokens", vocab_size=9, grid=(1, 1)))


def test_rates_may_be_functions_of_the_task(tmp_path):
    two_tasks(tmp_path)
    rate = seqio.mixing_rate_num_examples
    seqio.TaskRegistry.remove("a")
    registry.add_task("a", ArraySource({"train": listed(21), "validation": []}), ["t_grid"])
    mixture = registry.add_mixture("m", [("a", rate), ("b", rate)], masking=MASKING)
    assert mixture.weights("train") == [3, 1]


def test_module_may_be_imported_twice(tmp_path):
    path = tmp_path / "twice.py"
    path.write_text(
        "import numpy as np\n"
        "from data_pipelines import registry, sources\n"
        "source = sources.ArraySource({'train': [{'t_grid': np.zeros(6, int)}]})\n"
        "def same(sample): return sample\n"
        "task = registry.add_task('twice', source, ['t_grid'], [same])\n"
    )
    modules = []
    for name in ("first", "second"):
        spec = importlib.util.spec_from_file_location(name, path)
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    assert modules[0].task is modules[1].task


def test_example_is_short_and_runs(tmp_path, monkeypatch):
    """The example of the README: a new modality and a mixture in at most 30 lines, executed as its text says."""
    monkeypatch.setenv("FM4M_ROOMS", str(tmp_path))
    for module in ("data_pipelines.mixtures.rooms", "data_pipelines.rooms.modalities"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for registered in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for name in ("rooms_64", "rooms"):
            registered.remove(name)
    rooms = importlib.import_module("data_pipelines.mixtures.rooms")
    rng = np.random.default_rng(0)
    for split, n in (("train", 9), ("validation", 4)):
        for name in rooms.MODALITIES:
            m = modalities.get(name)
            if m.kind == "pixels":
                samples = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(n)]
            else:
                samples = [rng.integers(0, m.vocab_size, 64 if m.kind == "tokens" else 5) for _ in range(n)]
            records.write_modality(tmp_path, split, m, samples, keys(n))

    path = pathlib.Path(rooms.__file__).with_name("example_edges.py")
    assert len(path.read_text().splitlines()) <= 30
    runpy.run_path(str(path), run_name="__main__")
    mixture = registry.get_mixture("rooms_edges")
    samples = [mixture.stream("train", shuffle=False)[i] for i in range(36)]
    codes = np.stack([s["edges@64"] for s in samples if s["task"] == 1])
    assert codes.shape == (9, 64) and len(np.unique(codes)) > 8
    assert all(s["edges@64"].size == 0 for s in samples if s["task"] == 0)
    for module in ("data_pipelines.mixtures.rooms", "data_pipelines.rooms.modalities"):
        monkeypatch.delitem(sys.modules, module)
