"""The numbers of compiled steps as text."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any

from fm4m.aot.chips import GIB
from fm4m.aot.roofline import EXPECTED_SHARE

DISCLAIMER = (
    "These are compiled estimates: XLA:TPU compiled the step for these chips, and nothing was run on a TPU.\n"
    f"Hardware is expected to reach {EXPECTED_SHARE[0]:.2f} to {EXPECTED_SHARE[1]:.2f} of the bound "
    "(MaxText's 22B model on v4: 56.7 % MFU measured,\n69 to 72 % by this estimate)."
)


def full(numbers: dict[str, Any]) -> str:
    """Everything about one step on one topology."""
    blocks = [header(numbers), memory(numbers)]
    if numbers["roofline"]:
        blocks += [collectives(numbers), roofline(numbers)]
    if numbers["estimate"]:
        blocks += [estimate(numbers), parts(numbers)]
    return "\n\n".join(blocks)


def header(numbers: dict[str, Any]) -> str:
    model, counts, accumulation = numbers["model"], numbers["parameters"], numbers["accumulation"]
    group = model["scan_group"]
    layers = {0: "unrolled", 1: "scanned one by one"}.get(group, f"scanned in groups of {group}")
    mesh = " x ".join(f"{axis} {size}" for axis, size in numbers["mesh"].items())
    passes = f", {accumulation} passes of {numbers['rows_per_pass']} rows" if accumulation > 1 else ""
    done = "compiled" if numbers["complete"] else "compiled up to code generation"
    depth = f"{model['encoder_depth']} + {model['decoder_depth']} layers {layers}"
    return "\n".join([
        f"{numbers['topology']['description']}, mesh {mesh}",
        f"{model['name']}: {counts['trunk']:,} parameters, {counts['total']:,} with tables",
        f"{depth}, remat {model['remat']}, attention {model['attention']}, {model['dtype']}",
        f"global batch {numbers['global_batch']:,} of {numbers['inputs']} + {numbers['targets']} tokens: "
        f"{numbers['batch_per_chip']:g} samples a chip{passes}",
        f"traced in {numbers['trace_seconds']:.1f} s, {done} in {numbers['compile_seconds']:.1f} s",
    ])  # fmt: skip


def memory(numbers: dict[str, Any]) -> str:
    sizes = numbers["memory"]
    kinds = [k for k in sizes if k not in ("fits", "limit", "peak", "compiler") and (sizes[k] or k != "EMA")]
    rows = [(k, f"{sizes[k] / GIB:.3f}") for k in kinds] + [("total at the peak", f"{sizes['peak'] / GIB:.3f}")]
    rows.append(("the chip has", f"{sizes['limit'] / GIB:.3f}"))
    return "HBM of a chip, GiB\n" + table(rows)


def does_not_fit(numbers: dict[str, Any]) -> str:
    """The sentence for a program that a chip cannot hold."""
    sizes = numbers["memory"]
    state = sizes["peak"] - sizes["activations and temporaries"]
    return (
        f"it does not fit: the step needs {sizes['peak'] / GIB:.2f} GiB of HBM a chip, of which {state / GIB:.2f} for "
        f"state and batch, and {numbers['topology']['name']} has {sizes['limit'] / GIB:.2f}. Raise train.accumulation "
        f"(now {numbers['accumulation']}), choose another model.remat (now {numbers['model']['remat']}), or take more "
        "chips; --search finds what fits"
    )


def collectives(numbers: dict[str, Any]) -> str:
    rows = [("collectives, of a step", "network", "devices", "count", "executed", "GB", "ms")]
    for c in numbers["collectives"]:
        kind = f"{c['kind']}, {'asynchronous' if c['asynchronous'] else 'synchronous'}"
        rows.append((kind, c["network"], str(c["group"]), str(c["count"]), f"{c['executed']:g}",
                     f"{c['bytes'] / 1e9:.3f}", f"{c['seconds'] * 1e3:.2f}"))  # fmt: skip
    return table(rows) if len(rows) > 1 else "no collectives"


def roofline(numbers: dict[str, Any]) -> str:
    r = numbers["roofline"]
    rows = [
        ("roofline of a chip and step", "", "ms at its peak"),
        ("matrix products of the model", f"{r['model_flops'] / 1e12:.3f} TFLOP", _ms(r["ideal_seconds"])),
        ("products that the program runs", f"{r['product_flops'] / 1e12:.3f} TFLOP", _ms(r["product_flops_seconds"])),
        ("HBM", f"{r['hbm_bytes'] / 1e9:.1f} GB", _ms(r["hbm_seconds"])),
        ("links between chips (ICI)", f"{r['ici_bytes'] / 1e9:.2f} GB", _ms(r["ici_seconds"])),
        ("network between slices (DCN)", f"{r['dcn_bytes'] / 1e9:.2f} GB", _ms(r["dcn_seconds"])),
        ("of these synchronous", "", _ms(r["synchronous_seconds"])),
        ("of these asynchronous", "", _ms(r["asynchronous_seconds"])),
        ("every operation at its roof", "", _ms(r["floor_seconds"])),
    ]
    return table(rows)


def estimate(numbers: dict[str, Any]) -> str:
    e, ideal = numbers["estimate"], numbers["roofline"]["ideal_seconds"]
    (low, high), (soon, late) = e["expected_mfu"], e["expected_days"]
    parts = f"of which products {_ms(e['product_seconds'])}, kernels {_ms(e['kernel_seconds'])}"
    rates = f"{e['samples_per_second']:,.0f} samples/s, {e['tokens_per_second']:,.0f} tokens/s"
    whole = f"{e['mfu_bound_with_collectives']:.1%} with collectives"
    run = f"{numbers['steps']:,} steps, {e['chip_hours']:,.0f} chip hours"
    rows = [
        ("estimate from XLA's schedule", "ms", ""),
        ("operations", _ms(e["est_seconds"]), parts),
        ("collectives that nothing hides", _ms(e["exposed_seconds"]), ""),
        ("step", _ms(e["step_seconds"]), rates),
        ("MFU bound", f"{e['mfu_bound']:.1%}", f"{_ms(ideal)} ms over operations; {whole}"),
        ("expected MFU", f"{low:.1%} to {high:.1%}", ""),
        ("the run at the bound", f"{e['days']:.2f} days", run),
        ("expected", f"{soon:.2f} to {late:.2f} days", ""),
    ]
    text = table(rows)
    unknown = collections.Counter(re.sub(r"[.\d]+", "", what) for what in numbers["schedule"]["unknown"])
    for what, count in unknown.items():
        text += f"\nnot in the estimate: {count} x {what}"
    return text


def parts(numbers: dict[str, Any]) -> str:
    """Where the time of the operations goes, by named scope."""
    seconds, total = numbers["schedule"]["parts"], numbers["estimate"]["est_seconds"]
    rows = [("operations by part of the step", "ms", "share")]
    rows += [(name, f"{s * 1e3:.2f}", f"{s / total:.2%}") for name, s in seconds.items()]
    return table(rows)


def heaviest(numbers: dict[str, Any], count: int) -> str:
    """The costliest instructions."""
    rows = [("ms a step", "runs", "instruction", "from")]
    for seconds, runs, _, name, origin in numbers["schedule"]["heaviest"][:count]:
        # jit(step)/transpose(jvp())/while/body/mul -> transpose/while/body/mul
        short = re.sub(r"jit\(\w+\)/|jvp\(\)/?|[()]", "", origin).replace("//", "/")
        rows.append((_ms(seconds), f"{runs:g}", name, short[-70:]))
    return table(rows)


def comparison(all_numbers: Sequence[dict[str, Any]]) -> str:
    """One line for each topology."""
    rows = [("slices", "chips", "samples/chip", "passes", "remat", "HBM GiB", "of", "step ms", "MFU bound", "days")]
    for n in all_numbers:
        e, m = n["estimate"], n["memory"]
        slices = f"{n['topology']['slices']} x " if n["topology"]["slices"] > 1 else ""
        times = ("" if m["fits"] else "does not fit", "", "")
        if e:
            times = _ms(e["step_seconds"]), f"{e['mfu_bound_with_collectives']:.1%}", f"{e['days']:.2f}"
        rows.append((f"{slices}{n['topology']['name']}", str(n["chips"]), f"{n['batch_per_chip']:g}",
                     str(n["accumulation"]), n["model"]["remat"], f"{m['peak'] / GIB:.2f}", f"{m['limit'] / GIB:.2f}",
                     *times))  # fmt: skip
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; all but the first and texts of many words to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cell(row: Sequence[str], i: int) -> str:
        left = i == 0 or " " in rows[-1][i] or (i == len(row) - 1 and any(" " in r[i] for r in rows[1:]))
        return row[i].ljust(widths[i]) if left else row[i].rjust(widths[i])

    return "\n".join("  ".join(cell(row, i) for i in range(len(row))).rstrip() for row in rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
