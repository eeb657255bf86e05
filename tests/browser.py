"""A headless Chromium for tests, driven over a pipe: pages, scripts, real mouse and key events."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

BINARY = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """One page of a browser that has no network. A context manager.

    Args:
        folder: For its profile.
        width: Of the window in pixels.
        height: Of the window in pixels.
    """

    def __init__(self, folder: Path, width: int = 1200, height: int = 1000):
        ours, theirs = os.pipe(), os.pipe()

        def fds() -> None:  # it reads from 3 and writes to 4
            os.dup2(os.dup(ours[0]), 3)
            os.dup2(os.dup(theirs[1]), 4)

        command = [
            *(BINARY, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", "about:blank"),
            *(f"--user-data-dir={folder}", f"--window-size={width},{height}"),
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=fds, pass_fds=(3, 4), **quiet)
        os.close(ours[0])
        os.close(theirs[1])
        self.writer, self.reader = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb")
        self.number, self.rest, self.complaints = 0, b"", []
        self.session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.writer.close()
        self.reader.close()

    def call(self, method: str, **params: object) -> dict:
        """Call a method of the DevTools protocol and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.rest:
            self.rest += self.reader.read1(2**20)
        raw, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(raw)
        told = message.get("params", {})
        broken = told.get("entry", {}).get("level") == "error"
        if broken or message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(told)
        return message

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> object:
        """Value of an expression; promises are awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def painted(self) -> None:
        """Wait until what was asked for is on the screen."""
        self.run("new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")

    def mouse(self, kind: str, x: float, y: float, **more: object) -> None:
        """Send a mouse event: mouseMoved, mousePressed, mouseReleased or mouseWheel."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.painted()

    def key(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)
        self.painted()

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """Write what the window shows, or the whole page, as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def resize(self, width: int, height: int) -> None:
        """Make the window another size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.painted()

    def dark(self, on: bool) -> None:
        """Prefer dark colors, or light ones."""
        value = "dark" if on else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.call("Emulation.setEmulatedMedia", features=features)
