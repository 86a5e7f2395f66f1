"""A real, headless Chromium, driven through its DevTools protocol: open a page, use it, ask what it shows.

The protocol runs over two pipes (``--remote-debugging-pipe``): JSON messages, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 120.0
MODIFIER_CTRL = 2


def find_browser() -> str:
    """Return a Chromium or Chrome; without one the test is skipped, and in CI it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = (
            "NO BROWSER: no page was opened, and nothing is known of what a person would see. "
            "Install one: apt-get install chromium"
        )
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


class Page:
    """One page of a browser.

    Attributes:
        problems: errors and warnings that the browser told its console, exceptions, and refused loads.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int
    ) -> None:
        self.problems: list[str] = []
        self._process = process
        self._out, self._in = to_browser, from_browser
        self._rest = b""
        self._num_sent = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._read(until)
            if answer.get("id") == self._num_sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def js(self, expression: str) -> Any:
        """Return the value of an expression in the page; promises are waited for."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + TIMEOUT_S
        while not self.js(f"!!({condition})"):
            assert time.monotonic() < end, f"never true: {condition}; console: {self.problems}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def click(self, selector: str) -> None:
        """Click on what a selector finds, which must be there and not be disabled."""
        assert self.js(f"!document.querySelector({selector!r}).disabled"), selector
        self.js(f"document.querySelector({selector!r}).click()")

    def write(self, selector: str, text: str) -> None:
        """Replace a field's text as a person would, by selecting it and typing."""
        self.js(f"document.querySelector({selector!r}).focus()")
        self.js(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def press_enter(self, *, modifiers: int = 0) -> None:
        """Press Enter where the cursor is."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def text(self, selector: str) -> str:
        """Return what a person reads there."""
        return str(self.js(f"document.querySelector({selector!r}).innerText"))

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        """Save what is seen as PNG; ``is_whole``: all of the page, however long."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._in, 1 << 16) if ready else b""
            assert data, f"the browser says nothing (exit status {self._process.poll()})"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] != "info":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
            *("error", "warning"),
            "assert",
        ):
            self.problems.append(str([arg.get("value") for arg in params["args"]]))


@contextmanager
def browsing(work: Path, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Run a browser with one page, and end it; ``work`` is for its profile and its log."""
    command = [
        find_browser(),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--remote-debugging-pipe", "--no-first-run", f"--window-size={width},{height}"),
        f"--user-data-dir={work / 'profile'}",
    ]
    his_in, our_out = os.pipe()
    our_in, his_out = os.pipe()
    # The browser reads descriptor 3 and writes to 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{his_in} 4>&{his_out}', "bash", *command]
    with (work / "browser.log").open("wb") as log:
        process = subprocess.Popen(shell, stdout=log, stderr=log, pass_fds=(his_in, his_out))
    os.close(his_in)
    os.close(his_out)
    try:
        yield Page(process, our_out, our_in)
    finally:
        os.close(our_out)
        os.close(our_in)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
