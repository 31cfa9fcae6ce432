"""Trains a model.

    python -m fm4m.train --config=configs/demo.py --workdir=runs/demo [--config.train.global_batch=64 ...]

A script in chapters, each announced by a line of the log. The train state is a plain dict {"step", "params",
"opt_state", ["ema"]}; the state of the data is one integer, the number of samples consumed. Run the same command again
to continue from the newest checkpoint; the result is the same, bit for bit, as without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm4m import (
    checkpoint,
    evaluate,
    exit_codes,
    flops,
    loading,
    metrics,
    optim,
    preemption,
    recipes,
    sharding,
    transplant,
)
from fm4m import config as config_lib
from fm4m import model as model_lib
from fm4m import step as step_lib
from fm4m.attention import best_implementation
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet
from fm4m.stream import Stream

log = logging.getLogger("fm4m")

PictureHook = Callable[[Any, int], Mapping[str, np.ndarray]]


# ---- the run


@dataclasses.dataclass
class Result:
    """How a run ended.

    Attributes:
      step: optimizer steps made in all.
      state: the train state.
      losses: {"start", "end", "frequency"}: validation loss by modality, as far as they were computed.
      preempted: the run was told to stop (SIGTERM) before its end; everything is saved.
    """

    step: int
    state: step_lib.State
    losses: dict[str, dict[str, float]]
    preempted: bool = False


def train(
    config: Any,
    workdir: str | os.PathLike,
    train_stream: Stream,
    eval_stream: Stream | None = None,
    sample_pictures: PictureHook | None = None,
) -> Result:
    """Trains until ``config.train.total`` and returns the result; continues from the newest checkpoint in ``workdir``.

    Args:
      config: from `fm4m.config`.
      workdir: folder of the run.
      train_stream: endless and shuffled.
      eval_stream: one pass over the validation split; None for no validation.
      sample_pictures: (params, step) -> uint8 pictures [height, width, 3] by name, called every
        ``config.log.pictures_every`` steps and at the end.

    Raises:
      ConfigError: a configuration that cannot run, such as a batch that the devices do not divide.
      CheckpointError: a checkpoint in ``workdir`` that belongs to another run.
      FloatingPointError: the loss or the gradient stopped being finite; the message names the step.
    """
    workdir, lead = pathlib.Path(workdir), jax.process_index() == 0

    chapter("Configuration")
    config_lib.validate(config)
    modalities, tasks = train_stream.modalities, train_stream.tasks
    masking = config_lib.budgets(config, train_stream.masking)
    model = make_model_config(config, jax.devices()[0].platform, masking.most_tokens)
    steps, warmup, cooldown = lengths(config, masking)
    log.info("%d steps of %d samples, %d of warm-up; folder %s", steps, config.train.global_batch, warmup, workdir)

    chapter("Devices")
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(mesh, config.train.global_batch, config.train.accumulation)
    eval_batch = config.eval.batch or config.train.global_batch // config.train.accumulation
    sharding.check_batch(mesh, eval_batch, key="eval.batch")
    peak, peak_source = flops.peak_flops()
    log.info(
        "%d processes, mesh %s; peak %.4g TFLOP/s (%s)", jax.process_count(), dict(mesh.shape), peak / 1e12, peak_source
    )

    chapter("Data")
    batch = config.train.global_batch
    shard, shards = sharding.loader_shard(mesh, batch)
    passes = f"{train_stream.size} samples a pass, tasks {', '.join(tasks)}"
    log.info("mixture %r, %s; this process reads part %d of %d", train_stream.name, passes, shard + 1, shards)
    log.info("inputs: %s; outputs: %s", ", ".join(modalities.inputs), ", ".join(modalities.outputs))

    chapter("Model")
    optimizer = optim.from_config(config, steps, warmup, cooldown)
    initial = lambda: step_lib.init_state(config, model, modalities, optimizer)  # noqa: E731
    abstract = step_lib.abstract_state(config, model, modalities, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    sharding.check_parameters_are_split(abstract["params"], mesh)
    counts = model_lib.param_counts(model, modalities)
    log.info("parameters: %s", ", ".join(f"{name} {count:,}" for name, count in counts.items()))

    chapter("Checkpoint")
    saved = config.checkpoint
    checkpoints = checkpoint.Checkpoints(
        workdir, every=saved.every, keep=saved.keep, keep_period=saved.keep_period, asynchronous=saved.asynchronous
    )
    describe = lambda step, position: checkpoint.make_meta(  # noqa: E731
        step=step, position=position, seed=config.seed, modalities=modalities, model=model, config=config.to_dict(),
        mixture={"stream": train_stream.resolved, "masking": masking.to_dict()},
    )  # fmt: skip
    first, position = 0, 0
    if (latest := checkpoints.latest()) is not None:
        meta = checkpoints.meta(latest)
        checkpoint.check_same_run(meta, describe(latest, 0), workdir)
        state = checkpoints.restore(latest, {k: v for k, v in abstract.items() if k != "step"})
        first, position = meta["step"], meta["position"]
        state["step"] = jax.jit(lambda: jnp.asarray(first, jnp.int32), out_shardings=shardings["step"])()
        log.info("continuing at step %d, sample %d of the stream", first, position)
    else:
        state = jax.jit(initial, out_shardings=shardings)()
        log.info("none in %s; starting from seed %d", checkpoints.folder, config.seed)
        if config.train.init_from:
            state |= start_from(config, model, modalities, state["params"], shardings)
    if lead:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
        (workdir / "parameters.txt").write_text(parameter_table(abstract["params"]))

    chapter("Compilation")
    batches = sharding.device_batches(train_stream, mesh, position=position, global_batch=batch)
    run_step = None
    if first < steps:
        ready = next(batches)
        run_step = step_lib.compile_step(
            step_lib.make_step(config, model, modalities, masking, tasks, optimizer, mesh), abstract, ready
        )

    sharding.wait_for_all("the step is compiled")

    chapter("First validation")
    writer = metrics.MetricWriter(workdir, active=lead, tensorboard=config.log.tensorboard, step=first)
    writer.text("config", f"```\n{config.to_json_best_effort(indent=2)}\n```")
    weights = lambda state: state.get("ema", state["params"])  # noqa: E731
    losses, evaluator = {}, None
    if eval_stream is not None:
        evaluator = evaluate.Evaluator(
            model,
            eval_stream,
            masking,
            mesh,
            batch=eval_batch,
            samples=config.eval.samples,
            method=config.train.loss_method,
        )
    start_file = workdir / "start.json"
    if evaluator is None:
        log.info("no validation split")
    elif first and start_file.exists():
        losses = {
            k: {n: np.nan if x is None else x for n, x in v.items()}
            for k, v in json.loads(start_file.read_text()).items()
        }
        log.info("done before the interruption (%s)", start_file)
    elif not first:
        losses["start"] = evaluator(weights(state))
        if config.eval.baseline_batches:
            losses["frequency"] = evaluator.frequency_baseline(
                train_stream, seed=config.seed, batches=config.eval.baseline_batches
            )
        if lead:
            plain = {k: {n: x if np.isfinite(x) else None for n, x in v.items()} for k, v in losses.items()}
            start_file.write_text(json.dumps(plain, indent=2) + "\n")
        writer.write(0, _named("validation", losses["start"]))
        log.info(
            "loss %.4f; token-frequency baseline %.4f",
            *(metrics.mean_loss(losses.get(k, {})) for k in ("start", "frequency")),
        )

    chapter("Training")
    stop = min(steps, first + config.train.stop_after) if config.train.stop_after else steps
    progress = metrics.Progress(steps, first, active=lead, bar=config.log.progress_bar)
    window = metrics.Window(model, modalities, masking, batch, peak)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    pictures: list[pathlib.Path] = []

    def finish(pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        # The values of the step before the one that runs now: fetching them makes no device wait.
        if pending is None:
            return
        done, values = pending[0], jax.device_get(pending[1])
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            bad = (
                ", ".join(n for i, n in enumerate(modalities.names) if not np.isfinite(values["sums"][i]))
                or "the gradient only"
            )
            raise FloatingPointError(
                f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']} (not finite in: {bad}); the "
                f"newest checkpoint is step {checkpoints.latest()}. Lower optimizer.blr, lengthen optimizer.warmup, or "
                "set optimizer.clip_norm"
            )
        window.add(values)
        if done % config.log.every == 0 or done == stop:
            row = window.close()
            writer.write(done, row)
            progress.report(done, f"loss {row['train/loss']:.4f}  {row['speed/samples_per_s']:.0f} samples/s  "
                            f"MFU {row['speed/mfu']:.1%}  lr {row['optimizer/lr']:.2e}")  # fmt: skip
        progress.advance()

    def validate(step: int) -> None:
        if evaluator is not None:
            losses["end"] = evaluator(weights(state))
            writer.write(step, _named("validation", losses["end"]))
            log.info("step %d: validation loss %.4f", step, metrics.mean_loss(losses["end"]))

    def draw(step: int) -> None:
        if sample_pictures is not None:
            pictures[:] = writer.pictures(step, sample_pictures(sharding.on_one_device(weights(state)), step))

    told, notice = False, contextlib.ExitStack()
    stopping = notice.enter_context(preemption.Notice())
    try:
        for step in range(first + 1, stop + 1):
            # Nothing may cross between host and devices unnoticed. Batches are sent outside the guard: with several
            # processes it takes `make_array_from_process_local_data` for an unintended transfer.
            with jax.transfer_guard("disallow"):
                state, values = run_step(state, *ready)
            ready = next(batches) if step < stop else None
            position += batch
            finish(pending)
            pending = step, values
            last = step == steps
            told = stopping.reached(step) and not last
            if (
                last
                or told
                or step == stop
                or checkpoints.due(step)
                or _multiple(step, config.eval.every)
                or _multiple(step, config.log.pictures_every)
            ):
                finish(pending)
                pending = None
                window.pause()
                if last or told or checkpoints.due(step):
                    checkpoints.save(state, describe(step, position))
                if told:
                    # Nothing else: the machine may be gone in some tens of seconds.
                    stop = step
                    break
                if last or _multiple(step, config.eval.every):
                    validate(step)
                if last or _multiple(step, config.log.pictures_every):
                    draw(step)
                window.resume()
        if first >= steps:
            log.info("nothing is left to train: step %d of %d is saved", first, steps)
            validate(first)
            draw(first)
    finally:
        progress.close()
        checkpoints.wait()
        notice.close()
        checkpoints.close()
        writer.close()

    chapter("Result")
    if stop < steps:
        why = "SIGTERM; saved, the same command continues" if told else "train.stop_after"
        log.info("stopped at step %d of %d (%s)", stop, steps, why)
    if losses and lead:
        order = {k: losses[k] for k in ("start", "end", "frequency") if k in losses}
        log.info("validation loss, nats a token\n%s", metrics.loss_table(order))
    for picture in pictures:
        log.info("picture of what the model predicts: %s", picture)
    return Result(max(first, stop), state, losses, told)


# ---- what the chapters use


def chapter(title: str) -> None:
    """Announces a chapter in the log."""
    log.info("==== %s", title)


def make_model_config(config: Any, platform: str = "cpu", num_tokens: int = 0) -> model_lib.ModelConfig:
    """The model of a configuration, with the attention that is fastest on a platform unless it names one.

    ``num_tokens`` is the larger of the numbers of visible and predicted tokens; 0 for a model that is only described.
    Raises ConfigError for an unknown name or sizes that do not fit.
    """
    try:
        model = model_lib.model_config(config.model.name, **config_lib.model_overrides(config))
    except (KeyError, TypeError, ValueError) as error:
        raise config_lib.ConfigError(f"model: {error.args[0]}") from None
    if config.model.attention is None:
        heads = model.num_heads // max(config.mesh.tensor, 1)
        tokens = num_tokens + model.num_register_tokens
        best = best_implementation(platform, model.head_dim, heads, model.dtype, tokens)
        model = dataclasses.replace(model, attention=best)
    return model


def start_from(
    config: Any, model: model_lib.ModelConfig, modalities: ModalitySet, params: Any, shardings: Any
) -> dict[str, Any]:
    """The parts of the train state that ``train.init_from`` replaces: parameters, and their average where there is one.

    Every process reads the whole model into host memory and keeps its part. Raises ConfigError for one that does not
    fit.
    """
    # One array after the other, so that no device ever holds more than one whole.
    params = jax.tree.map(sharding.to_host, params)
    try:
        source = loading.load(config.train.init_from)
        values = transplant.transplant(source, model, modalities, params)
    except (ValueError, FileNotFoundError) as error:
        raise config_lib.ConfigError(f"train.init_from = {config.train.init_from!r}: {error}") from error
    place = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])  # noqa: E731
    return {part: jax.tree.map(place, values, shardings[part]) for part in ("params", "ema") if part in shardings}


def lengths(config: Any, masking: Masking) -> tuple[int, int, int]:
    """Steps in all, of warm-up and of cooldown. Raises ConfigError if nothing is left to train."""
    tokens = masking.input_range[1] + masking.target_range[1]
    batch, t, o = config.train.global_batch, config.train, config.optimizer

    def steps(text: str, key: str, epoch: int = 0) -> int:
        return config_lib.duration_steps(text, key, global_batch=batch, tokens_per_sample=tokens, epoch_samples=epoch)

    total = steps(t.total, "train.total", t.epoch_samples)
    return total, steps(o.warmup, "optimizer.warmup"), steps(o.cooldown, "optimizer.cooldown")


def parameter_table(params: Any) -> str:
    """Text: path, shape, layout and weight decay of every parameter."""
    rows, decayed = [], jax.tree.leaves(optim.decay_mask(params))
    for (path, x), decay in zip(jax.tree_util.tree_leaves_with_path(params), decayed):
        rows.append((optim.path_name(path), str(x.shape), str(x.sharding.spec), "decayed" if decay else "not decayed"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() + "\n" for row in rows)


def _multiple(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _named(split: str, losses: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/loss": metrics.mean_loss(losses)} | {f"{split}/loss/{n}": v for n, v in losses.items()}


def start_processes() -> None:
    """Joins the processes of a multi-host run: on a TPU pod by itself, elsewhere as JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say. Does nothing for a single process."""
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        )
    elif "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def open_streams(config: Any) -> tuple[Stream, Stream]:
    """The training and validation streams of a configuration, from `data_pipelines.loader`.

    Raises ConfigError with the loader's own sentence if the mixture, its modules or its files are not there.
    """
    # SeqIO imports TensorFlow, which otherwise fills the terminal with remarks about missing CUDA drivers.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from data_pipelines import loader

    try:
        loader.import_mixture_modules(config.data.modules)
        train_stream = loader.open_stream(config.data.mixture, "train", seed=config.seed)
        split = config.eval.split
        eval_stream = loader.open_stream(config.data.mixture, split, seed=config.seed, shuffle=False, num_epochs=1)
    except (ImportError, KeyError, FileNotFoundError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        raise config_lib.ConfigError(f"data.mixture = {config.data.mixture!r}: {message}") from error
    return train_stream, eval_stream


def mixture(config: Any) -> tuple[ModalitySet, Masking, tuple[str, ...]]:
    """Modalities, masking recipe and tasks that a configuration trains on, for programs that need no samples.

    They are those of the registered mixture if ``data.modules`` names any module, which needs its files, or else of a
    released model's mixture, which needs nothing. Raises ConfigError.
    """
    if config.data.modules:
        stream, _ = open_streams(config)
        return stream.modalities, config_lib.budgets(config, stream.masking), tuple(stream.tasks)
    return recipes.without_data(config)


def sample_sheet(config: Any, stream: Stream) -> PictureHook | None:
    """The hook that draws sample pictures of a configuration; None if it names no tokenizer to draw with.

    Raises ConfigError for a tokenizer that cannot be loaded or inputs that the model does not have.
    """
    from fm4m import pictures

    if not config.log.picture_tokenizers:
        return None
    try:
        showers = pictures.load_showers(config.log.picture_tokenizers, stream.modalities)
        raw = pictures.spread_samples(stream, config.log.picture_samples)
        inputs = config.log.picture_inputs
        return pictures.SampleSheet(make_model_config(config), stream.modalities, raw, inputs, showers)
    except (KeyError, OSError, ValueError) as error:
        raise config_lib.ConfigError(f"log.picture_tokenizers or log.picture_inputs: {error.args[0]}") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns one of `fm4m.exit_codes`."""
    config, workdir = config_lib.from_command_line(sys.argv if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    start_processes()
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    try:
        train_stream, eval_stream = open_streams(config)
        result = train(config, workdir, train_stream, eval_stream, sample_sheet(config, eval_stream))
    except (config_lib.ConfigError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.CANNOT_START
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.PREEMPTED if result.preempted else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
