"""Drives a real Chromium without a driver package: its debugging protocol over a pair of pipes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser's program, if this machine has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read, self._rest, self._id = to_browser, from_browser, b"", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    _session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._id:
            pass  # an event
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], 60)
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, "the browser went away or did not answer for a minute"
            self._rest += chunk
        first, self._rest = self._rest.split(b"\0", 1)
        return json.loads(first)

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression; None while a page is being replaced."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str) -> Any:
        """The expression's value as soon as it is true."""
        end = time.monotonic() + 60
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, (
                f"{script} did not come true; the page shows {self.evaluate('document.title')}"
            )
            time.sleep(0.05)
        return value

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"location.href === {address!r} && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """A key, as from a keyboard."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(self, selector: str) -> None:
        """The middle of an element, as with a mouse."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.evaluate(f"(() => {{ const b = {box}; return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)


@contextlib.contextmanager
def browser(program: str, profile: Path) -> Iterator[Page]:
    """A headless browser with one tab."""
    # High numbers, so that neither end is overwritten when the child's are moved to 3 and 4, where Chromium looks.
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 50) for end in (*os.pipe(), *os.pipe())]
    command_read, command_write, answer_read, answer_write = pipes

    def wire() -> None:
        os.dup2(command_read, 3)
        os.dup2(answer_write, 4)

    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio")
    arguments = [program, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        arguments, preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        page = Page(command_write, answer_read)
        yield page
        page._session = None
        page.call("Browser.close")
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(command_write)
        os.close(answer_read)
