"""A small web page: upload or draw, choose targets, see the result.

    python -m fm4m.generate.web --model=runs/demo            (then open http://127.0.0.1:7860)

Needs nothing beyond the standard library and PIL. The page (page.py) is one document without outside resources; it
speaks JSON with two addresses:

    GET  /model      what the model can be given and can generate
    POST /generate   {"inputs": {NAME: {"text": ...} | {"file": data URL, "name": ...} | {"codes": [...]}},
                     "edits": {NAME: data URL of a mask, white changes}, "targets": [NAME, ...],
                     "seed": 0, "samples": 1, "settings": {field of Target: number}}
                     answers {"sheet": data URL, "results": [...]}, or {"error": a sentence} with status 400

It is meant for one user on one machine: it listens on 127.0.0.1 unless told otherwise, has no log-in, and generates
for one request at a time.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import dataclasses
import functools
import http.server
import io
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fm4m.generate import command, presets
from fm4m.generate.canvas import Canvas
from fm4m.generate.generator import Target
from fm4m.generate.page import PAGE
from fm4m.generate.session import Session, read_picture

MAX_BODY = 64 << 20  # bytes of a request
MAX_SAMPLES = 16
SETTINGS = {"steps": int, "temperature": float, "top_p": float, "guidance": float}
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_IMAGE_SUFFIXES = (".npy", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class App:
    """What the page asks for, without HTTP.

    Args:
      session: the model with its tokenizers.
    """

    def __init__(self, session: Session):
        self.session = session
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Inputs and outputs for the page."""
        modalities = self.session.modalities

        def one(name: str) -> dict[str, Any]:
            m, shower = modalities[name], self.session.showers.get(name)
            kind = "text" if m.kind == "sequence" else "picture"
            usable = m.kind in ("pixels", "embedding") or shower is not None
            return {"name": name, "kind": kind, "edit": m.kind == "tokens", "usable": usable}

        both = [*dict.fromkeys((*modalities.inputs, *modalities.outputs))]
        return {"inputs": [one(n) for n in both], "outputs": presets.in_order(modalities.outputs)}

    def generate(self, request: Any) -> dict[str, Any]:
        """Answers /generate. Raises ValueError with a sentence for the user."""
        if not isinstance(request, dict):
            raise ValueError("the request must be a JSON object")
        samples, seed = _whole(request, "samples", 1, 1, MAX_SAMPLES), _whole(request, "seed", 0, 0, 2**31 - 1)
        given = _table(request, "inputs")
        if not given:
            raise ValueError("Nothing is given: fill in at least one input.")
        started = time.perf_counter()
        with self._lock, tempfile.TemporaryDirectory() as folder:
            inputs = {n: self._input(n, v, pathlib.Path(folder)) for n, v in given.items()}
            canvas = self.session.read(inputs, samples)
            shown, edited = list(canvas.seen), []
            for name, mask in _table(request, "edits").items():
                name = self.session.name_of(name, shown)
                canvas = self.session.open_cells(canvas, name, _mask(name, mask))
                edited.append(name)
            targets = self._targets(request, shown, edited)
            names = [t.name for t in targets]
            canvas = self.session.generator(canvas, targets, seed=seed)
            sheet = self.session.sheet(canvas, shown, names, f"seed {seed}")
            results = [r for name in names for r in self._results(canvas, name)]
        return {"sheet": _data_url(sheet), "results": results, "seconds": time.perf_counter() - started}

    def _input(self, name: str, value: Any, folder: pathlib.Path) -> Any:
        modalities = self.session.modalities
        m = modalities[self.session.name_of(name, [*dict.fromkeys((*modalities.inputs, *modalities.outputs))])]
        if not isinstance(value, dict) or len({"text", "file", "codes"} & set(value)) != 1:
            raise ValueError(f"input {name!r}: expected one of text, file and codes")
        if "text" in value:
            if not isinstance(value["text"], str):
                raise ValueError(f"input {name!r}: the text must be a string")
            # A string for anything else would be read as the path of a file on this machine.
            if m.kind != "sequence":
                raise ValueError(f"input {m.name!r} is no text: upload a file")
            return value["text"]
        if "codes" in value:
            codes = value["codes"]
            if not isinstance(codes, list) or not all(isinstance(c, int) and abs(c) < 2**31 for c in codes):
                raise ValueError(f"input {name!r}: codes must be a list of whole numbers")
            return np.asarray(codes, np.int64)
        suffix = pathlib.PurePosixPath(str(value.get("name", ""))).suffix.lower()
        if suffix not in _IMAGE_SUFFIXES:
            raise ValueError(f"input {name!r}: expected a picture or a .npy array, got a file named {suffix or '?'!r}")
        path = folder / f"{len(list(folder.iterdir()))}{suffix}"
        path.write_bytes(_bytes(f"input {name!r}", value["file"]))
        return path

    def _targets(self, request: Mapping[str, Any], given: Sequence[str], edited: Sequence[str]) -> list[Target]:
        asked = request.get("targets", [])
        if not isinstance(asked, list) or not all(isinstance(n, str) for n in asked):
            raise ValueError("targets must be a list of names")
        names = [self.session.name_of(n, self.session.modalities.outputs) for n in asked]
        names = [*(n for n in edited if n not in names), *names]
        if not names:
            raise ValueError("Nothing to generate: choose at least one target, or draw where a picture shall change.")
        settings = _table(request, "settings")
        out = []
        for name in dict.fromkeys(names):
            target = presets.target(self.session.modalities, name, [n for n in given if n != name])
            values = {}
            for field, value in settings.items():
                if field not in SETTINGS:
                    raise ValueError(f"there is no setting {field!r}; known: {', '.join(SETTINGS)}")
                if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                    raise ValueError(f"setting {field!r} must be a number, got {value!r}")
                if SETTINGS[field] is int and value != int(value):
                    raise ValueError(f"setting {field!r} must be a whole number, got {value!r}")
                values[field] = SETTINGS[field](value)
            out.append(dataclasses.replace(target, **values))
        return out

    def _results(self, canvas: Canvas, name: str) -> list[dict[str, Any]]:
        out, m = [], self.session.modalities[name]
        for b, cell in enumerate(self.session.cells(canvas, name)):
            result: dict[str, Any] = {"name": name, "sample": b}
            if isinstance(cell, tuple):
                result["picture"] = _data_url(_with_boxes(cell))
            elif isinstance(cell, np.ndarray):
                result["picture"] = _data_url(cell)
            if m.kind == "sequence" and name in self.session.showers:
                result["text"] = self.session.texts(canvas, name)[b]
            elif m.kind == "tokens":
                result["codes"] = np.asarray(canvas.ids[name])[b].tolist()
            out.append(result)
        return out


