from __future__ import annotations

import html.parser
import io
import json
import os
import re

import numpy as np
import pytest
from chromium import PATH, Chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fm4m import goodput, metrics
from fm4m.report import __main__ as command
from fm4m.report import charts, page, pictures, read, sections

EVIL = "<script>alert(1)</script>\"'&"


def write_run(folder, *, steps=40, attempts=2, name="m"):
    """A run's folder as the trainer leaves it, with a name in it that is HTML."""
    folder.mkdir(parents=True)
    config = {"model": {"name": name}, "data": {"mixture": EVIL}, "train": {"total": "1K steps"}, "seed": steps}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "parameters.txt").write_text(f"encoder/a  (4, 8)  P('fsdp')\nheads/{EVIL}  (16,)  P()\n")
    losses = {"start": {"depth": 5.0, EVIL: 6.0}, "frequency": {"depth": 4.0, EVIL: None}}
    (folder / "start.json").write_text(json.dumps(losses))
    writer = metrics.MetricWriter(folder, tensorboard=False)
    writer.write(0, {"validation/loss": 5.5, "validation/loss/depth": 5.0, f"validation/loss/{EVIL}": 6.0})
    for step in range(10, steps + 1, 10):
        row = {"train/loss": 5 - step / 100, "train/loss/depth": 5 - step / 50, "optimizer/lr": 1e-3, "speed/mfu": 0.25}
        writer.write(step, row | {"optimizer/grad_norm": float("nan") if step == 20 else 10.0**step})
        writer.pictures(step, {"sheet": np.full((8, 8, 3), step, np.uint8)})
    writer.write(steps, {"validation/loss": 2.5, "validation/loss/depth": 2.0, f"validation/loss/{EVIL}": 3.0})
    writer.close()
    seconds = dict.fromkeys(goodput.CAUSES, 0.0) | {"step": 60.0, "compile": 20.0}
    found = [
        {"start": 1e9 + 100 * i, "first_step": 10 * i, "step": steps, "seconds": seconds, "ended": EVIL}
        for i in range(attempts)
    ]
    (folder / "goodput.json").write_text(json.dumps({"attempts": found}))
    environment = {"fm4m": {"version": "1", "commit": "c0ffee" * 7, "changed": True}, "hosts": [EVIL], "processes": 2,
                   "devices": {"kind": EVIL, "count": 8}}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"attempts": [environment] * attempts}))
    (folder / "checkpoints" / "damaged-30").mkdir(parents=True)
    (folder / "processes").mkdir()
    (folder / "processes" / "report.txt").write_text(f"process 1 hangs {EVIL}")
    (folder / "processes" / "0.json").write_text(json.dumps({"phase": EVIL}) + "\n")
    skipped = {"step": 20, "first position": 160, "positions": 8, "loss": None, "grad_norm": None, "modalities": [EVIL]}
    (folder / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    return folder


class Tags(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects them with the text of the page."""

    VOID = ("meta", "img", "input", "line", "circle", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not [t for t in self.open if t not in ("th", "tr")], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open[-1] == "th" and tag != "th":  # the end of a cell of a head may be left out
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run & <b>")


def test_the_page_has_everything_and_needs_nothing(run, capsys):
    assert command.main([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    found = Tags(text)
    scripts = [attrs for tag, attrs in found.tags if tag == "script"]
    assert scripts == [{}] and text.count("<script") == 1, "a name from a file became a tag"
    links = [v for _, attrs in found.tags for k, v in attrs.items() if k in ("src", "href")]
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(", text)
    seen = "".join(found.text)
    for expected in (
        "run & <b>", "step 40 of 1,000", "commit c0ffeec0ffee with uncommitted changes", "8 × ", "2 processes",
        "2 attempts", "goodput", "1 skipped step", "damaged-30", "process 1 hangs <script>", "tile",
        "gradient norm", "learning rate", "depth", "restart", "lost", "step 40",
    ):  # fmt: skip
        assert expected in (seen if expected != "tile" else text), expected
    charted = [json.loads(attrs["data-chart"]) for tag, attrs in found.tags if "data-chart" in attrs]
    loss = {s["n"]: s["p"] for s in charted[0]["series"]}
    assert loss["training"] == [[10, 4.9], [20, 4.8], [30, 4.7], [40, 4.6]]
    assert loss["validation"] == [[0, 5.5], [40, 2.5]] and loss["token frequencies"] == [[0, 4.0]]
    norms = next(c["series"][0]["p"] for c in charted if c["series"][0]["n"] == "gradient norm")
    assert [x for x, _ in norms] == [10, 30, 40]  # the one that was not finite is left out


def test_several_runs_are_laid_over_each_other(run, tmp_path, capsys):
    other, same = write_run(tmp_path / "other", steps=20), write_run(tmp_path / "x" / "other", steps=30)
    assert command.main([str(run), str(other), str(same), f"--out={tmp_path}/c.html"]) == 0
    found = Tags((tmp_path / "c.html").read_text())
    seen = "".join(found.text)
    assert "3 runs" in seen and "What differs" in seen and str(same) in seen and "seed" in seen
    chart = json.loads(next(attrs["data-chart"] for _, attrs in found.tags if "data-chart" in attrs))
    assert [len(s["p"]) for s in chart["series"]] == [4, 2, 3, 2, 2, 2]


def test_folders_that_hold_no_run(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert command.main([str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "holds no run: it has none of metrics.jsonl" in errors[0]
    assert "there is no folder" in errors[1] and not list(tmp_path.iterdir())


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = page.page([read.read_run(tmp_path)])
    assert "No metrics yet" in text and "Faults" not in text
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train/loss": 3.0}\n{"step": 10, "train/l')
    Tags(page.page([read.read_run(tmp_path)]))
    assert read.read_run(tmp_path).problems == []  # half a line is a run in progress


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["step", "train/loss", "validation/loss/a", "speed/mfu", "attempts", "start", "train"])
OBJECT = st.dictionaries(NAMES, JUNK, max_size=5)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(OBJECT | JUNK, max_size=4), OBJECT | JUNK, st.binary(max_size=30), st.data())
def test_nothing_in_a_folder_stops_the_report(tmp_path_factory, rows, value, data, drawn):
    folder = tmp_path_factory.mktemp("junk")
    (folder / "metrics.jsonl").write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + b"\n" + data)
    for name in ("config.json", "goodput.json", "environment.json", "start.json", "skipped.jsonl", "parameters.txt"):
        what = drawn.draw(st.sampled_from(["absent", "json", "bytes"]))
        if what != "absent":
            (folder / name).write_bytes(json.dumps(value).encode() if what == "json" else data)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "00000003_x.png").write_bytes(data)
    run = read.read_run(folder)
    text = page.page([run])
    assert "<footer>" in text and page.page([run, run])
    assert any("00000003_x.png" in problem for problem in run.problems)


def test_odd_attempts(tmp_path):
    odd = [{"start": 1e300, "first_step": 9, "step": 3, "seconds": {"step": 1e300}, "ended": [EVIL]}] * 2
    (tmp_path / "goodput.json").write_text(json.dumps({"attempts": odd}))
    assert "Where the time went" in page.page([read.read_run(tmp_path)])


def test_pictures_are_bounded(tmp_path):
    assert pictures.chosen(5) == [0, 1, 2, 3, 4]
    assert pictures.chosen(1000)[0] == 0 and pictures.chosen(1000)[-1] == 999 and len(pictures.chosen(1000)) == 12
    noise = np.random.default_rng(0).integers(0, 256, (300, 2000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "00000001_big.png")
    assert os.path.getsize(tmp_path / "00000001_big.png") > pictures.FRAME_BYTES
    run = read.Run("r", "r")
    smaller = pictures._png(run, tmp_path / "00000001_big.png")
    assert Image.open(io.BytesIO(smaller)).size == (1400, 210) and not run.problems


def test_ticks_and_numbers():
    assert charts.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(2.71, 3.3, 4) == [2.8, 3.0, 3.2]
    assert charts.ticks(-1e-9, 1e-9, 2) == [-1e-9, 0, 1e-9]
    assert [charts.number(x) for x in (0, 0.25, 12_500, 3e6, 3e-5)] == ["0", "0.25", "12.5k", "3M", "3e-5"]
    points = [(i, float(i)) for i in range(10_001)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MOST_POINTS and thinned[-1][0] == 10_000 and thinned[0] == (12, 6.0)
    assert sections.total_steps(read.Run("", "", {"train": {"total": "20K steps"}})) == 20_000
    assert sections.total_steps(read.Run("", "", {"train": {"total": "500B tokens"}})) is None


@pytest.mark.skipif(PATH is None, reason="no Chromium; Debian's package chromium has one")
def test_the_page_in_a_browser(run):
    (run / "page.html").write_text(page.page([read.read_run(run)]))
    with Chromium() as browser:
        browser.open((run / "page.html").as_uri())
        browser.wait("document.readyState === 'complete'", 60)
        assert browser.run("document.querySelector('h1').firstChild.textContent") == "run & <b>"
        assert browser.run("[...document.images].every(i => i.naturalWidth === 8 || !i.classList.contains('on'))")
        assert browser.run("""(() => {
            const svg = document.querySelector('svg[data-chart]'), box = svg.getBoundingClientRect();
            const at = {clientX: box.right - 20, clientY: box.top + 50};
            svg.dispatchEvent(new PointerEvent('pointermove', at));
            return document.getElementById('tip').textContent; })()""") == (
            "step 40training4.6validation2.5token frequencies4"
        )
        assert browser.run("""(() => {
            const input = document.querySelector('.frames input'); input.value = 1;
            input.dispatchEvent(new Event('input'));
            return document.querySelector('.frames img.on').alt; })()""") == "step 20"
        assert browser.messages == []
