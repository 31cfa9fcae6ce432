"""Chains of targets: every finished modality becomes a condition of the next ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fm4m import model as model_lib
from fm4m import sharding
from fm4m.generate import engine, schedules
from fm4m.generate.canvas import Canvas, without
from fm4m.generate.sampling import Filter
from fm4m.modalities import FIRST_SENTINEL_ID, ModalitySet, round_up, unknown_name

SCHEMES = {"tokens": ("roar", "maskgit"), "sequence": ("autoregressive",)}
# Programs are compiled for numbers of tokens. To share them, texts and partial grids count as multiples of this many,
# and a grid that is being generated as one of so many shares of it: eight steps are compiled without any padding.
TOKEN_MULTIPLE = 32
GRID_SHARES = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """How one modality is generated (4M, generation; the reference implementation's settings have the same names).

    Attributes:
      name: an output modality of the model.
      scheme: "roar" or "maskgit" for a grid, "autoregressive" for a sequence; "" is the first of these.
      steps: decoding steps of an empty grid. One step of "roar" predicts all cells independently of each other.
      schedule: cells of each step, "linear" or "cosine"; "" is linear for "roar" and cosine for "maskgit".
      temperature, temperature_schedule: see `schedules.temperature_schedule`; 0 takes the likeliest token.
      top_k, top_p, tempered: see `sampling.Filter`.
      guidance: weight of the difference to the prediction without conditions; 1 for none.
      conditions: what that prediction does not see; None: everything that was given.
      max_tokens: longest sequence, opening and closing sentinels included; 0: the modality's.
    """

    name: str
    scheme: str = ""
    steps: int = 8
    schedule: str = ""
    temperature: float = 1.0
    temperature_schedule: str = "constant"
    top_k: float = 0.0
    top_p: float = 0.0
    tempered: bool = False
    guidance: float = 1.0
    conditions: tuple[str, ...] | None = None
    max_tokens: int = 0

    def filter(self) -> Filter:
        """What may be sampled."""
        return Filter(self.top_k, self.top_p, self.tempered)


@dataclasses.dataclass(frozen=True)
class Condition:
    """One of several weighted conditions (4M-21, multi-guidance).

    Attributes:
      weight: of the difference between the prediction with this condition alone and the one without any; may be
        negative.
      shows: names of the given modalities that it consists of.
      instead: other values for some of them, such as another caption; a canvas of the same samples.
    """

    weight: float
    shows: tuple[str, ...]
    instead: Canvas | None = None


Progress = Callable[[str, int, int], None]


class Generator:
    """Generates with one model.

    Args:
      params, config, modalities: the model, as `fm4m.load` gives it.
      mesh: devices among which samples are split, every one with all weights; their number must divide the samples.
        None: one device.

    Raises ValueError for a mesh whose axis ``tensor`` has several devices.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: model_lib.ModelConfig,
        modalities: ModalitySet,
        mesh: Mesh | None = None,
    ):
        if mesh is not None and mesh.shape.get("tensor", 1) > 1:
            raise ValueError(
                f"mesh: the axis 'tensor' has {mesh.shape['tensor']} devices, expected 1: generation splits samples, "
                "not matrices"
            )
        self.config = dataclasses.replace(config, remat="none")
        self.modalities, self.mesh = modalities, mesh
        self.params = params if mesh is None else jax.device_put(params, sharding.replicated(mesh))

    def check(self, target: Target) -> Target:
        """The target with its defaults filled in. Raises ValueError for one that this model cannot generate."""
        if target.name not in self.modalities.outputs:
            known = unknown_name(target.name, self.modalities.outputs, "output modality of this model")
            raise ValueError(f"cannot generate: {known}")
        m = self.modalities[target.name]
        schemes = SCHEMES[m.kind]
        scheme = target.scheme or schemes[0]
        if scheme not in schemes:
            raise ValueError(f"target {m.name!r} ({m.kind}): scheme {scheme!r} must be {' or '.join(schemes)}")
        schedule = target.schedule or ("cosine" if scheme == "maskgit" else "linear")
        if m.grid:
            counts = schedules.token_schedule(schedule, target.steps, m.max_tokens)
            schedules.temperature_schedule(target.temperature_schedule, target.temperature, counts)
        elif target.temperature_schedule != "constant":
            raise ValueError(f"target {m.name!r} is a sequence: its temperature_schedule must be 'constant'")
        if not 0 <= target.max_tokens <= m.max_tokens or target.max_tokens == 1:
            allowed = f"0 or from 2 to {m.max_tokens}"
            raise ValueError(f"target {m.name!r}: max_tokens = {target.max_tokens} must be {allowed}")
        target.filter()
        for key in ("temperature", "guidance"):
            if not math.isfinite(getattr(target, key)):
                raise ValueError(f"target {m.name!r}: {key} = {getattr(target, key)} must be a finite number")
        if target.temperature < 0:
            raise ValueError(f"target {m.name!r}: temperature = {target.temperature} must be at least 0")
        return dataclasses.replace(
            target, scheme=scheme, schedule=schedule, max_tokens=target.max_tokens or m.max_tokens
        )

    def __call__(
        self,
        given: Canvas,
        targets: Sequence[Target],
        *,
        seed: int = 0,
        conditions: Sequence[Condition] = (),
        grow: bool = True,
        progress: Progress | None = None,
    ) -> Canvas:
        """Generates targets in order.

        Args:
          given: what is known of B samples; a target may be known in part, the rest is generated.
          targets: what to generate.
          seed: of everything drawn. What is drawn for sample b depends on the seed and b, not on the other samples;
            but a grid that is given in part has the schedule of the sample with the fewest known cells.
          conditions: weighted conditions in the place of each target's ``guidance``. What they show is hidden from the
            unconditional prediction and from each other.
          grow: finished grids are hidden from the unconditional prediction of later targets, like what was given.
          progress: called with a target's name, steps done and steps in all.

        Returns:
          The canvas with the targets.

        Raises:
          ValueError: a target that the model lacks or that is complete already, a schedule that cannot be, a condition
            that is not given.
        """
        plans = [self.check(target) for target in targets]
        names = [name for name in given.seen if bool(np.asarray(given.seen[name]).any())]
        for name in [n for plan in plans for n in plan.conditions or ()] + [n for c in conditions for n in c.shows]:
            if name not in given.seen:
                raise ValueError(f"condition: {unknown_name(name, names, 'given modality')}")
        if self.mesh is not None and given.size % self.mesh.size:
            raise ValueError(f"{given.size} samples cannot be split evenly among {self.mesh.size} devices")
        canvas = _with_targets(given, self.modalities, [plan.name for plan in plans])
        grown: list[str] = []
        for number, plan in enumerate(plans):
            key = jax.random.fold_in(jax.random.key(seed), number)
            branches, weights = self._branches(canvas, plan, names, grown, conditions)
            tell = functools.partial(progress, plan.name) if progress else lambda done, steps: None
            run = self._grid if self.modalities[plan.name].grid else self._sequence
            branches = run(plan, branches, weights, key, tell)
            done = branches[-1]
            canvas = canvas.write(plan.name, done.ids[plan.name], done.seen[plan.name])
            if grow and self.modalities[plan.name].grid and plan.name not in names:
                grown.append(plan.name)
        return canvas

    def _branches(
        self, canvas: Canvas, plan: Target, names: list[str], grown: list[str], conditions: Sequence[Condition]
    ) -> tuple[engine.Branches, jax.Array]:
        if conditions:
            union = [n for n in dict.fromkeys(n for c in conditions for n in c.shows) if n != plan.name]
            bare = without(canvas, self.modalities, [*union, *(n for n in grown if n not in union)])
            branches = [bare]
            for condition in conditions:
                hidden = [n for n in union if n not in condition.shows]
                shown = _replaced(canvas, condition) if condition.instead is not None else canvas
                branches.append(without(shown, self.modalities, hidden))
            return tuple(branches), jnp.asarray([c.weight for c in conditions], jnp.float32)
        hidden = plan.conditions if plan.conditions is not None else names
        hidden = [n for n in dict.fromkeys([*hidden, *grown]) if n != plan.name]
        if plan.guidance == 1.0 or not hidden:
            return (canvas,), jnp.zeros((0,), jnp.float32)
        return (without(canvas, self.modalities, hidden), canvas), jnp.asarray([plan.guidance], jnp.float32)

    def _grid(self, plan: Target, branches: engine.Branches, weights, key, tell) -> engine.Branches:
        m = self.modalities[plan.name]
        known = np.asarray(branches[0].seen[plan.name]).sum(1)
        if known.min() == m.max_tokens:
            raise ValueError(f"target {plan.name!r} is complete in every sample: nothing is left to generate")
        counts = schedules.token_schedule(plan.schedule, plan.steps, m.max_tokens, int(known.min()))
        temperatures = schedules.temperature_schedule(plan.temperature_schedule, plan.temperature, counts)
        keys = self._keys(key, branches)
        order = self._order(keys, m.max_tokens)
        # Counted once and then by the schedule, so that no step waits for the one before it.
        shown, share = self._shown(branches, plan.name), -(-m.max_tokens // GRID_SHARES)
        first, last, done = int(known.min()), int(known.max()), 0
        for i, (count, temperature) in enumerate(zip(counts, temperatures, strict=True)):
            # What rounding leaves of a cosine can be a step that writes more than is left, and one of less than none.
            count = min(count, m.max_tokens - first - done)
            if count > 0:
                open_cells = _rounded(m.max_tokens - first - done, m.max_tokens, share)
                queries = max(counts) if plan.scheme == "roar" else open_cells
                own = _rounded(last + done, m.max_tokens, share) if plan.name in self.modalities.inputs else 0
                slots = tuple(max(n + own, 1) for n in shown)
                step = engine.GridStep(plan.name, plan.scheme, queries, slots, plan.filter())
                step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i + 1)
                arguments = (weights, step_keys, order, jnp.asarray(count), jnp.asarray(temperature))
                layouts = (P(), sharding.BATCH, sharding.BATCH, P(), P())
                branches, _ = self._run(engine.grid_step, branches, arguments, layouts, step=step)
                done += count
            tell(i + 1, len(counts))
        return branches

    def _order(self, keys: jax.Array, cells: int) -> jax.Array:
        """float32 [B, cells]: the cells in the order of these numbers, of each sample another one."""
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (cells,)))(keys)

    def _sequence(self, plan: Target, branches: engine.Branches, weights, key, tell) -> engine.Branches:
        m, full = self.modalities[plan.name], branches[-1]
        texts = zip(np.asarray(full.ids[m.name]), np.asarray(full.seen[m.name]), strict=True)
        shown = [ids[seen].tolist() for ids, seen in texts]
        gaps = [[t for t in text if engine.is_sentinel(t)] for text in shown]
        for b, found in enumerate(gaps):
            if not found or found != list(range(FIRST_SENTINEL_ID, FIRST_SENTINEL_ID + len(found))):
                fault = "has other numbers" if found else "has none: nothing is left to generate"
                raise ValueError(
                    f"target {m.name!r}, sample {b}: a text that is given in part must have gaps numbered from [S_1], "
                    f"such as 'a dog [S_1]', and this one {fault}"
                )
        first = jnp.full((full.size,), FIRST_SENTINEL_ID, jnp.int32)
        stop = jnp.asarray([found[-1] + 1 for found in gaps], jnp.int32)
        arguments = (weights, self._keys(key, branches), first, stop, jnp.asarray(plan.temperature))
        layouts = (P(), sharding.BATCH, sharding.BATCH, sharding.BATCH, P())
        tell(0, 1)
        generated = self._run(
            engine.sequence, branches, arguments, layouts,
            target=m.name, slots=tuple(max(n, 1) for n in self._shown(branches)), chosen=plan.filter(),
            length=plan.max_tokens,
        )  # fmt: skip
        ids, seen = np.zeros((full.size, m.max_tokens), np.int32), np.zeros((full.size, m.max_tokens), bool)
        for b, (text, row) in enumerate(zip(shown, sharding.to_host(generated).tolist(), strict=True)):
            whole = engine.merge_spans(text, row)[: m.max_tokens]
            ids[b, : len(whole)], seen[b, : len(whole)] = whole, True
        tell(1, 1)
        return tuple(b.write(m.name, jnp.asarray(ids), jnp.asarray(seen)) for b in branches)

    def _keys(self, key: jax.Array, branches: engine.Branches) -> jax.Array:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(branches[0].size))

    def _shown(self, branches: engine.Branches, but: str = "") -> list[int]:
        """Encoder slots that each branch needs for all modalities, or for all but one."""
        out = []
        for branch in branches:
            names = [name for name in branch.seen if name in self.modalities.inputs and name != but]
            counts = [(int(np.asarray(branch.seen[n]).sum(1).max()), self.modalities[n].max_tokens) for n in names]
            out.append(sum(_rounded(count, most, TOKEN_MULTIPLE) for count, most in counts))
        return out

    def _run(self, function, branches, arguments: tuple, layouts: tuple, **static: Any) -> Any:
        static |= {"config": self.config, "modalities": self.modalities}
        if self.mesh is None:
            return function(self.params, branches, *arguments, **static)
        program = _over_devices(function, self.mesh, layouts, tuple(static.items()))
        return program(self.params, branches, *arguments)


