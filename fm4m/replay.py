"""Makes a step of a run again, exactly, and looks into it: where a loss jumped or stopped being finite, and on what.

    python -m fm4m.replay --workdir=RUN --step=N [--samples=K] [--out=FILE.json]

The newest checkpoint before step N is restored, with the configuration that was in force at N, and the steps up to N
are made again; nothing is written into the run's folder, which may be that of a run that goes on. On the same number
and kind of devices, with the same versions, every loss is that of the run bit for bit; elsewhere to rounding. Then step
N is taken apart: losses by modality, norms of gradient and parameters by group, and the K samples that add most to the
loss, with their positions in the stream.

Steps before the first checkpoint are made again from the seed. Exit codes: 0; 2 if the step cannot be replayed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from fm4m import checkpoint, configured, examine, exit_codes, files, metric_files, processes, sharding, skipped
from fm4m import config as config_lib
from fm4m import plan as plans
from fm4m import step as step_lib
from fm4m.agreement import of_lead
from fm4m.errors import DataError
from fm4m.modalities import unknown_name
from fm4m.stored_step import DamagedError, steps_in
from fm4m.stream import Stream

log = logging.getLogger("fm4m")


# ---- the run's own configuration


def load_config(workdir: str | os.PathLike, step: int) -> Any:
    """The configuration that was in force at a step of a run: config.json, or what `fm4m.run_folder` kept of before.

    Keys that the run did not know have their defaults. Raises ConfigError naming the file for anything that this
    version cannot read.
    """
    workdir = epath.Path(workdir)
    names = [p.name for p in workdir.iterdir()] if workdir.is_dir() else []
    until = {int(m[1]): name for name in names if (m := re.fullmatch(r"config-([0-9]+)\.json", name))}
    path = workdir / until.get(min((s for s in until if s >= step), default=None), "config.json")
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise config_lib.ConfigError(f"{workdir} is no run folder: {path.name} cannot be read: {error}") from error
    config = config_lib.default()
    _fill(config, stored, f"{path}: ")
    config_lib.validate(config)
    return config


def _fill(section: Any, stored: Any, where: str) -> None:
    if not isinstance(stored, Mapping):
        raise config_lib.ConfigError(f"{where}expected keys and values, found {stored!r}")
    for key, value in stored.items():
        if key not in section:
            raise config_lib.ConfigError(f"{where}{unknown_name(key, section.keys(), 'configuration key')}")
        if hasattr(section[key], "is_locked"):
            _fill(section[key], value, f"{where}{key}.")
            continue
        try:
            section[key] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise config_lib.ConfigError(f"{where}{key} = {value!r}: {error}") from error


# ---- the step again


def replay(config: Any, workdir: str | os.PathLike, stream: Stream, step: int, samples: int = 5) -> dict[str, Any]:
    """Makes the steps of a run up to ``step`` again and examines that one; writes nothing.

    Args:
      config: the run's, from `load_config`.
      workdir: its folder.
      stream: its training stream.
      step: the step to look into; the first is 1.
      samples: of how many samples to tell.

    Returns:
      The report, JSON-able but for numbers that may be NaN or infinite; see `as_text`.

    Raises:
      ConfigError: a configuration that these devices cannot run.
      CheckpointError: the step cannot be replayed; the message names those that can.
    """
    plan = plans.make(config, stream)
    state, made, position = _state_before(plan, workdir, step)
    batch = config.train.global_batch
    batches = sharding.device_batches(stream, plan.mesh, position=position, global_batch=batch)
    ready = next(batches)
    run_step, values = plan.compile_step(ready), {}
    for number in range(made + 1, step):
        state, out = run_step(state, *ready)
        values[number] = {name: out[name] for name in ("loss", "skipped")}
        if number % config.log.every == 0:
            log.info("step %d/%d  loss %.4f", number, step, values[number]["loss"])
        ready = next(batches)
    position += (step - 1 - made) * batch
    # Before the step itself, which takes the state's memory for the new one.
    groups = examine.group_norms(plan, state["params"], ready)
    found = examine.samples(plan, state["params"], ready)
    _, out = run_step(state, *ready)
    values[step] = {name: out[name] for name in ("loss", "skipped")}
    values, out = jax.device_get((values, out))

    modalities = stream.modalities
    of = {name: modalities.index(name) for name in modalities.outputs}
    order = np.argsort(np.where(found.finite & np.isfinite(found.share), -found.share, -np.inf), kind="stable")
    passed = examine.parts(plan)
    worst = []
    for row in order[:samples]:
        sums, counts = found.sums[row], found.counts[row]
        worst.append({
            "position": position + int(row),
            "task": stream.tasks[found.task[row]],
            "share": float(found.share[row]),
            "loss": {name: float(sums[i] / counts[i]) for name, i in of.items() if counts[i]},
            "targets": {name: int(counts[i]) for name, i in of.items() if counts[i]},
            "not_finite_from": None if found.finite[row] else passed[found.broken[row]],
            "texts": texts(config, stream, position + int(row)),
        })  # fmt: skip
    return {
        "step": step,
        "from_step": made,
        "positions": [position, position + batch - 1],
        "mesh": dict(plan.mesh.shape),
        "device": jax.devices()[0].device_kind,
        "skipped": bool(out["skipped"]),
        "loss": float(out["loss"]),
        "grad_norm": float(out["grad_norm"]),
        "lr": float(out["lr"]),
        "losses": {name: float(out["sums"][i] / out["counts"][i]) for name, i in of.items() if out["counts"][i]},
        "targets": {name: int(out["counts"][i]) for name, i in of.items()},
        "groups": {name: {"gradient": g, "parameters": p} for name, (g, p) in groups.items()},
        "samples": worst,
        "samples_not_finite": [position + int(row) for row in np.flatnonzero(~found.finite)],
        "logged": compare(workdir, values, config.log.every),
    }


def _state_before(plan: plans.Plan, workdir: str | os.PathLike, step: int) -> tuple[step_lib.State, int, int]:
    """(train state, steps made, position in the stream): the newest there is before a step."""
    if not 1 <= step <= plan.steps:
        raise checkpoint.CheckpointError(f"there is no step {step}: those of this run are 1 to {plan.steps}")
    saved = plan.config.checkpoint
    checkpoints = checkpoint.Checkpoints(workdir, every=saved.every)
    try:
        steps = of_lead(steps_in(checkpoints.folder))
        arrays = {name: tree for name, tree in plan.abstract.items() if name != "step"}
        for made in reversed([s for s in steps if s < step]):
            try:
                meta = checkpoints.meta(made)
                checkpoint.check_same_run(meta, plan.describe(made, 0), workdir)
                state = checkpoints.restore(made, arrays)
            except DamagedError as error:
                log.warning("%s; going further back", error)
                continue
            log.info("step %d, sample %d of the stream: restored", made, meta["position"])
            return plan.with_step(state, made), made, meta["position"]
    finally:
        checkpoints.close()
    # Only where none has been made yet at this step: thousands of steps again are not what anyone wants unasked.
    first = saved.every or plan.steps
    if step > first:
        later = f" and {steps[0] + 1} to {plan.steps}" if steps and steps[0] < plan.steps else ""
        raise checkpoint.CheckpointError(
            f"step {step} cannot be replayed: no checkpoint before it that is whole is left in {checkpoints.folder} "
            f"(checkpoint.keep, checkpoint.keep_period); steps that can be: 1 to {first}{later}"
        )
    log.info("no checkpoint before step %d: starting from seed %d", step, plan.config.seed)
    return plan.initial_state(), 0, 0


def compare(workdir: str | os.PathLike, values: Mapping[int, Mapping[str, Any]], every: int) -> list[dict[str, Any]]:
    """The losses in the run's metrics.jsonl beside those made again, where all steps of a line were.

    Args:
      workdir: folder of the run.
      values: "loss" and "skipped" of every step made again.
      every: steps of a line of metrics.

    Returns:
      [{"step", "run", "replay"}]: means over ``every`` steps without the skipped ones. They differ, too, where the run
      was interrupted within the line: it then holds only the steps after that.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    rows = metric_files.read_rows(path) if path.exists() else []
    out = []
    for row in rows:
        steps = range(row["step"] - every + 1, row["step"] + 1)
        if row["step"] % every or row.get("train/loss") is None or not all(s in values for s in steps):
            continue
        kept = [values[s]["loss"] for s in steps if not values[s]["skipped"]]
        out.append({"step": row["step"], "run": row["train/loss"], "replay": float(np.mean(kept))})
    return out


