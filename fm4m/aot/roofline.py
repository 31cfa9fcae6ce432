"""From a compiled step to numbers: memory, collectives, roofline, predicted time, days."""

from __future__ import annotations

from typing import Any

from fm4m.aot import heads, kernel_cost, kernels, schedule
from fm4m.aot.collectives import Machine, Place
from fm4m.aot.compiler import Compiled
from fm4m.aot.topology import Topology

# Share of the bound that hardware is expected to reach: MaxText's 22B model on v4 has a measured MFU of 56.7 %, and 69
# to 72 % by this estimate.
EXPECTED_SHARE = (0.80, 0.85)


def analyse(
    compiled: Compiled, topology: Topology, attention: kernels.AttentionSeconds | None = kernel_cost.attention_seconds
) -> dict[str, Any]:
    """All numbers of a compiled step, as plain JSON; times in seconds, sizes in bytes, of one chip and one step.

    ``attention`` gives the time of attention's kernels, and compiles them for that; None: their FLOPs at the peak.

    Keys: ``memory``, ``collectives``, ``roofline`` (what needs no code generation), ``estimate`` (predicted time and
    what follows from it; None without code generation), ``schedule`` (what the estimate was made of), and the facts of
    the program. Without a module (a program that does not fit) only memory and facts.
    """
    facts = {k: v for k, v in compiled.facts.items() if k != "places"}
    sizes = facts.pop("bytes")
    state = sum(sizes.values())
    memory = {
        "fits": compiled.fits,
        "limit": compiled.hbm_limit,
        "peak": compiled.hbm_bytes,
        **sizes,
        "activations and temporaries": max(compiled.hbm_bytes - state, 0),
        "compiler": compiled.memory,
    }
    out = {**facts, "complete": compiled.complete, "compile_seconds": compiled.compile_seconds, "memory": memory}
    out |= {"collectives": [], "roofline": None, "estimate": None, "schedule": None}
    if compiled.module is None:
        return out
    places = tuple(Place(slice_, tuple(c)) for slice_, c in compiled.facts["places"])
    machine = Machine(topology.chip, places, topology.shape, topology.wrap)
    costs = schedule.Costs(machine, loop_trips=heads.loop_trips(facts))
    if attention is not None:
        costs.kernel_seconds = kernels.kernel_seconds(facts, topology.chip, attention)
    walked = schedule.walk(compiled.module, costs)
    out["collectives"] = walked.collectives.table()
    out["schedule"] = {name: getattr(walked, name) for name in ("parts", "loops", "unknown", "heaviest")}
    out["roofline"] = roofline(facts, walked, topology)
    if compiled.complete:
        out["estimate"] = estimate(facts, walked, out["roofline"])
    return out


def roofline(facts: dict[str, Any], walked: schedule.Schedule, topology: Topology) -> dict[str, float]:
    """What the step does divided by what the chip can do."""
    chip = topology.chip
    samples = facts["global_batch"] / facts["chips"]
    model = sum(facts["flops_per_sample"].values()) * samples
    synchronous, asynchronous = (walked.collectives.seconds(kind) for kind in (False, True))
    floor = walked.floor_seconds + _exposed(walked.floor_seconds, synchronous, asynchronous)
    return {
        "model_flops": model,
        "ideal_seconds": model / chip.bf16_flops,
        "product_flops": walked.product_flops,
        "product_flops_seconds": walked.product_flops / chip.bf16_flops,
        "hbm_bytes": walked.hbm_bytes,
        "hbm_seconds": walked.hbm_bytes / chip.hbm_rate,
        "ici_bytes": walked.collectives.bytes("ICI"),
        "ici_seconds": walked.collectives.seconds(network="ICI"),
        "dcn_bytes": walked.collectives.bytes("DCN"),
        "dcn_seconds": walked.collectives.seconds(network="DCN"),
        "synchronous_seconds": synchronous,
        "asynchronous_seconds": asynchronous,
        "floor_seconds": floor,
        "floor_days": facts["steps"] * floor / 86400,
    }


def _exposed(compute: float, synchronous: float, asynchronous: float) -> float:
    """Seconds of collectives that nothing hides: asynchronous ones run beside the arithmetic as far as it lasts."""
    return synchronous + max(asynchronous - compute, 0.0)


def estimate(facts: dict[str, Any], walked: schedule.Schedule, lines: dict[str, float]) -> dict[str, Any]:
    """The predicted step and what follows from it. ``mfu_bound`` is without the collectives that nothing hides."""
    exposed = _exposed(walked.seconds, lines["synchronous_seconds"], lines["asynchronous_seconds"])
    step = walked.seconds + exposed
    tokens = facts["global_batch"] * (facts["inputs"] + facts["targets"])
    seconds = facts["steps"] * step
    share = step / lines["ideal_seconds"]
    return {
        "est_seconds": walked.seconds,
        "product_seconds": walked.product_seconds,
        "kernel_seconds": walked.kernel_seconds,
        "raw_seconds": walked.raw_seconds,
        "exposed_seconds": exposed,
        "step_seconds": step,
        "mfu_bound": lines["ideal_seconds"] / walked.seconds,
        "mfu_bound_with_collectives": 1 / share,
        "expected_mfu": [e / share for e in EXPECTED_SHARE],
        "samples_per_second": facts["global_batch"] / step,
        "tokens_per_second": tokens / step,
        "days": seconds / 86400,
        "chip_hours": seconds / 3600 * facts["chips"],
        "expected_days": [seconds / 86400 / e for e in reversed(EXPECTED_SHARE)],
    }