@functools.lru_cache(maxsize=64)
def _over_devices(function: Callable, mesh: Mesh, layouts: tuple, static: tuple) -> Callable:
    """A program of the engine whose samples are split among devices."""
    local = functools.partial(function, **dict(static))
    return jax.jit(sharding.local_rows(local, mesh, (P(), sharding.BATCH, *layouts), sharding.BATCH))


def _rounded(count: int, most: int, multiple: int) -> int:
    return min(round_up(count, multiple), most)


def _with_targets(canvas: Canvas, modalities: ModalitySet, names: Sequence[str]) -> Canvas:
    """The canvas with an empty grid, or a text that is one gap, for every target that is not given."""
    for name in names:
        m = modalities[name]
        empty = jnp.zeros((canvas.size, m.max_tokens), jnp.int32)
        if name not in canvas.ids or not np.asarray(canvas.seen[name]).any():
            canvas = canvas.write(name, empty, empty.astype(bool))
        if m.kind == "sequence":
            nothing = ~canvas.seen[name].any(1)
            gap = jnp.where(nothing, FIRST_SENTINEL_ID, canvas.ids[name][:, 0])
            seen = canvas.seen[name].at[:, 0].set(True)
            canvas = canvas.write(name, canvas.ids[name].at[:, 0].set(gap), seen)
    return canvas


def _replaced(canvas: Canvas, condition: Condition) -> Canvas:
    """The canvas with the condition's own values of what it shows; whatever else ``instead`` has is left out."""
    other = condition.instead
    # A canvas has zeros of the continuous modalities that it does not have: `seen` says which it has.
    names = [n for n in condition.shows if n in other.seen]

    def merged(field: str) -> dict[str, jax.Array]:
        return getattr(canvas, field) | {n: x for n, x in getattr(other, field).items() if n in names}

    return Canvas(merged("ids"), merged("seen"), merged("dense"))
