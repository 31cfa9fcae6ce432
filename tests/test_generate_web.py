"""The web page over HTTP: what it offers, what it answers, what it refuses."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading

import chromium
import numpy as np
import pytest
from PIL import Image
from test_generate_session import loaded, opened  # noqa: F401  (fixtures)

import fm4m
from fm4m.generate import web


def url(picture, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def picture_of(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))))


@pytest.fixture(scope="module")
def address(opened):  # noqa: F811
    with web.make_server(opened, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()


def ask(address, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(*address, timeout=120)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def post(address, request):
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    status, _, data = ask(address, "POST", "/generate", body, **{"Content-Type": "application/json"})
    return status, json.loads(data)


PHOTO = {"file": url(np.full((40, 60, 3), 90, np.uint8)), "name": "photo.png"}


def test_the_page_is_one_document_and_knows_the_model(address):
    status, headers, page = ask(address, "GET", "/")
    assert status == 200 and headers.get_content_type() == "text/html"
    assert b"<script>" in page and b"http" not in page.replace(b"httpEquiv", b"")
    model = json.loads(ask(address, "GET", "/model")[2])
    kinds = {m["name"]: (m["kind"], m["edit"], m["usable"]) for m in model["inputs"]}
    assert kinds == {
        "rgb@64": ("picture", False, True), "tok_depth@64": ("picture", True, True),
        "caption": ("text", False, True), "det": ("text", False, True),
    }  # fmt: skip
    assert model["outputs"] == ["tok_depth@64", "caption", "det"]
    status, _, data = ask(address, "GET", "/../etc/passwd")
    assert status == 404 and "There is no page" in json.loads(data)["error"]


def test_a_picture_becomes_pictures_and_texts_and_a_drawing_changes_only_its_cells(address):
    request = {"inputs": {"rgb@64": PHOTO}, "targets": ["depth", "caption"], "samples": 2, "seed": 3}
    status, out = post(address, request)
    assert status == 200 and picture_of(out["sheet"]).shape[2] == 3
    assert [(r["name"], r["sample"]) for r in out["results"]] == [
        ("tok_depth@64", 0), ("tok_depth@64", 1), ("caption", 0), ("caption", 1),
    ]  # fmt: skip
    depth = out["results"][0]
    assert picture_of(depth["picture"]).shape == (64, 64, 3) and len(depth["codes"]) == 64
    assert isinstance(out["results"][2]["text"], str)
    mask = np.zeros((224, 224), np.uint8)
    mask[:28, 28:56] = 255  # the second cell of the first row
    codes = [1] * 64
    request = {
        "inputs": {"tok_depth@64": {"codes": codes}, "rgb@64": PHOTO}, "edits": {"tok_depth@64": url(mask)},
        "settings": {"steps": 1, "temperature": 50, "top_p": 0, "guidance": 1},
    }  # fmt: skip
    status, out = post(address, request)
    assert status == 200, out
    changed = np.flatnonzero(np.array(out["results"][0]["codes"]) != codes)
    assert changed.tolist() == [1]


def test_two_uploads_are_two_files_and_what_is_edited_is_not_given(opened, monkeypatch):  # noqa: F811
    seen, asked = {}, []
    read, target = opened.read, web.presets.target

    def watched(inputs, samples):
        seen.update({name: path.read_bytes() for name, path in inputs.items()})
        return read({"caption": "a bed", "depth": np.arange(64, dtype=np.int64)}, samples)

    monkeypatch.setattr(opened, "read", watched)
    monkeypatch.setattr(web.presets, "target", lambda m, name, given: asked.append(given) or target(m, name, given))
    pictures = {n: np.full((8, 8, 3), v, np.uint8) for n, v in (("rgb@64", 9), ("tok_depth@64", 200))}
    request = {"inputs": {n: {"file": url(p), "name": "a.png"} for n, p in pictures.items()},
               "edits": {"tok_depth@64": url(np.full((8, 8), 255, np.uint8))}, "settings": {"steps": 1}}  # fmt: skip
    web.App(opened).generate(request)
    for name, picture in pictures.items():
        assert (np.asarray(Image.open(io.BytesIO(seen[name]))) == picture).all()
    assert asked == [["caption"]]


TEXT = {"caption": {"text": "a bed"}}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100000, "is not JSON"),
        ([], "must be a JSON object"),
        ({"targets": ["depth"]}, "Nothing is given"),
        ({"inputs": TEXT}, "choose at least one target"),
        ({"inputs": TEXT, "targets": ["dpeth"]}, "Did you mean"),
        ({"inputs": {"caption": {"text": "a bed " * 9}}, "targets": ["depth"]}, "at most 12 fit"),
        ({"inputs": {"rgb@64": {"text": "/etc/passwd"}}, "targets": ["depth"]}, "is no text: upload a file"),
        ({"inputs": {"rgb@64": {"file": "data:;base64,AAAA", "name": "a.png"}}, "targets": ["depth"]}, "not a picture"),
        ({"inputs": {"rgb@64": {"file": "data:;base64,?", "name": "a.png"}}, "targets": ["depth"]}, "is not base64"),
        ({"inputs": {"rgb@64": {"file": "data:;base64,AAAA", "name": "a.exe"}}, "targets": ["depth"]}, "'.exe'"),
        ({"inputs": {"rgb@64": {"file": 3, "name": "a.png"}}, "targets": ["depth"]}, "expected a data URL"),
        ({"inputs": {"depth": {"codes": [1, "2"]}}, "targets": ["caption"]}, "list of whole numbers"),
        ({"inputs": {"depth": {"codes": [999] * 64}}, "targets": ["caption"]}, "codes must be from 0 to 127"),
        ({"inputs": {"caption": "a bed"}, "targets": ["depth"]}, "expected one of text, file and codes"),
        ({"inputs": TEXT, "targets": ["depth"], "samples": 99}, "from 1 to 16"),
        ({"inputs": TEXT, "targets": ["depth"], "seed": 0.5}, "seed must be a whole number"),
        ({"inputs": TEXT, "targets": ["depth"], "settings": {"steps": 1.5}}, "must be a whole number, got 1.5"),
        ({"inputs": TEXT, "targets": ["depth"], "settings": {"steps": 0}}, "at least one step"),
        ({"inputs": TEXT, "targets": ["depth"], "settings": {"speed": 1}}, "no setting 'speed'"),
        ({"inputs": TEXT, "targets": ["depth"], "edits": {"caption": "x"}}, "expected a data URL"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(address, request_, message):
    status, out = post(address, request_)
    assert status == 400 and message in out["error"]


def test_requests_of_other_sites_are_refused(address):
    body = json.dumps({"inputs": TEXT, "targets": ["depth"]})
    assert ask(address, "POST", "/generate", body, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(address, "GET", "/model", Host="evil.example:80")[0] == 403
    assert ask(address, "POST", "/elsewhere", "{}", **{"Content-Type": "application/json"})[0] == 404
    too_long = {"Content-Type": "application/json", "Content-Length": str(web.MAX_BODY + 1)}
    assert ask(address, "POST", "/generate", None, **too_long)[0] == 413


def test_the_command_says_what_is_wrong(loaded, address, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(fm4m, "load", lambda path, ema: loaded)
    assert web.main(["--model=x", f"--port={address[1]}"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(chromium.PATH is None, reason="there is no chromium; Debian's package of this name has it")
def test_a_person_uploads_draws_and_sees_the_result(address, tmp_path):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    with chromium.Chromium() as page:
        page.open(f"http://127.0.0.1:{address[1]}/")
        page.wait("document.querySelectorAll('#targets input').length === 3")
        page.run("byId('go').click()")
        page.wait("byId('error').textContent.startsWith('Nothing is given')")
        page.upload("[id='in-rgb@64']", tmp_path / "photo.png")
        page.wait("cards['rgb@64'].value() !== null")
        page.run("document.querySelector('#targets input[value=\"tok_depth@64\"]').click()")
        page.run("byId('go').click()")
        page.wait("byId('status').textContent.startsWith('Done')")
        assert page.run("byId('error').textContent") == ""
        assert page.wait("byId('sheet').naturalWidth") > 144
        first = page.run("document.querySelector('#results img').src")
        assert picture_of(first).shape == (64, 64, 3)
        # The result goes back in, a line is drawn into its first row of cells, and only that is made anew.
        page.run("document.querySelector('#results button').click()")
        page.wait("!byId('in-tok_depth@64').parentElement.querySelector('canvas').hidden")
        before = page.run("cards['tok_depth@64'].value().codes")
        page.drag("[id='in-tok_depth@64'] + canvas", [(0.06, 0.06), (0.3, 0.06), (0.6, 0.06)])
        page.run("byId('temperature').value = 50; byId('guidance').value = 1; byId('status').textContent = ''")
        page.run("document.querySelector('#targets input:checked').click()")
        page.run("byId('go').click()")
        page.wait("byId('status').textContent.startsWith('Done')")
        page.run("document.querySelector('#results button').click()")
        after = page.run("cards['tok_depth@64'].value().codes")
        changed = np.flatnonzero(np.array(before) != after)
        assert len(changed) and changed.max() < 8
        page.screenshot(tmp_path / "page.png")
        # Of the errors that the browser reports, the refusal above is the only one.
        assert len(page.messages) == 1 and "400" in page.messages[0]