def texts(config: Any, stream: Stream, position: int) -> dict[str, str]:
    """The texts of a sample by modality, for those whose tokenizer the configuration names (log.picture_tokenizers)."""
    entries = [e for e in config.log.picture_tokenizers if re.match(r"[^=]*=(text|boxes):", e)]
    if not entries:
        return {}
    from fm4m import pictures

    modalities, out = stream.modalities, {}
    try:
        showers = pictures.load_showers(entries, modalities)
    except (KeyError, OSError, ValueError) as error:
        log.warning("texts are not shown: %s", error)
        return {}
    raw = next(iter(stream.batches(position=position, global_batch=1)))
    for name, shower in showers.items():
        start, length = modalities.slot_offset[name], int(raw.length[0, modalities.index(name)])
        out[name] = shower.tokenizer.decode([int(code) for code in raw.tokens[0, start : start + length]])
    return out


# ---- what is printed


def as_text(report: Mapping[str, Any]) -> str:
    """The report of `replay` for a terminal."""
    first, last = report["positions"]
    number = lambda x: f"{x:.9g}" if math.isfinite(x) else f"{x}  <- not finite"  # noqa: E731
    what = "skipped" if report["skipped"] else "made"
    begin = f"from the checkpoint of step {report['from_step']}" if report["from_step"] else "from the seed"
    lines = [
        f"step {report['step']} ({what}): samples {first} to {last} of the stream, made again {begin}",
        f"  on {report['device']}, mesh {report['mesh']}",
        f"loss {number(report['loss'])}",
        f"gradient norm {number(report['grad_norm'])}",
        f"learning rate {report['lr']:.4g}",
        _logged(report["logged"]),
        "",
        "loss by modality, nats a token (targets)",
    ]
    lines += [f"  {name}: {number(x)} ({report['targets'][name]})" for name, x in report["losses"].items()]
    width = max(map(len, report["groups"]))
    lines += ["", "norms".ljust(width + 2) + "      gradient    parameters"]
    for name, norms in report["groups"].items():
        cells = "".join(f"{norms[k]:14.6g}" for k in ("gradient", "parameters"))
        bad = "" if all(math.isfinite(x) for x in norms.values()) else "  <- not finite"
        lines.append(f"  {name.ljust(width)}{cells}{bad}")
    if gone := report["samples_not_finite"]:
        shown = ", ".join(map(str, gone[:20])) + (f" and {len(gone) - 20} more" if len(gone) > 20 else "")
        lines += ["", f"samples whose activations are not finite: {shown}"]
    lines += ["", "samples that add most to the loss"]
    for sample in report["samples"]:
        losses = ", ".join(f"{n} {x:.4f} ({sample['targets'][n]})" for n, x in sample["loss"].items())
        lines.append(f"  position {sample['position']}, task {sample['task']}: adds {sample['share']:.4g}; {losses}")
        if sample["not_finite_from"]:
            lines.append(f"    not finite from {sample['not_finite_from']} on")
        lines += [f"    {name}: {text}" for name, text in sample["texts"].items()]
    return "\n".join(lines)


