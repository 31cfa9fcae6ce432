"""Tokenizer training on small made-up arrays: it learns, continues exactly, and does not depend on the devices."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fork_runs import Runs

from configs.tokenizers import ml4m, rooms, rooms128
from fm4m import checkpoint, files, metrics, optim, sharding
from fm4m.config_file import ConfigError
from fm4m.tokenizers import arrays, augment, io, quantize, report, train, train_config, train_step
from fm4m.tokenizers.config import VQConfig

TINY = {
    "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16, "decoder_depth": 1,
    "decoder_heads": 2, "codebook_size": 16, "latent_dim": 8,
}  # fmt: skip


def tiny(domain: str = "rgb", **changes):
    """The shipped configuration, shrunk to 16x16 images and a network that trains in a second or two."""
    config = rooms.get_config(domain)
    config.model.update(TINY)
    config.model.image_size = (16, 16)
    config.train.update({"total": "12 steps", "autoencoder_steps": 4})
    config.optimizer.warmup = "2 steps"
    config.log.update({"every": 4, "pictures_every": 0, "tensorboard": False, "progress_bar": False})
    config.checkpoint.update({"every": 5, "asynchronous": False})
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def scenes(domain: str, count: int = 40) -> np.ndarray:
    """Two flat halves per image, split at a random row: few codes describe them."""
    rng = np.random.default_rng(0)
    lower = np.arange(16)[None, :, None] >= rng.integers(1, 16, (count, 1, 1))
    lower = np.broadcast_to(lower, (count, 16, 16))
    if domain == "depth":
        return np.where(lower, 2.0, 5.0 + rng.uniform(0, 0.1, (count, 1, 1))).astype(np.float32)
    if domain == "semseg":
        return np.where(lower, 2, 1).astype(np.uint8)
    return np.where(lower[..., None], [128, 250, 128], [128, 128, 250]).astype(np.uint8)


def source(config, count: int = 40) -> arrays.Rows:
    model = train_config.model_config(config)
    return arrays.Rows(model, scenes(model.domain, count), {"scenes": model.domain})


def run(config, workdir) -> train.Result:
    data = source(config)
    return train.train(config, workdir, data, data)


# One length and one configuration, so that programs are compiled once.
OPTIONS = {"data__crop_scale": (0.8, 1.0), "train__total": "60 steps", "train__autoencoder_steps": 6,
           "codebook__dead_code_coefficient": 1.0, "optimizer__blr": 0.1, "log__every": 20}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run(tiny(**OPTIONS), folder), folder


def test_it_learns_and_writes_what_it_says(whole):
    result, folder = whole
    flat = scenes("rgb").astype(float)
    flat = 10 * np.log10(255**2 / np.mean((flat - flat.mean((1, 2), keepdims=True)) ** 2))
    assert result.numbers["psnr_db"] > flat + 1
    rows = metrics.read_metrics(folder)
    assert [row["step"] for row in rows] == [20, 40, 60, 60]
    assert rows[2]["train/reconstruction"] < 0.7 * rows[0]["train/reconstruction"]
    assert 0 < rows[2]["codebook/use"] <= 1 and 1 <= rows[2]["codebook/perplexity"] <= 16
    assert rows[3]["validation/psnr_db"] == result.numbers["psnr_db"]
    assert json.loads((folder / "config.json").read_text())["train"]["total"] == "60 steps"
    assert (folder / "pictures" / "00000060_rgb.png").is_file()
    assert checkpoint.load_params(folder, ema=True)[1]["step"] == 60


def test_continues_exactly(whole, tmp_path):
    """Crops, flips, k-means after step 6 and dead codes; preempted after steps 6 and 58, the newest step damaged."""
    result, folder = whole
    first = run(tiny(**OPTIONS, train__stop_after=6), tmp_path)
    assert first.step == 6 and first.numbers == {}
    assert run(tiny(**OPTIONS, train__stop_after=53), tmp_path).step == 58
    steps = tmp_path / "checkpoints"
    largest = max((f for f in (steps / "55").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    last = run(tiny(**OPTIONS), tmp_path)
    assert last.numbers == result.numbers and {"damaged-55", "55", "60"} <= {f.name for f in steps.iterdir()}
    for left, right in zip(jax.tree.leaves(result.state), jax.tree.leaves(last.state), strict=True):
        np.testing.assert_array_equal(left, right)
    # What was written after the newest checkpoint before a preemption is replaced.
    rows = [[r for r in metrics.read_metrics(w) if "optimizer/lr" in r] for w in (folder, tmp_path)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [20, 40, 60]
    assert rows[0][1]["train/loss"] == rows[1][1]["train/loss"]
    other = tiny(**OPTIONS)
    other.seed = 1
    with pytest.raises(checkpoint.CheckpointError, match=r"seed was 0, is 1"):
        run(other, tmp_path)


def main():
    """A run in a process of its own, for the next test: FOLDER, and the file to write."""
    folder, file = sys.argv[1:]
    io.save(file, run(tiny(**OPTIONS), folder).tokenizer)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_file(whole, tmp_path):
    expected, file = tmp_path / "expected.safetensors", tmp_path / "rgb.safetensors"
    io.save(expected, whole[0].tokenizer)
    argv, log = [str(tmp_path / "run"), str(file)], tmp_path / "log"
    with Runs("test_tokenizers_train") as runs:
        pid = runs.start(argv, log)
        while not (tmp_path / "run" / "checkpoints" / "20").exists() and pathlib.Path(f"/proc/{pid}").exists():
            time.sleep(0.001)
        time.sleep(np.random.default_rng(time.time_ns()).uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert runs.wait() == -signal.SIGKILL, log.read_text()[-3000:]
        runs.start(argv, log)
        assert runs.wait() == 0, log.read_text()[-3000:]
    assert file.read_bytes() == expected.read_bytes()


def test_frozen_encoder_trains_the_decoder_alone(whole, tmp_path):
    result, _ = whole
    io.save(tmp_path / "a.safetensors", result.tokenizer)
    config = tiny(train__init_from=str(tmp_path / "a.safetensors"), train__freeze_encoder=True,
                  train__autoencoder_steps=0, train__total="2 steps", codebook__kmeans=False,
                  optimizer__warmup="0 steps")  # fmt: skip
    config.model.decoder_dim = 24
    second = run(config, tmp_path / "b")
    for group in ("encoder", "quant_proj"):
        for left, right in zip(*(jax.tree.leaves(r.tokenizer.params[group]) for r in (result, second)), strict=True):
            np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(result.tokenizer.codebook["embed"], second.tokenizer.codebook["embed"])
    assert second.state["opt_state"]["mu"].keys() == {"post_quant_proj", "decoder"}
    config.model.encoder_dim = 32
    with pytest.raises(ConfigError, match=r"encoder/blocks/attn/proj/bias .*16.*32"):
        run(config, tmp_path / "c")


def four_devices() -> None:
    """Runs in a process with four devices: one and four of them agree, with parameters split and copied."""
    train_step.SMALLEST_SPLIT = 64
    config = tiny(train__min_size=8, train__size_step=8, codebook__dead_code_coefficient=0.5,
                  data__crop_scale=(0.8, 1.0), optimizer__eps=1e-3)  # fmt: skip
    data = source(config)
    found, start = {}, None
    for shape in ((1, 1), (2, 2)):
        prepared, _ = train.prepare(config, data)
        prepared.mesh = mesh = sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
        abstract = train_step.abstract_state(config, prepared.model, prepared.optimizer, mesh)
        where = jax.tree.map(lambda x: x.sharding, abstract)
        make = lambda p=prepared: train_step.init_state(config, p.model, p.optimizer)  # noqa: E731
        start = jax.device_get(jax.jit(make)()) if start is None else start
        state = jax.device_put(start, where)
        step = train_step.make_step(
            config, prepared.model, {}, prepared.optimizer, prepared.sizes, prepared.steps, mesh
        )
        kernel = state["params"]["network"]["encoder"]["proj"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // shape[1]
        batches, values = train.device_batches(prepared, 0, 3), []
        for batch in batches:
            state, metric = step(state, batch, (8, 8), True)
            values.append(jax.device_get(metric))
        found[shape] = values, jax.device_get(state)
    (values, state), (split_values, split_state) = found[1, 1], found[2, 2]
    for a, b in zip(values, split_values, strict=True):
        np.testing.assert_array_equal(a["counts"], b["counts"])
        assert a["counts"].sum() == 16
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(split_state), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_one_and_four_devices_agree():
    here = pathlib.Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    code = "import test_tokenizers_train as t; t.four_devices()"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def traced(config):
    """The metrics of one step and the new state, as shapes."""
    config.train.global_batch = 2
    train_config.validate(config)
    model, mesh = train_config.model_config(config), sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    sizes, optimizer = train_config.sizes(config, model), optim.adamw(optim.schedule(1e-3, 10, 2))
    abstract = train_step.abstract_state(config, model, optimizer, mesh)
    stats = {name: np.ones(model.channels, np.float32) for name in ("mean", "std")}
    step = train_step.make_step(config, model, stats, optimizer, sizes, 10, mesh)
    dtype = jnp.float32 if model.domain in ("depth", "features", "vector") else jnp.uint8
    batch = jax.ShapeDtypeStruct((2, *model.array_shape), dtype, sharding=sharding.batch_sharding(mesh))
    state, values = jax.eval_shape(lambda s, b: step(s, b, sizes[0], True), abstract, batch)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, abstract)
    return model, abstract, values, sizes


def looks(images):
    """An extractor of two maps, for the perceptual loss."""
    return [images[:, ::2], images[:, ::4]]


# Tracing a UNet takes five seconds, and those of a domain's stages and of other domains differ in numbers only.
FAST = ("semseg-stage2", "dinov2-stage2", "pose", "sam", "rgb-percept")
TRACED = (*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in ("rgb", "depth-stage2", "rgb-uvit")))


@pytest.mark.parametrize("name", ml4m.NAMES)
def test_every_released_recipe_is_a_configuration(name):
    config = ml4m.get_config(name)
    config.data.train = config.data.validation = "images:anywhere"
    train_config.validate(config)
    model = train_config.model_config(config)
    sizes = train_config.sizes(config, model)
    assert sizes[-1] == model.image_size
    assert len(sizes) == (9 if name in ("dinov2-stage2", "imagebind-stage2") else 8 if model.image_size[0] > 224 else 1)
    assert bool(config.train.init_from) == ("stage2" in name or name.startswith("rgb-uvit"))


@pytest.mark.parametrize("name", TRACED)
def test_released_recipe(name):
    config = ml4m.get_config(name)
    config.data.train = "images:anywhere"
    if config.loss.perceptual:
        config.loss.perceptual = "test_tokenizers_train:make_looks"
    model, state, values, _ = traced(config)
    assert values["counts"].shape == (model.num_codebooks * model.codebook_size,)
    assert ("perceptual" in values) == name.startswith("rgb-percept")
    assert ("encoder" in state["opt_state"]["mu"]) != name.startswith("rgb-uvit")


def make_looks():
    return looks


@pytest.mark.parametrize("module, domain", [(rooms, d) for d in rooms.CHANNELS] + [(rooms128, "rgb")])
def test_shipped_configuration(module, domain):
    config = module.get_config(domain)
    if domain == "semseg":
        config.model.num_classes = 48
    config.data.train = "images:none"
    train_config.validate(config)
    assert train_config.model_config(config).grid == ((16, 16) if module is rooms128 else (8, 8))
    with pytest.raises(ValueError, match="sound"):
        module.get_config("sound")


def test_what_cannot_run_is_refused(tmp_path):
    config = tiny()
    with pytest.raises(ConfigError, match=r"5 arrays are fewer than train\.global_batch = 16"):
        train.prepare(config, source(config, 5))
    with pytest.raises(ValueError, match="expects uint8"):
        arrays.Rows(train_config.model_config(config), scenes("rgb").astype(np.float32), {})
    for key, value, message in [
        ("data.train", "zip:x", "rooms:PATH"), ("data.train", f"images:{tmp_path}", "no pictures"),
        ("data.train", "features:none.npy", "no features file"), ("train.total", "3 days", "'20 epochs'"),
        ("train.autoencoder_steps", 12, "below the 12 steps"), ("train.min_size", 12, "do not lead"),
        ("train.freeze_encoder", True, "init_from"), ("loss.name", "cross_entropy", "class ids"),
    ]:  # fmt: skip
        config = tiny()
        section, name = key.split(".")
        config[section][name] = value
        with pytest.raises((ConfigError, ValueError), match=message):
            prepared, _ = train.prepare(config, None if section == "data" else source(tiny()))
            train_step.make_step(config, prepared.model, {}, prepared.optimizer, prepared.sizes, 12, prepared.mesh)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, monkeypatch):
    values = {"reconstruction": 1.0, "commitment": 0.0, "grad_norm": 1.0, "lr": 1e-3}
    losses = iter([1.0, 1.0, np.nan, 1.0])
    monkeypatch.setattr(train_step, "make_step", lambda *_: lambda state, *_: (state, values | {"loss": next(losses)}))
    config = tiny(train__autoencoder_steps=0, codebook__kmeans=False)
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan.*Lower optimizer\.blr"):
        run(config, tmp_path)


def test_command_line(capsys, tmp_path):
    known = ["train", f"--config={rooms.__file__}:rgb", "--config.train.total=3 steps", f"--out={tmp_path}/a.b"]
    config, workdir, out = train_config.from_command_line(known)
    assert config.train.total == "3 steps" and (workdir, out) == (tmp_path / "a.run", tmp_path / "a.b")
    for wrong, message in [
        (["--config.train.totl=3"], "train.total"), (["--config.seed=x"], "seed"), (["extra"], "'extra' is not a flag")
    ]:  # fmt: skip
        assert train.main([*known, *wrong]) == 2
        assert message in capsys.readouterr().err
    for wrong, message in [
        ("train.init_from=x", "codebook.kmeans = True: must be False: train.init_from has the codes"),
        ("data.crop_scale=('a','b')", "data.crop_scale"), ("optimizer.blr=inf", "must be a finite number"),
    ]:  # fmt: skip
        assert train.main([*known, f"--config.{wrong}"]) == 2
        assert message in capsys.readouterr().err
    assert train.main([*known[:-1], "--workdir=gs://bucket/x"]) == 2
    assert "gs://bucket/x: a tokenizer is trained in a local folder" in capsys.readouterr().err
    assert train.main(["train", f"--config={rooms.__file__}:sound", "--out=x"]) == 2
    assert "no tokenizer for 'sound'" in capsys.readouterr().err


def test_a_disk_that_fills_up_is_one_sentence(monkeypatch, capsys, tmp_path):
    def full(*_):
        with files.writing("metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "run_to_file", full)
    # Its handler would outlive the captured stream that it writes to.
    monkeypatch.setattr(train.logging, "basicConfig", lambda **_: None)
    assert train.main(["train", f"--config={rooms.__file__}:rgb", f"--out={tmp_path}/a.safetensors"]) == 1
    assert capsys.readouterr().err.startswith("error: metrics.jsonl cannot be written: No space left")


def test_order_and_sizes_are_functions_of_seed_and_step():
    seen = [arrays.rows_of_step(0, step, 10, 3) for step in range(6)]
    assert len(set(np.concatenate(seen[:3]))) == 9 == len(set(np.concatenate(seen[3:])))
    assert not np.array_equal(seen[0], seen[3])
    sizes = tuple((n, n) for n in (224, 256, 288))
    drawn = [train_step.size_of_step(0, step, sizes) for step in range(60)]
    assert set(drawn) == set(sizes) and drawn != [train_step.size_of_step(1, step, sizes) for step in range(60)]


def test_augmentation():
    model = VQConfig("rgb", (8, 8), 4, 3)
    keys = jax.jit(train_step.row_keys, static_argnums=(0, 2))(0, jnp.int32(3), 1, jnp.arange(64))
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None] * 30, (64, 8, 8))
    picture = np.stack([ramp, ramp.swapaxes(1, 2), np.full_like(ramp, 77)], -1)
    crop = jax.jit(augment.random_crop, static_argnums=(0, 3))
    cut = np.asarray(crop(model, keys, picture, (0.25, 0.25)))
    assert cut.dtype == np.uint8 and (cut[..., 2] == 77).all()
    slope = np.diff(cut[:, 2:6, 4, 0].astype(float), axis=1).mean(1) / 30
    # A quarter of the area in shapes from 3:4 to 4:3: half of the height times its root, and no two crops alike.
    assert 0.4 < slope.min() < 0.46 and 0.54 < slope.max() < 0.62
    classes = VQConfig("semseg", (8, 8), 4, 1, num_classes=255)
    ids = np.where(ramp > 100, 250, 3).astype(np.uint8)
    assert set(np.unique(crop(classes, keys, ids, (0.3, 0.5)))) == {3, 250}
    assert set(np.unique(augment.resize(classes, ids, (4, 4)))) == {3, 250}
    half = np.asarray(jax.jit(augment.resize, static_argnums=(0, 2))(model, picture, (4, 4)))
    np.testing.assert_array_equal(half[0, 1:3, 0, 0], [75, 135])
    flipped = np.asarray(jax.jit(augment.random_flip, static_argnums=0)(model, keys, picture))
    mirrored = (flipped[:, 0, 0, 1] == 210).mean()
    assert 0.3 < mirrored < 0.7


def test_pictures_of_a_folder(tmp_path, caplog):
    from PIL import Image

    (tmp_path / "deep").mkdir()
    for i in range(5):
        Image.fromarray(np.full((20 + i, 30, 3), 40 * i, np.uint8)).save(tmp_path / "deep" / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    model = VQConfig("rgb", (8, 8), 4, 3)
    folder = arrays.open_source(f"images:{tmp_path}", model, "data.train")
    rows = folder.read(np.arange(6))
    # In the order of names: the broken one is replaced by the next.
    assert len(folder) == 6 and rows[:, 0, 0, 0].tolist() == [0, 0, 40, 80, 120, 160]
    assert "1.png is left out" in caplog.text

    def batches(**shard):
        return list(arrays.batches(folder, seed=0, first=3, last=6, batch=4, random_crops=True, **shard))

    whole, parts = batches(), [batches(shard=i, shards=2) for i in range(2)]
    for step in range(3):
        np.testing.assert_array_equal(whole[step], np.concatenate([p[step] for p in parts]))
    depth = np.arange(400, dtype=np.uint16).reshape(20, 20) * 100
    (tmp_path / "d").mkdir()
    Image.fromarray(depth).save(tmp_path / "d" / "0.png")
    found = arrays.PictureFolder(tmp_path / "d", VQConfig("depth", (20, 20), 4, 1)).read(np.arange(1))
    np.testing.assert_allclose(found[0], depth / 65535.0, rtol=1e-6)


def test_features_of_a_file(tmp_path):
    np.save(tmp_path / "f.npy", np.random.default_rng(0).normal(size=(20, 4, 4, 6)).astype(np.float16))
    config = tiny("features")
    config.model.patch_size = 1
    config.data.train = config.data.validation = f"features:{tmp_path / 'f.npy'}"
    prepared, _ = train.prepare(config)
    assert prepared.model.array_shape == (4, 4, 6) and prepared.stats["pca"].shape == (6, 3)
    assert prepared.source.read(np.array([3])).dtype == np.float32


def test_replacement_rows_and_counts():
    rows = jnp.arange(12.0).reshape(6, 2)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec()
    pick = lambda r: train_step.rows_of_all(jax.random.key(0), r, 6)  # noqa: E731
    pick = jax.jit(sharding.local_rows(pick, mesh, (spec,), spec))
    assert sorted(np.asarray(pick(rows))[:, 0].tolist()) == [0, 2, 4, 6, 8, 10]
    model = VQConfig("vector", (1, 1), 1, 8, quantizer="memcodes", num_codebooks=2, codebook_size=4, latent_dim=8,
                     encoder="mlp", decoder="mlp")  # fmt: skip
    counts = np.asarray(jax.jit(lambda c: train_step.count_codes(model, c))(jnp.array([[[1, 1]], [[1, 3]]])))
    assert counts.tolist() == [0, 2, 0, 0, 0, 1, 0, 1]
    used, _ = quantize.usage(counts)
    window = report.Window(2)
    step = {"loss": 1.0, "reconstruction": 1.0, "commitment": 0.0, "lr": 0.1, "grad_norm": 2.0}
    window.add(step)
    window.add(step | {"counts": np.asarray(counts), "loss": 3.0})
    row = window.close()
    assert row["train/loss"] == 2.0 and row["codebook/use"] == pytest.approx(float(used)) == pytest.approx(3 / 8)
