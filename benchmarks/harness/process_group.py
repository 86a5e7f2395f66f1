"""A program that is measured, with everything it starts: begun, put to sleep, stopped for sure."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

STOP_TIMEOUT_S = 20.0
_TAIL_LINES = 25


class ProcessGroup:
    """One command in a session of its own; what it says goes to a file.

    Its processes stay below this one in the process tree, so that their processor time counts as
    own time in ``harness.load``.

    Args:
        name: what messages call it.
        command: the program and its arguments.
        log_path: for standard error, and for standard output without ``speaks``.
        environment: instead of this process' own.
        speaks: whether standard input and output are pipes of lines, for ``send`` and ``listen``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log_path: Path,
        *,
        environment: Mapping[str, str],
        speaks: bool = False,
    ) -> None:
        self._name = name
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE if speaks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if speaks else log,
                stderr=log,
                env=dict(environment),
                # Ctrl-C comes to us, and we stop it in order; and its children stop with it.
                start_new_session=True,
            )

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe into a process that ``speaks``."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """The pipe out of a process that ``speaks``."""
        assert self._process.stdout is not None
        return self._process.stdout

    def wait_until(self, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until it is ready; stop it if it never is.

        Raises:
            RuntimeError: it ended before, or took too long; with the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while not is_ready():
                if self._process.poll() is not None:
                    raise self.failure("did not start")
                if time.monotonic() > deadline:
                    raise self.failure(f"was not ready after {timeout_s:.0f} s")
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise

    def failure(self, what: str) -> RuntimeError:
        """Return an error that says what went wrong, with its exit code and the end of its log."""
        # A process whose connection has just broken needs a moment to be dead.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        ended = "" if code is None else f" (exit code {code})"
        lines = self._log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return RuntimeError(
            f"{self._name} {what}{ended}; the end of '{self._log_path}':\n" + "\n".join(lines)
        )

    def pause(self) -> None:
        """Take all its processes off the cores, whatever they are waiting for and how."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to end, then make sure of the whole group. Idempotent."""
        try:
            self._signal(signal.SIGTERM)
            # A process that sleeps would not hear of it.
            self.resume()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        # The group outlives its first process, and its id is not given away before it is empty.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
