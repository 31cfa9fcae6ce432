"""Times generation against the plain algorithm (benchmarks/plain_generation.py), both in one run.

    python -m benchmarks.generation --model=fm_base_12e_12d_swiglu_nobias [--task=depth] [--batch=4] [--rounds=2]

RGB pixels to a caption of --tokens tokens, and RGB pixels to depth in --steps=8 of ROAR with guidance, with random
weights of a registered model on 4M-7's modalities. Both forms are greedy and must give the same tokens; the caption
never stops early, so that the number of tokens is known. Times exclude compilation and take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plain_generation as plain
from fm4m import model as model_lib
from fm4m.generate import Generator, Target, engine, make_canvas, schedules
from fm4m.generate.canvas import without
from fm4m.generate.sampling import Filter
from fm4m.modalities import FIRST_SENTINEL_ID, ModalitySet
from fm4m.modality_sets import MOD7

RGB, DEPTH, CAPTION = "rgb@224", "tok_depth@224", "caption"
GUIDANCE = 2.0
NEVER = -1  # a stop token that no vocabulary has


class Fixed(Generator):
    """A generator whose random order is given, so that both forms write the same cells."""

    def _order(self, keys: jax.Array, cells: int) -> jax.Array:
        return order_of(keys.shape[0], cells)


def order_of(samples: int, cells: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(7), (samples, cells))


def pairs(
    config, modalities: ModalitySet, batch: int, tokens: int, steps: int
) -> dict[str, tuple[Callable, Callable, int]]:
    """By task: ours, the plain form (both give the generated tokens), and what one call generates."""
    params = jax.jit(lambda: model_lib.init_params(config, modalities, jax.random.key(0)))()
    generator = Fixed(params, config, modalities)
    picture = modalities[RGB]
    side = picture.grid[0] * picture.patch_size
    rgb = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    given = make_canvas(modalities, {RGB: rgb})
    first = jnp.full((batch,), FIRST_SENTINEL_ID, jnp.int32)
    stop, empty = jnp.full((batch,), NEVER, jnp.int32), jnp.zeros((0,), jnp.float32)
    keys = jax.random.split(jax.random.key(0), batch)
    cells, gap = modalities[DEPTH].max_tokens, jnp.zeros((batch, modalities[CAPTION].max_tokens), jnp.int32)
    text = given.write(CAPTION, gap.at[:, 0].set(FIRST_SENTINEL_ID), (gap == 0) & (jnp.arange(gap.shape[1]) == 0))
    slots = (picture.max_tokens + 1,)

    def our_text():
        return engine.sequence(
            params, (text,), empty, keys, first, stop, jnp.zeros(()), config=generator.config, modalities=modalities,
            target=CAPTION, slots=slots, chosen=Filter(), length=tokens,
        )  # fmt: skip

    def plain_text():
        return plain.sequence(
            params, text, first, stop, config=config, modalities=modalities, name=CAPTION, length=tokens
        )

    def our_depth():
        target = Target(DEPTH, steps=steps, temperature=0.0, guidance=GUIDANCE)
        return generator(given, [target]).ids[DEPTH]

    def plain_depth():
        canvas = given.write(DEPTH, jnp.zeros((batch, cells), jnp.int32), jnp.zeros((batch, cells), bool))
        branches = [without(canvas, modalities, [RGB]), canvas]
        counts = schedules.linear_schedule(steps, cells)
        order = order_of(batch, cells)
        return plain.roar(params, config, modalities, branches, GUIDANCE, DEPTH, order, counts).ids[DEPTH]

    return {
        f"caption, {tokens} tokens": (our_text, plain_text, batch * (tokens - 1)),
        f"depth, ROAR in {steps} steps, guided": (our_depth, plain_depth, batch * cells),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", allow_abbrev=False)
    parser.add_argument("--model", default="fm_base_12e_12d_swiglu_nobias", help="a registered size (fm4m.sizes)")
    parser.add_argument("--task", choices=("caption", "depth"), help="one of the two; default: both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="of ROAR")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="bfloat16 on accelerators")
    args = parser.parse_args(argv)
    if not 2 <= args.tokens <= MOD7[CAPTION].max_tokens or min(args.batch, args.rounds, args.steps) < 1:
        parser.error("--tokens must be from 2 to 256, --batch, --rounds and --steps at least 1")
    config = model_lib.model_config(args.model, dtype=args.dtype, scan_group=1)
    device = jax.devices()[0]
    print(f"{device.device_kind}; jax {jax.__version__}; {args.model}, batch {args.batch}, {args.dtype}", flush=True)
    tasks = pairs(config, MOD7, args.batch, args.tokens, args.steps)
    for task, (ours, theirs, made) in tasks.items():
        if not task.startswith(args.task or ""):
            continue
        a, b = (np.asarray(f()) for f in (ours, theirs))  # compiles
        equal = (a == b).mean()
        seconds = {ours: [], theirs: []}
        for _ in range(args.rounds):
            for function, times in seconds.items():
                start = time.perf_counter()
                jax.block_until_ready(function())
                times.append(time.perf_counter() - start)
        fast, slow = (statistics.median(times) for times in seconds.values())
        rates = f"{fast / args.batch:.2f} s a sample, {made / fast:.1f} tokens/s; plain {slow / args.batch:.2f} s"
        print(f"{task}: {rates}; {slow / fast:.1f} times as fast; {equal:.1%} of the tokens equal", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
