"""Trains a tokenizer.

    python -m fm4m.tokenizers.train --config=configs/tokenizers/rooms.py:depth --out=depth.safetensors
        [--workdir=runs/depth] [--config.train.total="500 steps" ...]

The run's folder (by default ``depth.run`` beside the file) gets config.json, metrics.jsonl with TensorBoard events,
checkpoints, and pictures of held-out inputs above their reconstructions. Run the same command again to continue from
the newest checkpoint; the result is the same, bit for bit, as without the interruption. At the end the averaged
weights are written to --out, with a picture beside them, and the domain's reconstruction numbers, codebook use and
perplexity on the validation source are printed for the file as written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m import checkpoint, files, metrics, optim, processes, sharding
from fm4m.config_file import ConfigError
from fm4m.tokenizers import arrays, io, preprocess, quantize, train_config, train_step, vqvae_model
from fm4m.tokenizers.config import VQConfig
from fm4m.tokenizers.report import Window, evaluate, picture_sheet
from fm4m.tokenizers.tokenizer import Tokenizer

log = logging.getLogger("fm4m")

# Latents per code given to the k-means that initialises the codebook.
KMEANS_LATENTS_PER_CODE = 32
# Values that mean, deviation and principal components of features are taken from: 1 GiB of them.
STATS_VALUES = 2**28


@dataclasses.dataclass
class Result:
    """How a run ended: steps made in all, the train state, the tokenizer with averaged weights, and its numbers on the
    validation source ({} for a run that stopped early)."""

    step: int
    state: train_step.State
    tokenizer: Tokenizer
    numbers: dict[str, float]


@dataclasses.dataclass
class Run:
    """What all parts of a run share."""

    config: Any
    model: VQConfig
    stats: preprocess.Stats
    source: arrays.Source
    sizes: tuple[tuple[int, int], ...]
    steps: int
    optimizer: optim.Optimizer
    mesh: Any


def train(
    config: Any, workdir: str | os.PathLike, source: arrays.Source | None = None, held_out: arrays.Source | None = None
) -> Result:
    """Trains until ``config.train.total``; continues from the newest checkpoint in ``workdir``.

    Args:
      config: from `train_config.default`.
      workdir: folder of the run.
      source, held_out: what to train on and to evaluate with; default those that ``config.data`` names.

    Raises:
      ConfigError: a configuration that cannot run, such as a source with fewer arrays than a batch.
      CheckpointError: a checkpoint in ``workdir`` that belongs to another run.
      ArrayError: arrays that cannot be read.
      FloatingPointError: the loss or the gradient stopped being finite; the message names the step.
    """
    workdir, lead = pathlib.Path(workdir), jax.process_index() == 0
    run, start = prepare(config, source)
    held_out = held_out or _open(config, run.model, "data.validation")
    log.info("tokenizer %s: %d arrays to train on, %d held out; %d steps of %d", run.model.name, len(run.source),
             len(held_out), run.steps, config.train.global_batch)  # fmt: skip

    try:
        one_step = train_step.make_step(
            config, run.model, run.stats, run.optimizer, run.sizes, run.steps, run.mesh
        )
    except ValueError as error:  # a loss that does not fit
        raise ConfigError(str(error)) from error
    saved = config.checkpoint
    checkpoints = checkpoint.Checkpoints(
        workdir, every=saved.every, keep=saved.keep, asynchronous=saved.asynchronous
    )
    identity = train_config.identity(config, run.source.description)
    state, first = restore(run, checkpoints, identity, start, workdir)
    if lead:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
    writer = metrics.MetricWriter(workdir, active=lead, tensorboard=config.log.tensorboard, step=first)
    writer.text("config", f"```\n{config.to_json_best_effort(indent=2)}\n```")

    stop = min(run.steps, first + config.train.stop_after) if config.train.stop_after else run.steps
    shown = held_out.read(np.arange(min(config.eval.samples or len(held_out), len(held_out))))
    batches = device_batches(run, first, stop)
    progress = metrics.Progress(run.steps, first, active=lead, bar=config.log.progress_bar)
    window, pending, numbers, compiled = Window(config.train.global_batch), None, {}, set()

    def finish(pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        # The values of the step before the one that runs now: fetching them makes no device wait.
        if pending is None:
            return
        done, values = pending[0], jax.device_get(pending[1])
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']}; the newest checkpoint is "
                f"step {checkpoints.latest()}. Lower optimizer.blr or lengthen optimizer.warmup"
            )
        window.add(values)
        if done % config.log.every == 0 or done == stop:
            row = window.close()
            writer.write(done, row)
            use = f"  codes {row['codebook/use']:.0%}" if "codebook/use" in row else ""
            progress.report(done, f"loss {row['train/loss']:.4f}{use}  {row['speed/arrays_per_s']:.0f} arrays/s")
        progress.advance()

    def judge(step: int) -> dict[str, float]:
        found = evaluate(tokenizer_of(run, state), shown)
        writer.write(step, {f"validation/{name}": value for name, value in found.items()})
        return found

    try:
        for step in range(first + 1, stop + 1):
            if step - 1 == config.train.autoencoder_steps and config.codebook.kmeans:
                window.pause()
                state["params"]["codebook"] = fit_codebook(run, state["params"]["network"])
                window.resume()
            size = train_step.size_of_step(config.seed, step - 1, run.sizes)
            quantised = step > config.train.autoencoder_steps
            ready = next(batches)
            if fresh := (size, quantised) not in compiled:
                compiled.add((size, quantised))
                window.pause()
                begun = time.perf_counter()
            state, values = one_step(state, ready, size, quantised)
            if fresh:
                window.resume()
                seconds = time.perf_counter() - begun
                log.info("compiled the step for %d x %d pixels%s in %.0f s", *size,
                         "" if quantised else ", without codes", seconds)  # fmt: skip
            finish(pending)
            pending, last = (step, values), step == run.steps
            drawn = last or _multiple(step, config.log.pictures_every)
            judged = last or _multiple(step, config.eval.every)
            if step == stop or checkpoints.due(step) or drawn or judged:
                finish(pending)
                pending = None
                window.pause()
                if last or checkpoints.due(step):
                    checkpoints.save(state, _meta(config, step, identity))
                if judged:
                    found = judge(step)
                    numbers = found if last else numbers
                if drawn:
                    writer.pictures(step, {run.model.name: picture_sheet(tokenizer_of(run, state), shown)})
                window.resume()
        if first >= run.steps:
            log.info("nothing is left to train: step %d of %d is saved", first, run.steps)
            numbers = judge(first)
    finally:
        progress.close()
        try:
            checkpoints.wait()
        finally:
            checkpoints.close()
            writer.close()
    return Result(max(first, stop), state, tokenizer_of(run, state), numbers)


# ---- what a run is made of


def prepare(config: Any, source: arrays.Source | None = None) -> tuple[Run, Tokenizer | None]:
    """Everything but the state, and the tokenizer that the run starts from. Raises ConfigError."""
    train_config.validate(config)
    try:
        start = io.load(config.train.init_from) if config.train.init_from else None
        model = train_config.model_config(config)
        source = source or _open(config, model, "data.train")
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error
    batch = config.train.global_batch
    if len(source) < batch:
        raise ConfigError(f"{len(source)} arrays are fewer than train.global_batch = {batch}")
    if model.domain == "vector" and config.data.flip:
        raise ConfigError("data.flip = True: vectors cannot be mirrored")
    if start is not None:
        model = dataclasses.replace(model, class_names=start.config.class_names, palette=start.config.palette)
    stats = dict(start.stats) if start is not None else {}
    if model.domain in ("features", "vector") and not stats:
        count = min(len(source), max(STATS_VALUES // int(np.prod(model.array_shape)), batch))
        stats = preprocess.feature_stats(source.read(np.linspace(0, len(source) - 1, count).astype(np.int64)))

    lengths = {"batch": batch, "count": len(source)}
    steps = train_config.length(config.train.total, "train.total", **lengths)
    if not 0 <= config.train.autoencoder_steps < max(steps, 1):
        raise ConfigError(f"train.autoencoder_steps = {config.train.autoencoder_steps} must be below the {steps} steps "
                          "of train.total")  # fmt: skip
    if steps < 1:
        raise ConfigError(f"train.total = {config.train.total!r} makes no step")
    if config.codebook.kmeans and not quantize.has_codebook(model):
        raise ConfigError(f"codebook.kmeans = True: quantizer {model.quantizer!r} has no codes to place; use False")
    o = config.optimizer
    warmup = train_config.length(o.warmup, "optimizer.warmup", **lengths)
    rate = optim.schedule(o.blr * batch / 256, steps, warmup, o.schedule)
    optimizer = optim.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, batch)
    return Run(config, model, stats, source, train_config.sizes(config, model), steps, optimizer, mesh), start


def _open(config: Any, model: VQConfig, key: str) -> arrays.Source:
    try:
        return arrays.open_source(config.data[key.split(".")[1]], model, key, tuple(config.data.crop_scale))
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error


def restore(
    run: Run, checkpoints: checkpoint.Checkpoints, identity: dict, start: Tokenizer | None, workdir: pathlib.Path
) -> tuple[train_step.State, int]:
    """State and step of the newest checkpoint that is whole, or a new state and 0.

    Raises CheckpointError for another run's.
    """
    abstract = train_step.abstract_state(run.config, run.model, run.optimizer, run.mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)

    def check(meta: dict) -> None:
        saved = meta.get("identity")
        if saved is None:
            raise checkpoint.CheckpointError(f"{workdir} holds no training of a tokenizer; give another --workdir")
        for key in [*saved, *(k for k in identity if k not in saved)]:
            if saved.get(key) != identity.get(key):
                raise checkpoint.CheckpointError(
                    f"{workdir} holds step {meta['step']} of another run: {key} was {saved.get(key)!r}, is "
                    f"{identity.get(key)!r}. Continue it with its own configuration (config.json beside it), or give "
                    "this run another --workdir"
                )

    if found := checkpoints.restore_newest({k: v for k, v in abstract.items() if k != "step"}, check):
        state, step = found[0], found[1]["step"]
        state["step"] = jax.jit(lambda: jnp.asarray(step, jnp.int32), out_shardings=where["step"])()
        log.info("continuing at step %d", step)
        return state, step
    make = functools.partial(train_step.init_state, run.config, run.model, run.optimizer)
    state = jax.jit(make, out_shardings=where)()
    return (state if start is None else start_from(run, state, start)), 0


def start_from(run: Run, state: train_step.State, start: Tokenizer) -> train_step.State:
    """The state with what ``train.init_from`` holds: encoder and codebook, and every other group that fits.

    Raises ConfigError naming the first array of encoder or codebook that does not.
    """
    name, network = run.config.train.init_from, dict(state["params"]["network"])
    leaves = jax.tree_util.tree_leaves_with_path
    shapes = lambda tree: {optim.path_name(p): x.shape for p, x in leaves(tree)}  # noqa: E731

    def place(values: Any, like: Any) -> Any:
        return jax.tree.map(lambda v, x: jax.device_put(np.asarray(v, x.dtype), x.sharding), values, like)

    for group, fresh in network.items():
        have, want = shapes(start.params.get(group, {})), shapes(fresh)
        if have == want:
            network[group] = place(start.params[group], fresh)
        elif group in train_step.ENCODER_GROUPS:
            wrong = next(k for k in [*want, *have] if have.get(k) != want.get(k))
            raise ConfigError(f"train.init_from = {name!r} has {group}/{wrong} {have.get(wrong)}, the model "
                              f"{want.get(wrong)}; use the encoder's fields of its configuration")  # fmt: skip
        else:
            log.info("%s of %s does not fit; it starts from random weights", group, name)
    params = {"network": network}
    if "codebook" in state["params"]:
        have, want = shapes(dict(start.codebook)), shapes(state["params"]["codebook"])
        if have != want:
            raise ConfigError(f"train.init_from = {name!r} has a codebook {have}, but the model's is {want}")
        params["codebook"] = place(dict(start.codebook), state["params"]["codebook"])
    new = state | {"params": params}
    # A copy, because the step donates its state and one buffer cannot be donated twice.
    return new | ({"ema": jax.tree.map(jnp.copy, network)} if "ema" in state else {})


def device_batches(run: Run, first: int, last: int) -> Any:
    """Batches of steps ``first`` .. ``last`` - 1 on the devices; every process reads and sends its own rows."""
    batch = run.config.train.global_batch
    shard, shards = sharding.loader_shard(run.mesh, batch)
    random_crops = tuple(run.config.data.crop_scale) != (1.0, 1.0)
    local = arrays.batches(run.source, seed=run.config.seed, first=first, last=last, batch=batch, shard=shard,
                           shards=shards, random_crops=random_crops)  # fmt: skip
    return (sharding.to_devices(run.mesh, rows, batch) for rows in local)


def fit_codebook(run: Run, network: train_step.Params) -> quantize.Codebook:
    """A codebook by k-means on the network's latents for a random sample of the training source, on all devices."""
    config, model, batch = run.config, run.model, run.config.train.global_batch
    tokens = model.grid[0] * model.grid[1]
    wanted = -(-KMEANS_LATENTS_PER_CODE * model.codebook_size // tokens)
    count = max(min(len(run.source), wanted) // batch, 1) * batch  # whole batches: one shape to compile
    sample = np.random.default_rng([config.seed, 3]).choice(len(run.source), count, replace=False)
    local = sharding.on_one_device(network)
    encode = jax.jit(lambda network, x: vqvae_model.encode(model, network, preprocess.to_input(model, run.stats, x)))
    chunks = [encode(local, run.source.read(rows)) for rows in sample.reshape(-1, batch)]
    latents = jnp.concatenate(chunks).reshape(-1, model.latent_dim)
    key = jax.random.fold_in(jax.random.key(config.seed), run.steps)
    codebook = quantize.kmeans_init(model, key, latents, batch * tokens)
    everywhere = sharding.replicated(run.mesh)
    put = lambda x: jax.make_array_from_callback(x.shape, everywhere, np.asarray(x).__getitem__)  # noqa: E731
    return jax.tree.map(put, codebook)


def tokenizer_of(run: Run, state: train_step.State) -> Tokenizer:
    """The tokenizer with the averaged weights, on one device."""
    params = sharding.on_one_device(state.get("ema", state["params"]["network"]))
    codebook = sharding.on_one_device(state["params"].get("codebook", {}))
    return Tokenizer(run.model, params, codebook, run.stats)


def _meta(config: Any, step: int, identity: dict[str, Any]) -> dict[str, Any]:
    return {"format": checkpoint.FORMAT, "step": step, "identity": identity,
            "config": json.loads(config.to_json_best_effort())}  # fmt: skip


def _multiple(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


# ---- the command


def run_to_file(config: Any, workdir: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    """Trains and writes the file and its picture; the numbers are those of the file, with its rounded weights."""
    from PIL import Image

    result = train(config, workdir)
    if not result.numbers or jax.process_index():
        return result.numbers
    io.save(out, result.tokenizer, dtype=config.store_dtype)
    tokenizer = io.load(out)
    held_out = _open(config, tokenizer.config, "data.validation")
    shown = held_out.read(np.arange(min(config.eval.samples or len(held_out), len(held_out))))
    numbers = evaluate(tokenizer, shown)
    Image.fromarray(picture_sheet(tokenizer, shown)).save(out.with_suffix(".png"))
    listed = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    print(f"tokenizer {tokenizer.name}: {listed}; wrote {out} ({out.stat().st_size / 1e6:.2f} MB) and {out.stem}.png")
    return numbers


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for a loss that is not finite, 2 for a run that cannot start."""
    try:
        config, workdir, out = train_config.from_command_line(sys.argv if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        processes.start()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    try:
        run_to_file(config, workdir, out)
    except (FloatingPointError, checkpoint.SaveError, files.StorageError, preprocess.ArrayError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ConfigError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    processes.run(main)
