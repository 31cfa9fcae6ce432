"""The parts of the page, each a string of HTML; whatever comes from a file is escaped."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fm4m import goodput
from fm4m.report import style
from fm4m.report.charts import Series, chart, number
from fm4m.report.read import Run

# Rows of a table of faults; more are counted.
MOST_ROWS = 50


def esc(value: Any) -> str:
    """Text for HTML, also inside attributes."""
    return html.escape(str(value), quote=True)


def swatch(colour: str) -> str:
    """A small square of a colour."""
    return f'<i class="swatch" style="--c:{colour}"></i>'


def moment(seconds: float) -> str:
    """Seconds since the epoch as a date in UTC; "?" for what is none."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OSError, OverflowError, ValueError):
        return "?"


def mean(losses: Mapping[str, float] | None, names: Sequence[str] | None = None) -> float | None:
    """Mean of the losses, of those named; None if there is none."""
    values = [v for k, v in (losses or {}).items() if names is None or k in names]
    return sum(values) / len(values) if values else None


def total_steps(run: Run) -> int | None:
    """Length of the run, where its configuration gives it in steps."""
    words = str(run.key("train.total") or "").split()
    digits = words[0].replace("_", "") if len(words) == 2 and words[1].startswith("step") else ""
    scale = {"K": 1e3, "M": 1e6}.get(digits[-1:].upper(), 1)
    try:
        return int(float(digits.rstrip("KMkm")) * scale)
    except (ValueError, OverflowError):
        return None


def state(run: Run) -> str:
    """How the newest attempt ended, in a few words; "" if nothing says."""
    if not run.attempts:
        return ""
    known = {"done": "done", "preempted": "told to stop; can be continued", "stopped": "stopped; can be continued"}
    return known.get(str(run.attempts[-1].get("ended")), "in progress, or killed")


def head(run: Run) -> str:
    """Title, what was trained on what, and when."""
    total, step = total_steps(run), run.step
    newest = run.environments[-1] if run.environments else {}
    source = newest.get("fm4m") if isinstance(newest.get("fm4m"), dict) else {}
    lines = [f"<b>{esc(run.key('model.name') or '?')}</b> on <b>{esc(run.key('data.mixture') or '?')}</b>"]
    lines[0] += f", step <b>{step:,}</b>" + (f" of {total:,}" if total else "")
    if source.get("commit"):
        changed = " with uncommitted changes" if source.get("changed") else ""
        lines.append(f"fm4m {esc(source.get('version', ''))}, commit {esc(str(source['commit'])[:12])}{changed}")
    devices = newest.get("devices") if isinstance(newest.get("devices"), dict) else {}
    if devices:
        hosts = newest.get("hosts") if isinstance(newest.get("hosts"), list) else []
        where = f"{esc(devices.get('count'))} × {esc(devices.get('kind'))}, {esc(newest.get('processes'))} process"
        where += "es" if newest.get("processes") != 1 else ""
        lines.append(where + (f" on {esc(', '.join(map(str, dict.fromkeys(hosts[:4]))))}" if hosts else ""))
    if run.attempts:
        last = goodput.end(run.attempts[-1])
        attempts = f"{len(run.attempts)} attempts" if len(run.attempts) > 1 else "1 attempt"
        lines.append(f"{moment(run.attempts[0]['start'])} to {moment(last)}, {attempts}")
    badge = f'<span class="badge">{esc(state(run))}</span>' if state(run) else ""
    return f"<h1>{esc(run.name)}{badge}</h1>" + "".join(f'<p class="lead">{line}</p>' for line in lines)


