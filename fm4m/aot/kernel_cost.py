"""The time of the attention kernels on a chip, from the instructions that the TPU compiler makes of them.

XLA knows nothing about the cost of a custom kernel. libtpu can write down the VLIW bundles of one, and a TPU runs one
bundle a cycle when nothing keeps it waiting, so bundles times cycle time is the time of a kernel, up to what it waits.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from fm4m.aot import topology as topology_lib
from fm4m.aot.chips import CHIPS
from fm4m.config_file import ConfigError
from fm4m.modalities import unknown_name

# What kernels take beyond their bundles, waiting for copies at the ends of their rows of steps.
WAITING = 1.05
LANES = 128
COMPILE_SECONDS = 300

# More than the VMEM of any chip.
HBM_BYTES = 256 * 2**20

_DIRECTIONS = ("forward", "backward")
# A bundle: address, label, as many ">" as loops are around it, and its instructions with comments on regions.
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})?:? *:? *(>*) *\{(.*)")
_JUMP = re.compile(r"\bsbr\.rel \(!?%\w+\) target = \$region(\d+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")


class KernelCostError(RuntimeError):
    """The compiler's instructions cannot be had here; an estimate from FLOPs must do."""


def attention_seconds(
    num_queries: int,
    num_keys: int,
    head_dim: int,
    dtype: str = "bfloat16",
    *,
    chip: str = "v4",
    samples: int = 16,
    lane_blocks: int = 8,
) -> dict[str, float]:
    """Seconds that a chip spends on one sample and one block of 128 lanes (128 / head_dim heads) of attention.

    Compiles the kernels of `fm4m.attention_tpu` for one chip in a process of its own (5 to 20 s the first time).

    Args:
      num_queries, num_keys: tokens of the two sides.
      head_dim: width of a head.
      dtype: "bfloat16" or "float32".
      chip: "v4", "v5e", "v5p" or "v6e". The cores of a chip share the samples, and the seconds are the chip's.
      samples: samples a chip has, which decides how many one grid step takes.
      lane_blocks: blocks of 128 lanes in the model's width, over which the rule of visibility is spread.

    Returns:
      {"forward": seconds, "backward": seconds}; times the samples of a chip and the lane blocks, the time of a call.

    Raises KernelCostError if libtpu is missing or does not say, KeyError for an unknown chip, ValueError for what the
    kernels cannot compute.
    """
    if chip not in CHIPS:
        raise KeyError(unknown_name(chip, CHIPS, "chip"))
    from fm4m import attention_tpu

    reason = attention_tpu.unsupported(num_queries, num_keys, head_dim, LANES // max(1, head_dim), dtype)
    if reason:
        raise ValueError(reason)
    step = attention_tpu.step_samples(samples, num_queries, num_keys)
    counts = _counts(num_queries, num_keys, head_dim, dtype, chip, step)
    kind = CHIPS[chip]
    seconds = WAITING / (kind.clock * kind.cores * step)
    return {k: seconds * (counts[k]["step"] + counts[k]["first"] / lane_blocks) for k in _DIRECTIONS}


def attention_bundles(
    num_queries: int, num_keys: int, head_dim: int, dtype: str = "bfloat16", *, chip: str = "v4", samples: int = 16
) -> dict[str, dict[str, float]]:
    """VLIW bundles of a sample and a lane block, as {"forward": {"step", "first"}, "backward": ...}.

    "step" is what every lane block takes, "first" what a sample's first one takes besides. Raises as
    `attention_seconds` does.
    """
    from fm4m import attention_tpu

    step = attention_tpu.step_samples(samples, num_queries, num_keys)
    counts = _counts(num_queries, num_keys, head_dim, dtype, chip, step)
    return {k: {part: n / step for part, n in counts[k].items()} for k in _DIRECTIONS}


def parse_bundles(text: str) -> dict[str, int]:
    """Bundles of one grid step in a dump of a kernel's final bundles.

    Returns {"step": those that every step runs, "first": those that it jumps over except at a sample's first lane
    block}. Raises KernelCostError if the text is none of a kernel with a loop over its grid.
    """
    lines = [m.groups() for m in map(_BUNDLE.match, text.splitlines()) if m and m[1]]
    if any(len(depth) > 1 for depth, _ in lines):
        raise KernelCostError("the kernel has a loop within its grid, whose trip count the bundles do not say")
    starts = {region: i for i, (_, code) in enumerate(lines) for region in _START.findall(code)}
    # What a jump ahead leaves out. The loop's own jump goes back.
    leaps = []
    for i, (_, code) in enumerate(lines):
        end = max((starts.get(region, -1) for region in _JUMP.findall(code)), default=-1)
        if end > i:
            leaps.append(range(i + 1, end))
    body = max(leaps, key=len, default=range(0))
    if 2 * len(body) < len(lines) or not lines:
        raise KernelCostError("this is not the text of a TPU kernel's final bundles as this version of fm4m reads it")
    # The largest leap is over the body of a step, which only the pipeline's ends leave out; those within it are over
    # what some steps leave out, and over copies, which every step makes.
    first = set()
    for leap in leaps:
        inside = leap != body and leap.start >= body.start and leap.stop <= body.stop
        if inside and not any("dma." in lines[i][1] for i in leap):
            first.update(leap)
    return {"step": len(lines) - len(first), "first": len(first)}


@functools.lru_cache(maxsize=1024)
def _counts(
    num_queries: int, num_keys: int, head_dim: int, dtype: str, chip: str, step: int
) -> dict[str, dict[str, int]]:
    request = {
        "num_queries": num_queries,
        "num_keys": num_keys,
        "head_dim": head_dim,
        "dtype": str(dtype),
        "chip": chip,
        "step": step,
    }
    with tempfile.TemporaryDirectory() as folder:
        return _compile(request, pathlib.Path(folder))


def _compile(request: dict[str, Any], folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Compiles in a process of its own: libtpu reads its flags once, when it is loaded."""
    try:
        topology_lib.require_libtpu()
    except ConfigError as error:
        raise KernelCostError(str(error)) from error
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    environment = {**os.environ, **topology_lib.LIBTPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "fm4m.aot.kernel_cost", json.dumps(request)]
    what = "{dtype} attention of {num_queries} x {num_keys} tokens for {chip}".format(**request)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise KernelCostError(f"compiling {what} took over {COMPILE_SECONDS} s") from error
    if done.returncode:
        raise KernelCostError(f"compiling {what} failed: {done.stderr.strip()[-2000:]}")
    counts = {}
    for direction in _DIRECTIONS:
        dumps = [
            p
            for p in sorted(folder.iterdir())
            if f"attention_{direction}" in p.name and re.search(r"\d-final_bundles\.txt$", p.name)
        ]
        if not dumps:
            raise KernelCostError(f"libtpu wrote no bundles of the {direction} kernel when compiling {what}")
        counts[direction] = parse_bundles(dumps[0].read_text())
    return counts


def _compile_here(request: dict[str, Any]) -> None:
    """Compiles the forward and backward kernel, for so many samples that their arrays stay in HBM.

    Smaller ones XLA moves to VMEM as a whole, and the kernels then copy them with instructions of their own.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from fm4m import attention_tpu

    kind = request["chip"]
    topology = topology_lib.parse(f"{kind}-{1 if kind in ('v5e', 'v6e') else 2}")
    sharding = NamedSharding(Mesh(np.array(topology_lib.devices(topology)), ("chip",)), PartitionSpec())
    width, sizes = 2 * LANES, (request["num_queries"], request["num_keys"])
    # An odd multiple of two steps, for which `step_samples` does not choose longer ones.
    batch = 2 * request["step"] * (2 * (HBM_BYTES // (4 * request["step"] * 2 * width * min(sizes))) + 1)

    def array(tokens: int, *rest: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, tokens, *rest), dtype, sharding=sharding)

    def run(query, key, value, gradient, query_rule, key_rule):
        def attend(*x):
            return attention_tpu.attention(*x, query_rule, key_rule, width // request["head_dim"])

        out, backward = jax.vjp(attend, query, key, value)
        return out, backward(gradient)

    queries, keys = (array(n, width, dtype=request["dtype"]) for n in sizes)
    rules = [(array(n), array(n)) for n in sizes]
    jax.jit(run).lower(queries, keys, keys, queries, *rules).compile()


if __name__ == "__main__":
    _compile_here(json.loads(sys.argv[1]))