def _whole(request: Mapping[str, Any], field: str, default: int, low: int, high: int) -> int:
    value = request.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{field} must be a whole number from {low} to {high}, got {value!r}")
    return value


def _table(request: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = request.get(field) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{field} must be an object")
    return value


def _bytes(what: str, url: Any) -> bytes:
    if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url:
        raise ValueError(f"{what}: expected a data URL in base64")
    try:
        return base64.b64decode(url.partition(";base64,")[2], validate=True)
    except binascii.Error:
        raise ValueError(f"{what}: the data URL is not base64") from None


def _mask(name: str, url: Any) -> np.ndarray:
    data = _bytes(f"mask of {name!r}", url)
    return read_picture(io.BytesIO(data), f"mask of {name!r}: this", lambda image: image.convert("L")) > 127


def _data_url(picture: np.ndarray) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _with_boxes(cell: tuple) -> np.ndarray:
    """A picture with its boxes, large enough for their names."""
    from PIL import Image, ImageDraw

    from fm4m.pictures import BOX_COLOURS

    image = Image.fromarray(np.ascontiguousarray(cell[0]))
    image = image.resize((max(image.width, 256), max(image.height, 256)), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for k, box in enumerate(cell[1]):
        colour, (w, h) = BOX_COLOURS[k % len(BOX_COLOURS)], (image.width - 1, image.height - 1)
        draw.rectangle((box.xmin * w, box.ymin * h, box.xmax * w, box.ymax * h), outline=colour, width=2)
        draw.text((box.xmin * w + 3, box.ymin * h + 1), box.class_name, colour)
    return np.asarray(image)


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP around an `App`."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may take to send its request

    def __init__(self, *args: Any, app: App, **kwargs: Any):
        self.app = app
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """The page and what the model has."""
        if not self._is_local():
            return
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.encode())
        elif self.path == "/model":
            self._json(200, self.app.describe())
        else:
            self._json(404, {"error": f"There is no page {self.path!r}."})

    def do_POST(self) -> None:
        """Generates."""
        if not self._is_local():
            return
        length = self.headers.get("Content-Length", "")
        # What is not read here would be taken for the next request.
        self.close_connection = True
        if self.path != "/generate":
            self._json(404, {"error": f"There is no page {self.path!r}."})
        # A form of another site cannot send this type without asking first.
        elif self.headers.get_content_type() != "application/json":
            self._json(415, {"error": "The request must be application/json."})
        elif not length.isdigit() or int(length) > MAX_BODY:
            self._json(413, {"error": f"The request must say its length, at most {MAX_BODY >> 20} MiB."})
        else:
            self._json(*self._generate(self.rfile.read(int(length))))

    def _generate(self, body: bytes) -> tuple[int, dict[str, Any]]:
        from PIL import Image

        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return 400, {"error": "The request is not JSON."}
        try:
            return 200, self.app.generate(request)
        except (ValueError, Image.DecompressionBombError) as error:
            return 400, {"error": str(error)}
        except Exception as error:  # the page stays up, and says what happened
            self.log_error("%s: %s", type(error).__name__, error)
            return 500, {"error": f"Generating failed ({type(error).__name__}: {error})."}

    def _is_local(self) -> bool:
        """Refuses other names for this machine, by which a site could reach the page through the user's browser."""
        host = self.headers.get("Host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        bound = self.server.server_address[0]
        if bound not in ("127.0.0.1", "::1") or name in LOCAL_NAMES:
            return True
        self.close_connection = True
        self._json(403, {"error": f"This page is at {LOCAL_NAMES[0]}, not at {name!r}."})
        return False

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src data: blob:")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request on standard error."""
        print(f"{self.log_date_time_string()} {format % args}", file=sys.stderr)


def make_server(session: Session, host: str = "127.0.0.1", port: int = 7860) -> http.server.ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0 takes a free one. Raises OSError if it cannot be bound."""
    return http.server.ThreadingHTTPServer((host, port), functools.partial(Handler, app=App(session)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 with one sentence on standard error."""
    parser = command.parser("fm4m.generate.web", "A web page for generating by hand.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(argv)
    return command.exit_code(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    with make_server(command.open_session(options), options.host, options.port) as server:
        print(f"open http://{options.host}:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    sys.exit(main())