def tiles(run: Run) -> str:
    """The numbers to look at first."""
    out = []

    def tile(title: str, value: str, note: str = "") -> None:
        out.append(f'<div class="tile"><span>{esc(title)}</span><b>{esc(value)}</b><small>{esc(note)}</small></div>')

    if (loss := run.last("validation/loss")) is not None:
        base = mean(run.losses.get("frequency"), list(run.losses.get("end", {})))
        tile("validation loss", f"{loss:.3f}", f"token frequencies {base:.3f}" if base is not None else "nats a token")
    if (loss := run.last("train/loss")) is not None:
        tile("training loss", f"{loss:.3f}", "nats a token")
    if (speed := run.last("speed/samples_per_s")) is not None:
        tile("samples a second", number(speed), f"step {number(run.last('speed/step_s') or 0)} s")
    if (mfu := run.last("speed/mfu")) is not None:
        tile("MFU", f"{mfu:.1%}", "model FLOPs utilisation")
    if run.attempts:
        shares = goodput.shares(run.attempts)
        tile("goodput", f"{shares['step']:.1%}", f"of {goodput.duration(sum(goodput.totals(run.attempts).values()))}")
    if (used := run.last("memory/peak_gib")) is not None:
        tile("peak memory", f"{used:.2f} GiB", "of one device, or process")
    if run.parameters:
        tile("parameters", number(sum(run.parameters.values())), f"{len(run.parameters)} groups")
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def curves(runs: Sequence[Run]) -> str:
    """Losses, by modality, optimisation and speed; a colour a run if there are several."""
    one = len(runs) == 1

    def lines(name: str, label: str = "", kind: str = "line") -> list[Series]:
        return [
            Series(label if one else run.name, style.RUNS[i % len(style.RUNS)], run.points(name), kind)
            for i, run in enumerate(runs)
        ]

    def loss(suffix: str, modality: str | None) -> list[Series]:
        if not one:
            return lines(f"train/loss{suffix}") + [
                Series(f"{run.name}, validation", style.RUNS[i % len(style.RUNS)], points, "dots")
                for i, run in enumerate(runs)
                if (points := run.points(f"validation/loss{suffix}"))
            ]
        (run,) = runs
        frequency = run.losses.get("frequency", {})
        level = mean(frequency, list(run.losses.get("end", frequency))) if modality is None else frequency.get(modality)
        return [
            Series("training", style.TRAIN, run.points(f"train/loss{suffix}")),
            Series("validation", style.VALIDATION, run.points(f"validation/loss{suffix}"), "dots"),
            Series("token frequencies", style.BASELINE, [] if level is None else [(0, level)], "level"),
        ]

    modalities = list(dict.fromkeys(name for run in runs for name in run.modalities()))
    note = "nats a token" if one else "nats a token; lines: training, dots: validation"
    out = ["<h2>Loss</h2>", chart("all modalities", loss("", None), width=1120, height=300, note=note)]
    by_modality = "".join(chart(name, loss(f"/{name}", name), legend=False) for name in modalities)
    out.append(f'<div class="grid">{by_modality}</div>')
    groups = {
        "Optimisation": [("learning rate", "optimizer/lr", "zero"), ("gradient norm", "optimizer/grad_norm", "log"),
                         ("skipped steps", "train/skipped", "zero")],
        "Speed": [("samples a second", "speed/samples_per_s", "zero"), ("MFU", "speed/mfu", "zero"),
                  ("goodput since the start", "goodput/step", "zero"),
                  ("wait for input, seconds a step", "speed/input_wait_s", "zero"),
                  ("memory in use, GiB", "memory/in_use_gib", "zero")],
    }  # fmt: skip
    for title, found in groups.items():
        figures = "".join(chart(label, lines(name, label), axis=axis, legend=False) for label, name, axis in found)
        if figures:
            out.append(f'<h2>{title}</h2><div class="grid">{figures}</div>')
    return "".join(out) if any(run.rows for run in runs) else '<h2>Loss</h2><p class="card">No metrics yet.</p>'


