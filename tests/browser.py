"""A headless Chromium for tests of pages, driven over its DevTools pipe: nothing to install but the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0
"""Seconds until what a test waits for counts as missing; the machine may be busy."""
_OPTIONS = [
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--no-proxy-server", "--hide-scrollbars", "--mute-audio", "about:blank",
]  # fmt: skip
_AT_THREE_AND_FOUR = """
import os, sys
high = [os.dup(int(given)) for given in sys.argv[1:3]]
for place, fd in enumerate(high, 3):
    os.dup2(fd, place)
    os.set_inheritable(place, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Runs a program whose pipe lies where Chromium looks for it. (Python code between fork and exec is not safe here.)"""
KEYS = {
    "Enter": {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 27},
    "Tab": {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9},
}


class Browser:
    """One process, to be closed; a `with` block does."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()

        pipe = [sys.executable, "-c", _AT_THREE_AND_FOUR, str(commands), str(answers)]
        self._process = subprocess.Popen(
            [*pipe, CHROMIUM, f"--user-data-dir={self._home.name}", *_OPTIONS], pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._home.name},
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._count, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its answer; what else comes meanwhile is kept in `events`."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = monotonic() + PATIENCE
        while True:
            said = self._next(deadline)
            if said.get("id") == self._count:
                assert "error" not in said, (method, said["error"])
                result: dict[str, Any] = said["result"]
                return result
            self.events.append(said)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - monotonic()))
            assert ready, "the browser does not answer"
            got = os.read(self._read, 1 << 20)
            assert got, "the browser has ended"
            self._buffer += got
        said, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(said)
        return message

    def page(self, width: int = 1280, height: int = 800, dark: bool = False) -> Page:
        """A new tab, with nothing of earlier ones in its storage."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, width, height, dark)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.call("Browser.close")  # which ends its own processes
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._write)
            os.close(self._read)
            self._home.cleanup()


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, width: int, height: int, dark: bool):
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def goto(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """What an expression of JavaScript comes to; promises are waited for."""
        said = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for an expression to hold, looked at whenever the page has drawn."""
        deadline = monotonic() + PATIENCE
        while not self.run(f"new Promise((told) => setTimeout(() => told(Boolean({condition})), 10))"):
            assert monotonic() < deadline, (condition, self.run("document.body.innerText"))

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        stroke = {**KEYS[key], "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **stroke)
        self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # all that came before has been read
        own = (one for one in self._browser.events if one.get("sessionId") == self._session)
        return [one["params"] for one in own if one.get("method") == method]

    @property
    def complaints(self) -> list[str]:
        """Uncaught exceptions, errors on the console, and what its content security policy forbade."""
        thrown = [str(one["exceptionDetails"]) for one in self._events("Runtime.exceptionThrown")]
        console = [str(one["args"]) for one in self._events("Runtime.consoleAPICalled") if one["type"] == "error"]
        logged = [one["entry"]["text"] for one in self._events("Log.entryAdded") if one["entry"]["level"] == "error"]
        return [*thrown, *console, *logged]

    @property
    def requested(self) -> list[str]:
        """Addresses asked for."""
        return [one["request"]["url"] for one in self._events("Network.requestWillBeSent")]
