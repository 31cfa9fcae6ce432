"""Look and behaviour of the page: everything is in the file, so that it opens from a disk or an e-mail."""

from __future__ import annotations

# Colours of runs, and in a report of one run of training and validation; told apart by the colour-blind too.
RUNS = ("#2a78d6", "#e8762c", "#1a9a77", "#b34fc5", "#c9a400", "#d6456f", "#5f6b7a", "#7a5cd0")
TRAIN, VALIDATION, BASELINE = RUNS[0], RUNS[1], "var(--faint)"
CAUSES = {
    "step": "#2f9e6e", "start": "#98a2ae", "compile": "#7d63c9", "restore": "#58a9d8", "data": "#e3a21a",
    "checkpoint": "#2a78d6", "validation": "#d9699f", "pictures": "#b58fd6", "profile": "#6d7885",
    "restart": "#d8473d", "lost": "#8e1f24",
}  # fmt: skip

CSS = """
:root { --ink: #1b2430; --soft: #566171; --faint: #8b95a3; --line: #e3e7ec; --page: #f5f6f8; --card: #fff;
  --warn: #b3371f; --warn-bg: #fdf0ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a5afbd; --faint: #788393; --line: #313945;
  --page: #14181e; --card: #1c222a; --warn: #ff9a80; --warn-bg: #3a211b; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 30px 24px 70px }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 5px; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 38px 0 12px }
.lead { color: var(--soft); margin: 0 0 3px }
.lead b { color: var(--ink); font-weight: 600 }
.badge { display: inline-block; font-size: 12px; font-weight: 600; padding: 1px 9px; border-radius: 10px;
  border: 1px solid var(--line); background: var(--card); vertical-align: 5px; margin-left: 9px; letter-spacing: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 20px 0 0 }
.tile, .card, .chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 11px 15px 12px }
.tile span { display: block; font-size: 12.5px; color: var(--soft) }
.tile b { display: block; font-size: 23px; line-height: 1.25; font-weight: 600; white-space: nowrap }
.tile small { color: var(--faint); font-size: 12px }
.card { padding: 16px 18px; overflow-x: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px }
.grid + .grid, .chart + .grid { margin-top: 14px }
.chart { margin: 0; padding: 11px 12px 4px; position: relative; min-width: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: 1px 12px; align-items: baseline; font-size: 13px;
  padding: 0 3px 4px }
figcaption b { font-weight: 600; overflow-wrap: anywhere }
.note, .legend { color: var(--soft); font-size: 12px }
.legend { margin-left: auto; display: flex; flex-wrap: wrap; gap: 0 12px }
.key i { display: inline-block; width: 16px; margin-right: 5px; vertical-align: 3.5px; border-top: 2px solid var(--c) }
.key i.level, .key i.dashed { border-top-style: dashed }
.key i.dots, i.swatch { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--c);
  vertical-align: 0 }
i.swatch { display: inline-block; border-radius: 2px; margin-right: 7px; flex: none; align-self: center }
.chart svg { display: block; width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; font-variant-numeric: tabular-nums }
svg .grid { stroke: var(--line) } svg .axis { stroke: var(--faint) } svg .cross { stroke: var(--faint) }
polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round }
polyline.dashed, line.level { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 5 4 }
circle { fill: var(--c); stroke: var(--card); stroke-width: 1 }
#tip { position: fixed; pointer-events: none; background: var(--card); color: var(--ink); border: 1px solid var(--line);
  border-radius: 7px; box-shadow: 0 3px 14px #0003; padding: 6px 10px; font-size: 12px; display: none; z-index: 9 }
#tip div { white-space: nowrap; font-variant-numeric: tabular-nums } #tip b { float: right; margin-left: 16px }
.bar { display: flex; gap: 2px; height: 26px; border-radius: 6px; overflow: hidden }
.bar.small { height: 13px; border-radius: 4px } .bar i { background: var(--c); min-width: 1px }
.causes { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 2px 26px; margin-top: 12px }
.causes div { display: flex; font-size: 13.5px } .causes b { margin-left: auto; font-weight: 600 }
.causes em { font-style: normal; color: var(--faint); width: 74px; text-align: right }
table { border-collapse: collapse; font-size: 13.5px } .wide { width: 100% }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom }
th, td { padding: 4px 20px 4px 0; border-bottom: 1px solid var(--line) } tr:last-child td { border-bottom: 0 }
.n { text-align: right; font-variant-numeric: tabular-nums } th.n { text-align: right }
.any td { overflow-wrap: anywhere; vertical-align: top; min-width: 110px }
tr.sum td { font-weight: 600; border-top: 1.5px solid var(--faint) }
.frames img { max-width: 100%; height: auto; display: none; image-rendering: auto; border-radius: 6px }
.frames img.on { display: block }
.slider { display: flex; align-items: center; gap: 14px; margin: 0 0 12px; font-size: 13.5px; color: var(--soft) }
.slider input { flex: 1; max-width: 430px; accent-color: #2a78d6 } .slider output { min-width: 110px }
details { margin-bottom: 10px } summary { cursor: pointer; font-weight: 600; font-size: 14px }
details pre { margin: 12px 0 2px } summary + table, summary + p { margin-top: 10px }
pre { font: 12px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }
.fault { background: var(--warn-bg); border-color: var(--warn) } .fault h3 { color: var(--warn) }
.track { width: 46% }
.track div { position: relative; height: 10px; border-bottom: 1px solid var(--line); top: -5px }
.track i { position: absolute; width: 9px; height: 9px; border-radius: 50%; background: var(--c); top: 5px;
  margin-left: -4px }
h3 { font-size: 14px; margin: 0 0 6px } table + h3, p + h3, details + h3, .card + h3 { margin-top: 16px }
h3 + table { margin-top: 4px } .gap { margin-top: 12px }
footer { margin-top: 44px; color: var(--faint); font-size: 12px }
"""