def where_time_went(runs: Sequence[Run]) -> str:
    """Goodput as a bar by cause, and a bar for each attempt in the same scale."""
    out = []
    for run in runs:
        if not run.attempts:
            continue
        seconds = goodput.totals(run.attempts)
        whole = sum(seconds.values())
        order = ["step", *(c for c in style.CAUSES if c != "step")]
        rows = "".join(
            f"<div>{swatch(style.CAUSES[c])}{c}<b>{seconds[c] / whole:.1%}</b>"
            f"<em>{goodput.duration(seconds[c])}</em></div>"
            for c in sorted(order, key=lambda c: -seconds[c])
            if seconds[c] > 0
        )
        title = f"<h3>{esc(run.name)}</h3>" if len(runs) > 1 else ""
        body = title + _bar(seconds, order) + f'<div class="causes">{rows}</div>'
        if len(run.attempts) > 1:
            body += _attempts(run, order)
        out.append(f'<div class="card gap">{body}</div>')
    return f"<h2>Where the time went</h2>{''.join(out)}" if out else ""


def _bar(seconds: Mapping[str, float], order: Sequence[str], kind: str = "bar", width: float = 100.0) -> str:
    parts = "".join(
        f'<i style="--c:{style.CAUSES[c]};flex:{seconds[c]:.6g} 0 0" title="{c}: {goodput.duration(seconds[c])}"></i>'
        for c in order
        if seconds.get(c, 0) > 0
    )
    return f'<div class="{kind}" style="width:{width:.2f}%">{parts}</div>'


def _attempts(run: Run, order: Sequence[str]) -> str:
    shown = list(zip(run.attempts, goodput.lost_steps(run.attempts)))
    longest = max(sum(a["seconds"].values()) for a in run.attempts)
    rows = "".join(
        f"<tr><td>{moment(a['start'])}</td><td class=n>{a['first_step']:,} to {a['step']:,}</td>"
        f"<td class=n>{lost or ''}</td><td class=n>{goodput.duration(sum(a['seconds'].values()))}</td>"
        f"<td>{esc(a.get('ended') or 'no word of its end')}</td><td style='width:42%'>"
        f"{_bar(a['seconds'], order, 'bar small', 100 * sum(a['seconds'].values()) / longest)}</td></tr>"
        for a, lost in shown[-MOST_ROWS:]
    )
    hidden = len(shown) - MOST_ROWS
    more = f"<p class=note>{hidden} earlier attempts are not shown.</p>" if hidden > 0 else ""
    titles = "<th>attempt<th class=n>steps<th class=n>made again<th class=n>time<th>ended<th>"
    return f"<table class='wide gap'><tr>{titles}</tr>{rows}</table>{more}"


def loss_table(runs: Sequence[Run]) -> str:
    """Validation loss by modality: start, end and token frequencies; with several runs the end of each."""
    if len(runs) == 1:
        columns = {c: runs[0].losses[c] for c in ("start", "end", "frequency") if runs[0].losses.get(c)}
    else:
        columns = {run.name: run.losses["end"] for run in runs if run.losses.get("end")}
    names = list(dict.fromkeys(n for column in columns.values() for n in column))
    if not names:
        return ""
    own = {"start": style.TRAIN, "end": style.VALIDATION, "frequency": style.BASELINE}
    colours = [own.get(t, style.RUNS[0]) if len(runs) == 1 else style.RUNS[i % len(style.RUNS)]
               for i, t in enumerate(columns)]  # fmt: skip
    most = max([1e-9, *(v for column in columns.values() for v in column.values())])

    def line(name: str, values: Sequence[float | None], kind: str = "") -> str:
        cells = "".join(f"<td class=n>{'-' if v is None else f'{v:.4f}'}</td>" for v in values)
        marks = "".join(
            f'<i style="left:{100 * v / most:.2f}%;--c:{colour}" title="{esc(title)} {v:.4f}"></i>'
            for title, colour, v in zip(columns, colours, values)
            if v is not None
        )
        return f'<tr class="{kind}"><td>{esc(name)}</td>{cells}<td class="track"><div>{marks}</div></td></tr>'

    shared = [n for n in names if all(n in column for column in columns.values())]
    body = "".join(line(n, [column.get(n) for column in columns.values()]) for n in names)
    body += line("mean", [mean(column, shared) for column in columns.values()], "sum")
    titles = "".join(f"<th class=n>{swatch(colour)}{esc(title)}</th>" for title, colour in zip(columns, colours))
    return (
        '<h2>Validation loss, nats a token</h2><div class="card"><table class="wide"><tr><th>modality</th>'
        f"{titles}<th>0 to {most:.1f}</th></tr>{body}</table></div>"
    )