def _logged(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return "no line of metrics.jsonl lies within the steps made again, to compare with"
    other = [row for row in rows if row["run"] != row["replay"]]
    if not other:
        return f"equal bit for bit to the {len(rows)} losses of these steps in metrics.jsonl"
    row = max(other, key=lambda row: abs(row["run"] - row["replay"]))
    return (
        f"{len(other)} of {len(rows)} losses of these steps in metrics.jsonl differ, most at step {row['step']}: "
        f"{row['run']:.9g} in the run, {row['replay']:.9g} here (other devices or versions, or an interruption there)"
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become the texts "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return skipped.number(value) if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> int:
    """The command line; returns one of `fm4m.exit_codes`."""
    parser = argparse.ArgumentParser(prog="python -m fm4m.replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", required=True, type=int, help="the step to look into; the first is 1")
    parser.add_argument("--samples", type=int, default=5, help="samples to tell of")
    parser.add_argument("--out", help="a file for the report as JSON")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        config = load_config(options.workdir, options.step)
        if config.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
        processes.start(config.fault.start_timeout, config.fault.heartbeat_timeout)
        log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
        stream, _ = configured.streams(config)
        report = replay(config, options.workdir, stream, options.step, options.samples)
    except (config_lib.ConfigError, checkpoint.CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.CANNOT_START
    if jax.process_index() == 0:
        print(as_text(report))
        if options.out:
            files.write_whole(options.out, json.dumps(_plain(report), indent=1) + "\n")
    return exit_codes.DONE


if __name__ == "__main__":
    processes.run(main)
