"""What a starting server shows: bars for people on a terminal, one log line a phase for everybody."""

from __future__ import annotations

import io
import logging
import sys
import time
from types import SimpleNamespace

import pytest

from lorary.server import logs, startup
from lorary.server.startup import Startup


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still at ``now`` seconds."""
    standing = SimpleNamespace(now=100.0)
    standing.monotonic = lambda: standing.now
    monkeypatch.setattr(startup, "time", standing)
    return standing


def test_a_phase_is_one_log_line_with_its_seconds(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
) -> None:
    caplog.set_level(logging.INFO, logger="lorary")
    with Startup() as shown, shown.phase("packing weights") as progress:
        for done in range(1, 101):
            progress(done, 100)
        clock.now += 2.5
    assert caplog.messages == ["packing weights: 2.5 s"]


def test_a_long_phase_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
) -> None:
    caplog.set_level(logging.INFO, logger="lorary")
    with Startup().phase("loading weights") as progress:
        progress(1, 9)
        clock.now += startup.SAY_EVERY_S
        progress(2, 9)
        progress(3, 9)
        clock.now += startup.SAY_EVERY_S
        progress(9, 9)
    assert caplog.messages == ["loading weights: 2 of 9", "loading weights: 30.0 s"]


def test_a_phase_that_fails_is_not_called_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lorary")
    with pytest.raises(OSError, match="gone"), Startup().phase("finding the base"):
        raise OSError("gone")
    assert caplog.messages == []


def test_bars_stand_on_a_terminal_and_log_lines_above_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    ours = logging.getLogger("lorary")
    our_level = ours.level
    try:
        logs.configure("human", "info")
        with Startup(bars=True) as shown, shown.phase("packing weights") as progress:
            progress(3, 7)
            deadline = time.monotonic() + 30
            while "3/7" not in terminal.getvalue() and time.monotonic() < deadline:
                time.sleep(0.05)  # it is drawn ten times a second
            logging.getLogger("lorary.server").info("a line meanwhile")
        logging.getLogger("lorary.server").info("a line afterwards")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        ours.setLevel(our_level)
    text = terminal.getvalue()
    assert sys.stderr is terminal
    assert "3/7" in text
    for line in ("a line meanwhile", "INFO    packing weights: ", "a line afterwards"):
        assert text.count(line) == 1, line
    assert text.rstrip().endswith("a line afterwards")