def faults(run: Run) -> str:
    """Skipped steps, damaged checkpoints, what processes reported, and what could not be read; "" if all is well."""
    out = []
    if run.skipped:
        keys = list(dict.fromkeys(key for row in run.skipped[-MOST_ROWS:] for key in row))[:10]
        rows = "".join(
            "<tr>" + "".join(f"<td>{esc(_plain(row.get(key, '')))}</td>" for key in keys) + "</tr>"
            for row in run.skipped[-MOST_ROWS:]
        )
        titles = "".join(f"<th>{esc(key)}</th>" for key in keys)
        count = f"{len(run.skipped)} skipped steps" if len(run.skipped) > 1 else "1 skipped step"
        out.append(f"<h3>{count}</h3><table><tr>{titles}</tr>{rows}</table>")
    if run.damaged:
        out.append(f"<h3>Damaged checkpoints, set aside</h3><p>{esc(', '.join(run.damaged))}</p>")
    for name, text in run.reports.items():
        out.append(f"<details><summary>processes/{esc(name)}</summary><pre>{esc(text)}</pre></details>")
    if run.problems:
        out.append("<h3>Not readable</h3>" + "".join(f"<p>{esc(problem)}</p>" for problem in run.problems[:MOST_ROWS]))
    return f'<h2>Faults</h2><div class="card fault">{"".join(out)}</div>' if out else ""


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def appendix(run: Run) -> str:
    """Parameters, configuration and environments, folded."""
    out = []
    if run.parameters:
        rows = "".join(f"<tr><td>{esc(g)}</td><td class=n>{n:,}</td></tr>" for g, n in run.parameters.items())
        rows += f"<tr class=sum><td>all</td><td class=n>{sum(run.parameters.values()):,}</td></tr>"
        out.append(_folded("Parameters", f"<table>{rows}</table><pre>{esc(run.parameter_table)}</pre>"))
    if run.config:
        kept = f"<p class=note>Earlier ones: {esc(', '.join(run.earlier_configs))}</p>" if run.earlier_configs else ""
        out.append(_folded("Configuration", f"{kept}<pre>{esc(json.dumps(run.config, indent=2))}</pre>"))
    for i, entry in enumerate(run.environments[-3:], max(len(run.environments) - 3, 0) + 1):
        title = f"Environment of attempt {i}" if len(run.environments) > 1 else "Environment"
        out.append(_folded(title, f"<pre>{esc(json.dumps(entry, indent=2))}</pre>"))
    if run.processes:
        out.append(_folded("What each process was last doing", f"<pre>{esc(''.join(run.processes.values()))}</pre>"))
    return f"<h2>Details</h2><div class=card>{''.join(out)}</div>" if out else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{body}</details>"


def differences(runs: Sequence[Run]) -> str:
    """Configuration keys in which runs differ."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}".lstrip(".")).items()}

    tables = [flat(run.config) for run in runs]
    keys = [k for k in dict.fromkeys(k for t in tables for k in t) if len({_plain(t.get(k)) for t in tables}) > 1]
    if not keys:
        return ""
    rows = "".join(
        f"<tr><td>{esc(k)}</td>" + "".join(f"<td>{esc(_plain(t.get(k)))}</td>" for t in tables) + "</tr>" for k in keys
    )
    titles = "".join(f"<th>{esc(run.name)}</th>" for run in runs)
    table = f"<table class='wide any'><tr><th>key</th>{titles}</tr>{rows}</table>"
    return f"<h2>What differs</h2><div class=card>{table}</div>"
