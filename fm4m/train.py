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
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from fm4m import (
    checkpoint,
    configured,
    evaluate,
    exit_codes,
    files,
    flops,
    goodput,
    metric_files,
    metrics,
    preemption,
    processes,
    profiling,
    run_folder,
    sharding,
    skipped,
    watchdog,
)
from fm4m import config as config_lib
from fm4m import model as model_lib
from fm4m import plan as plans
from fm4m import step as step_lib
from fm4m.errors import DataError
from fm4m.stream import Stream

log = logging.getLogger("fm4m")

# The exit codes of errors that a process can only have come to by itself; others are bugs, or those of a connection to
# a process that died.
EXIT_CODES = {
    config_lib.ConfigError: exit_codes.CANNOT_START,
    checkpoint.SaveError: exit_codes.FAILED,
    checkpoint.CheckpointError: exit_codes.CANNOT_START,
    FloatingPointError: exit_codes.FAILED,
    DataError: exit_codes.FAILED,
    files.StorageError: exit_codes.FAILED,
    watchdog.PeerError: exit_codes.HUNG,
}


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
    sample_pictures: configured.PictureHook | None = None,
    clock: goodput.Clock | None = None,
) -> Result:
    """Trains until ``config.train.total`` and returns the result; continues from the newest checkpoint in ``workdir``.

    Args:
      config: from `fm4m.config`.
      workdir: folder of the run.
      train_stream: endless and shuffled.
      eval_stream: one pass over the validation split; None for no validation.
      sample_pictures: (params, step) -> uint8 pictures [height, width, 3] by name, called every
        ``config.log.pictures_every`` steps and at the end.
      clock: splits the time of this attempt by cause; default one that starts now.

    Raises:
      ConfigError: a configuration that cannot run, such as a batch that the devices do not divide.
      CheckpointError: a checkpoint in ``workdir`` that belongs to another run, or all are damaged. SaveError: one
        could not be written.
      FloatingPointError: over ``config.train.max_skipped`` steps in a row were skipped, as the loss or the gradient
        was not finite; the message names them and the samples.
    """
    workdir, lead = epath.Path(workdir), jax.process_index() == 0
    clock = clock or goodput.Clock()

    chapter("Configuration")
    config_lib.validate(config)
    metric_files.require_wandb(config.log.wandb)
    modalities, tasks = train_stream.modalities, train_stream.tasks
    plan = plans.make(config, train_stream)
    masking, model, steps, mesh, abstract = plan.masking, plan.model, plan.steps, plan.mesh, plan.abstract
    log.info("%d steps of %d samples, %d of warm-up; folder %s", steps, config.train.global_batch, plan.warmup, workdir)

    chapter("Devices")
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
    counts = model_lib.param_counts(model, modalities)
    log.info("parameters: %s", ", ".join(f"{name} {count:,}" for name, count in counts.items()))

    chapter("Checkpoint")
    saved = config.checkpoint
    checkpoints = checkpoint.Checkpoints(
        workdir, every=saved.every, keep=saved.keep, keep_period=saved.keep_period, asynchronous=saved.asynchronous
    )
    first, position = 0, 0
    arrays = {k: v for k, v in abstract.items() if k != "step"}
    same_run = lambda meta: checkpoint.check_same_run(meta, plan.describe(meta["step"], 0), workdir)  # noqa: E731
    with clock("restore"):
        restored = checkpoints.restore_newest(arrays, same_run)
    if restored is not None:
        state, meta = restored
        first, position = meta["step"], meta["position"]
        state = plan.with_step(state, first)
        log.info("continuing at step %d, sample %d of the stream", first, position)
    else:
        with clock("compile"):
            state = plan.initial_state()
        log.info("none in %s; starting from seed %d", checkpoints.folder, config.seed)
    run_folder.write(workdir, config, abstract["params"], first)
    record = goodput.Record(workdir, clock, first, active=lead and first < steps)
    writer = metrics.MetricWriter(
        workdir, active=lead, tensorboard=config.log.tensorboard, step=first, wandb=config.log.wandb,
        config=config.to_dict(),
    )  # fmt: skip
    writer.text("config", f"```\n{config.to_json_best_effort(indent=2)}\n```")

    chapter("Compilation")
    batches = sharding.device_batches(train_stream, mesh, position=position, global_batch=batch)
    run_step = None
    if first < steps:
        with clock("data"):
            ready = next(batches)
        with clock("compile"):
            run_step = plan.compile_step(ready)

    watchdog.mark("barrier", first)
    sharding.wait_for_all("the step is compiled")

    chapter("First validation")
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
        with clock("validation"):
            losses["start"] = evaluator(weights(state))
            if config.eval.baseline_batches:
                losses["frequency"] = evaluator.frequency_baseline(
                    train_stream, seed=config.seed, batches=config.eval.baseline_batches
                )
        if lead:
            plain = {k: {n: x if np.isfinite(x) else None for n, x in v.items()} for k, v in losses.items()}
            files.write_whole(start_file, json.dumps(plain, indent=2) + "\n")
        writer.write(0, _named("validation", losses["start"]))
        log.info(
            "loss %.4f; token-frequency baseline %.4f",
            *(metrics.mean_loss(losses.get(k, {})) for k in ("start", "frequency")),
        )

    chapter("Training")
    stop = min(steps, first + config.train.stop_after) if config.train.stop_after else steps
    progress = metrics.Progress(steps, first, active=lead, bar=config.log.progress_bar)
    skips = skipped.SkippedSteps(config, modalities, workdir, first, position, active=lead)
    window = metrics.Window(model, modalities, masking, batch, peak, clock)
    profile = profiling.Profile(config.log.profile, workdir, clock, first, active=lead)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    pictures: list[epath.Path] = []

    def finish(pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        # The values of the step before the one that runs now: fetching them makes no device wait.
        if pending is None:
            return
        done, values = pending[0], jax.device_get(pending[1])
        skips.look(done, values, checkpoints.latest)
        window.add(values)
        if done % config.log.every == 0 or done == stop:
            row = window.close()
            writer.write(done, row | record.row(done) | metrics.device_memory())
            progress.report(done, f"loss {row['train/loss']:.4f}  {row['speed/samples_per_s']:.0f} samples/s  "
                            f"MFU {row['speed/mfu']:.1%}  lr {row['optimizer/lr']:.2e}")  # fmt: skip
        progress.advance()

    def validate(step: int) -> None:
        if evaluator is not None:
            watchdog.mark("validation")
            with clock("validation"):
                losses["end"] = evaluator(weights(state))
            writer.write(step, _named("validation", losses["end"]))
            log.info("step %d: validation loss %.4f", step, metrics.mean_loss(losses["end"]))

    def draw(step: int) -> None:
        if sample_pictures is not None:
            watchdog.mark("pictures")
            with clock("pictures"):
                pictures[:] = writer.pictures(step, sample_pictures(sharding.on_one_device(weights(state)), step))

    told, notice = False, contextlib.ExitStack()
    stopping = notice.enter_context(preemption.Notice())
    device = goodput.LastStep()
    record.write(first)
    for end in (device.close, profile.close, skips.close):
        notice.callback(end)
    notice.enter_context(clock("step"))
    try:
        for step in range(first + 1, stop + 1):
            watchdog.mark("step", step)
            profile.begin(step)
            # Nothing may cross between host and devices unnoticed. Batches are sent outside the guard: with several
            # processes it takes `make_array_from_process_local_data` for an unintended transfer.
            with jax.transfer_guard("disallow"), profile.annotation(step):
                state, values = run_step(state, *ready)
            device.follow(values["loss"])
            watchdog.mark("data")
            with clock.waiting(device):
                ready = next(batches) if step < stop else None
            profile.end(step, values)
            position += batch
            watchdog.mark("fetch")
            finish(pending)
            pending = step, values
            last = step == steps
            told = stopping.reached(step) and not last
            # This may write again what failed in the background, and then takes as long as writing does.
            watchdog.mark("checkpoint")
            due = checkpoints.due(step)
            if (
                last
                or told
                or step == stop
                or due
                or _multiple(step, config.eval.every)
                or _multiple(step, config.log.pictures_every)
            ):
                watchdog.mark("fetch")
                finish(pending)
                pending = None
                watchdog.mark("checkpoint")
                # After a skipped step the parameters may be what is wrong; then none replaces one that is good.
                if last or told or (due and not skips.in_a_row):
                    with clock("checkpoint"):
                        checkpoints.save(state, plan.describe(step, position))
                    record.write(step)
                if told:
                    # Nothing else: the machine may be gone in some tens of seconds.
                    stop = step
                    break
                if last or _multiple(step, config.eval.every):
                    validate(step)
                if last or _multiple(step, config.log.pictures_every):
                    draw(step)
        if first >= steps:
            log.info("nothing is left to train: step %d of %d is saved", first, steps)
            validate(first)
            draw(first)
    finally:
        progress.close()
        try:
            with clock("checkpoint"):
                checkpoints.wait()
        finally:
            notice.close()
            checkpoints.close()
            writer.close()
    record.write(max(first, stop), "preempted" if told else "done" if stop == steps else "stopped")

    chapter("Result")
    log.info("%s", goodput.describe(record.attempts))
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
    watchdog.mark(title.lower())
    log.info("==== %s", title)


def _multiple(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _named(split: str, losses: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/loss": metrics.mean_loss(losses)} | {f"{split}/loss/{n}": v for n, v in losses.items()}


def exit_code(config: Any, workdir: str | os.PathLike, run: Callable[[], Result]) -> int:
    """Joins the processes of the run, calls ``run`` under the watchdog, and returns one of `fm4m.exit_codes`.

    The errors of `EXIT_CODES` end as one sentence on standard error.
    """
    fault = config.fault
    try:
        processes.start(fault.start_timeout, fault.heartbeat_timeout)
        with watchdog.Watchdog(workdir, fault.timeout, fault.slow_timeout, own_errors=tuple(EXIT_CODES)):
            result = run()
    except tuple(EXIT_CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return exit_codes.PREEMPTED if result.preempted else exit_codes.DONE


def main(argv: list[str] | None = None, open_inputs: Callable[[Any], configured.Inputs] = configured.inputs) -> int:
    """The command line; returns one of `fm4m.exit_codes`. ``open_inputs``: from the configuration to what is read."""
    config, workdir = config_lib.from_command_line(sys.argv if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    clock = goodput.Clock(goodput.process_age())

    def run() -> Result:
        log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
        return train(config, workdir, *open_inputs(config), clock)

    return exit_code(config, workdir, run)


if __name__ == "__main__":
    processes.run(main)