SCRIPT = """
const tip = document.getElementById('tip');
const show = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(+v.toPrecision(5));
for (const svg of document.querySelectorAll('svg[data-chart]')) {
  const d = JSON.parse(svg.dataset.chart), cross = svg.querySelector('.cross');
  svg.addEventListener('pointermove', e => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const u = ((e.clientX - box.left) * scale - d.px[0]) / (d.px[1] - d.px[0]);
    const x = d.x[0] + Math.min(Math.max(u, 0), 1) * (d.x[1] - d.x[0]);
    const near = p => p.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const lines = d.series.filter(s => s.k !== 'level'), base = lines.length ? lines : d.series;
    const at = near(base.map(s => near(s.p)))[0];
    tip.replaceChildren();
    const head = tip.appendChild(document.createElement('div'));
    head.textContent = 'step ' + at;
    for (const s of d.series) {
      const p = s.k === 'level' ? s.p[0] : near(s.p);
      if (s.k !== 'level' && p[0] !== at && s.k !== 'dots' && lines.length < 3) continue;
      const row = tip.appendChild(document.createElement('div'));
      const dot = row.appendChild(document.createElement('i'));
      dot.className = 'swatch'; dot.style.setProperty('--c', s.c);
      row.append(s.n + (p[0] !== at && s.k !== 'level' ? ' (step ' + p[0] + ')' : ''));
      row.appendChild(document.createElement('b')).textContent = show(p[1]);
    }
    const px = d.px[0] + (at - d.x[0]) / (d.x[1] - d.x[0]) * (d.px[1] - d.px[0]);
    cross.setAttribute('x1', px); cross.setAttribute('x2', px); cross.setAttribute('visibility', 'visible');
    tip.style.display = 'block';
    const left = e.clientX + 16 + tip.offsetWidth > innerWidth ? e.clientX - 14 - tip.offsetWidth : e.clientX + 16;
    tip.style.left = left + 'px'; tip.style.top = Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 6) + 'px';
  });
  svg.addEventListener('pointerleave', () => {
    tip.style.display = 'none'; cross.setAttribute('visibility', 'hidden');
  });
}
for (const frames of document.querySelectorAll('.frames')) {
  const input = frames.querySelector('input'), images = [...frames.querySelectorAll('img')];
  if (input) input.addEventListener('input', () => {
    images.forEach((image, i) => image.classList.toggle('on', i === +input.value));
    frames.querySelector('output').textContent = images[+input.value].alt;
  });
}
"""
