"""A headless Chromium for tests, driven over its debugging pipe: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

PATH = shutil.which("chromium") or shutil.which("chromium-browser")


class Chromium:
    """One page in a browser of its own; a context manager.

    Attributes:
      messages: what the page logged as an error, and uncaught exceptions.
    """

    def __enter__(self) -> Chromium:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        # The browser reads its commands from descriptor 3 and answers on 4.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                 "--no-first-run", f"--user-data-dir={self._folder.name}", "--window-size=1200,1400",
                 "--disable-background-networking", "--disable-component-update", "about:blank"]  # fmt: skip
        wrapped = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", PATH, *flags]
        self._process = subprocess.Popen(wrapped, pass_fds=(there, back), stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self._number, self._rest, self.messages = 0, b"", []
        target = next(t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the debugging protocol to the page."""
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            message = self._read()
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.messages.append(str(message["params"]["exceptionDetails"]))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.messages.append(message["params"]["entry"]["text"])

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], seconds)[0]:
                raise TimeoutError(f"the browser did not answer in {seconds} s")
            chunk = os.read(self._in, 1 << 16)
            if not chunk:
                raise RuntimeError("the browser ended")
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        out = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in out:
            raise RuntimeError(f"{script}: {out['exceptionDetails']}")
        return out["result"].get("value")

    def wait(self, script: str, seconds: float = 120) -> Any:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds} s: {script}")
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        """Goes to an address."""
        self.call("Page.navigate", url=url)

    def upload(self, selector: str, path: pathlib.Path) -> None:
        """Chooses a file in a file field."""
        node = self.run_object(f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=node)

    def run_object(self, script: str) -> str:
        """A handle of the object that an expression gives."""
        return self.call("Runtime.evaluate", expression=script)["result"]["objectId"]

    def drag(self, selector: str, points: list[tuple[float, float]]) -> None:
        """Presses the mouse on an element, moves through points (shares of its width and height), and lets go."""
        place = f"document.querySelector({json.dumps(selector)})"
        box = self.run(f"{place}.scrollIntoView(), {place}.getBoundingClientRect().toJSON()")
        at = [{"x": box["x"] + u * box["width"], "y": box["y"] + v * box["height"]} for u, v in points]
        mouse = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", buttons=1, **at[0], **mouse)
        for point in at[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", buttons=1, button="left", **point)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at[-1], **mouse)

    def screenshot(self, path: pathlib.Path) -> None:
        """The whole page as a PNG."""
        out = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(out["data"]))
