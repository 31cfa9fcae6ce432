"""Times the training step of a configuration on the devices that are there, against a plain form of the same step.

    python -m benchmarks.step --config=configs/4m_b.py [--config.train.global_batch=64 ...]
        [--steps=10] [--rounds=3] [--no-baseline] [--json=FILE]

Data is random, so only the core is needed: jax, flax, optax, orbax-checkpoint and ml_collections. The baseline is
the same model with every target multiplied with every output head, plain attention, and one scanned layer; rounds of
both alternate, so that what else the machine does falls on both. Times exclude compilation.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import jax

from fm4m import config as config_lib
from fm4m import configured, flops, optim, sharding
from fm4m import plan as plans
from fm4m import step as step_lib
from fm4m.synthetic import RandomStream


class Variant:
    """One form of the step, compiled. Raises ConfigError for a configuration that cannot run here."""

    def __init__(self, name: str, config: Any):
        self.name, self.config = name, config
        modalities, masking, tasks = configured.mixture(config)
        self.mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch(self.mesh, config.train.global_batch, config.train.accumulation)
        platform = jax.devices()[0].platform
        self.model = plans.make_model_config(config, platform, masking.most_tokens)
        optimizer = optim.from_config(config, 1_000_000, 1000, 0)
        abstract = step_lib.abstract_state(config, self.model, modalities, optimizer, self.mesh)
        sharding.check_parameters_are_split(abstract["params"], self.mesh)
        where = jax.tree.map(lambda x: x.sharding, abstract)
        self._init = jax.jit(
            lambda: step_lib.init_state(config, self.model, modalities, optimizer), out_shardings=where
        )
        stream = RandomStream(modalities, masking, tasks)
        source = sharding.device_batches(stream, self.mesh, position=0, global_batch=config.train.global_batch)
        # Two batches are enough to time a step, and the host is not what is timed.
        self._ready = [next(source), next(source)]
        step = step_lib.make_step(config, self.model, modalities, masking, tasks, optimizer, self.mesh)
        start = time.perf_counter()
        traced = step.trace(abstract, *self._ready[0])
        self.trace_seconds, start = time.perf_counter() - start, time.perf_counter()
        self._step = traced.lower().compile(compiler_options=step_lib.compiler_options(platform))
        self.compile_seconds = time.perf_counter() - start
        self.samples = config.train.global_batch
        self.tokens = self.samples * (masking.input_range[1] + masking.target_range[1])
        self.work = lambda values: flops.step_flops(self.model, modalities, masking, self.samples, values["counts"])
        self.seconds: list[float] = []
        self.flops = 0.0

    def round(self, steps: int) -> None:
        """Times ``steps`` steps after two that do not count."""
        state = self._init()
        for i in range(2):
            state, values = self._step(state, *self._ready[i % 2])
        jax.block_until_ready(state)
        work, start = [], time.perf_counter()
        for i in range(steps):
            state, values = self._step(state, *self._ready[i % 2])
            work.append(values)
        jax.block_until_ready(state)
        self.seconds.append((time.perf_counter() - start) / steps)
        self.flops = statistics.mean(self.work(jax.device_get(v)) for v in work)

    def peak_bytes(self) -> int:
        """Largest memory of a device so far, by the device's own count, or else what the compiled step needs."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
        used = self._step.memory_analysis()
        return used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes - (
            used.alias_size_in_bytes
        )


def plain_form(config: Any) -> Any:
    """The baseline's configuration."""
    config = copy.deepcopy(config)
    config.train.loss_method, config.model.attention, config.model.scan_group = "dense", "einsum", 1
    return config


def report(variant: Variant, peak: float) -> dict[str, Any]:
    """The figures of a variant, as plain JSON; times are the median over rounds."""
    seconds = statistics.median(variant.seconds)
    return {
        "name": variant.name,
        "attention": variant.model.attention,
        "loss": variant.config.train.loss_method,
        "scan_group": variant.model.scan_group,
        "remat": variant.model.remat,
        "batch": variant.samples,
        "step_ms": 1e3 * seconds,
        "step_ms_of_rounds": [1e3 * s for s in variant.seconds],
        "tokens_per_s": variant.tokens / seconds,
        "samples_per_s": variant.samples / seconds,
        "mfu": variant.flops / seconds / peak,
        "peak_gib": variant.peak_bytes() / 2**30,
        "trace_s": variant.trace_seconds,
        "compile_s": variant.compile_seconds,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--json", help="file to write the figures to")
    args, rest = parser.parse_known_args(argv)
    try:
        config = config_lib.from_flags(rest, "usage: python -m benchmarks.step --config=configs/NAME.py")
        peak, where = flops.peak_flops()
        print(f"{where}; jax {jax.__version__}; {config.model.name}, batch {config.train.global_batch}", flush=True)
        variants = [Variant("fm4m", config)]
        if not args.no_baseline:
            variants.append(Variant("plain", plain_form(config)))
    except config_lib.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for i in range(args.rounds):
        for variant in variants:
            variant.round(args.steps)
            print(f"round {i + 1}: {variant.name} {1e3 * variant.seconds[-1]:.1f} ms a step", flush=True)
    figures = [report(variant, peak) for variant in variants]
    print(f"{'':8}{'ms/step':>10}{'tokens/s':>12}{'MFU':>8}{'peak GiB':>10}{'trace s':>9}{'compile s':>11}  form")
    for f in figures:
        form = f"{f['attention']} attention, {f['loss']} loss, scan_group {f['scan_group']}, remat {f['remat']}"
        print(f"{f['name']:8}{f['step_ms']:10.1f}{f['tokens_per_s']:12.0f}{f['mfu']:8.1%}{f['peak_gib']:10.2f}"
              f"{f['trace_s']:9.1f}{f['compile_s']:11.1f}  {form}")  # fmt: skip
    if len(figures) == 2:
        print(f"the plain form takes {figures[1]['step_ms'] / figures[0]['step_ms']:.2f} times as long")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"devices": where, "jax": jax.__version__, "variants": figures}, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
