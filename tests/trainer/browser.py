"""Open a page in a real, headless browser, and say what a person at it would not see."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.devtools import find_browser

if TYPE_CHECKING:
    from pathlib import Path

_CONSOLE = re.compile(r":CONSOLE[^\]]*\] (.*)")
# The page is looked at from the outside, through a frame: its own policy forbids scripts.
_FRAME = """<!doctype html><link rel="icon" href="data:,"><iframe src="PAGE" width="1000" height="800"></iframe>
<script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const found = [...page.images].map(one => ({alt: one.alt, width: one.naturalWidth}));
  const isSeen = mark => { const box = mark.getBoundingClientRect(); return box.width + box.height > 0; };
  const drawn = [...page.querySelectorAll("svg")].map(one => ({
    label: one.getAttribute("aria-label"),
    marks: [...one.querySelectorAll("circle, line, path, rect")].filter(isSeen).length,
  }));
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify({title: page.title, pictures: found, drawings: drawn});
  document.body.append(out);
});
</script>"""


@dataclass(frozen=True)
class Opened:
    """A page as the browser has it.

    Attributes:
        title: of its tab.
        widths: of its pictures in pixels, by what they say instead of themselves.
        marks: how many lines and dots of each drawing take up room, by its label.
        console: what a developer would read in the console.
    """

    title: str
    widths: dict[str, int]
    marks: dict[str, int]
    console: list[str]


def open_page(path: Path) -> Opened:
    """Open a page of a folder, and wait for its pictures; needs a Chromium or Chrome."""
    browser = find_browser()
    (path.parent / "frame.html").write_text(_FRAME.replace("PAGE", path.name))
    handler = partial(_Quiet, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"),
                f"--user-data-dir={path.parent / 'profile'}",
                f"http://127.0.0.1:{server.server_port}/frame.html",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        server.shutdown()
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the page did not load: {done.stdout[-500:]} {done.stderr[-2000:]}"
    found = json.loads(match[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    return Opened(
        title=found["title"],
        widths={one["alt"]: one["width"] for one in found["pictures"]},
        marks={one["label"]: one["marks"] for one in found["drawings"]},
        console=_CONSOLE.findall(done.stderr),
    )


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args: Any) -> None:
        """Say nothing."""
