"""The whole page."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence

import fm4m
from fm4m.report import pictures, sections, style
from fm4m.report.read import Run


def page(runs: Sequence[Run]) -> str:
    """The report of one run, or the comparison of several, as HTML."""
    runs = _distinct(runs)
    drawn = [(run, pictures.sections(run)) for run in runs]  # first: it adds to the problems
    if len(runs) == 1:
        (run,) = runs
        title = run.name
        body = [sections.head(run), sections.tiles(run), sections.faults(run)]
    else:
        title = " and ".join(run.name for run in runs)
        body = [_heads(runs), sections.differences(runs)]
    body += [sections.curves(runs), sections.loss_table(runs), sections.where_time_went(runs)]
    if any(cards for _, cards in drawn):
        body.append("<h2>Pictures</h2>")
        for run, cards in drawn:
            body.append((f"<h3>{sections.esc(run.name)}</h3>" if len(runs) > 1 and cards else "") + cards)
    for run in runs:
        if len(runs) > 1:
            body.append(sections.faults(run))
        body.append(sections.appendix(run))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is fetched, whatever a file of the run may hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{sections.esc(title)}</title><style>{style.CSS}</style></head><body><main>{''.join(body)}"
        f'<footer>fm4m {fm4m.__version__}, {now}</footer></main><div id="tip"></div><script>{style.SCRIPT}</script>'
        "</body></html>\n"
    )


def _heads(runs: Sequence[Run]) -> str:
    rows = ""
    esc = sections.esc
    for i, run in enumerate(runs):
        total, loss = sections.total_steps(run), run.last("validation/loss")
        rows += (
            f"<tr><td>{sections.swatch(style.RUNS[i % len(style.RUNS)])}{esc(run.name)}</td>"
            f"<td>{esc(run.key('model.name') or '')}</td><td>{esc(run.key('data.mixture') or '')}</td>"
            f"<td class=n>{run.step:,}{f' of {total:,}' if total else ''}</td>"
            f"<td class=n>{'' if loss is None else f'{loss:.4f}'}</td><td>{sections.esc(sections.state(run))}</td></tr>"
        )
    return (
        f"<h1>{len(runs)} runs</h1><div class='card gap'><table class=wide><tr><th>run<th>model<th>mixture"
        f"<th class=n>step<th class=n>validation loss<th></tr>{rows}</table></div>"
    )


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs whose folders have the same name are called by their paths."""
    names = [run.name for run in runs]
    return [dataclasses.replace(run, name=run.path) if names.count(run.name) > 1 else run for run in runs]
