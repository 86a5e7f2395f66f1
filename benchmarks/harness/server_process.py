"""A real ``lorary serve`` in a process of its own, on free ports, stopped whatever happens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_TIMEOUT_S = 180.0
# Longer than the server's own --drain-timeout.
STOP_TIMEOUT_S = 45.0


class ServerProcess:
    """Runs from ``with`` to its end; its output goes to a file.

    Args:
        arguments: of ``lorary serve``, but for ports and ready file.
        folder: where its log and ready file go.
        environment: instead of this process' own.
        module: which has the command line.

    Raises:
        RuntimeError: it ended before it was ready, or took too long; with the end of its log.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        module: str = "lorary.cli.main",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "server.log"
        self._ready_path = folder / "ready.json"
        self._ready_path.unlink(missing_ok=True)
        command = [sys.executable, "-m", module, "serve", *arguments]
        command += ["--port", "0", "--metrics-port", "0", "--ready-file", str(self._ready_path)]
        with self.log_path.open("wb") as log:
            # A session of its own: Ctrl-C comes to us, and we stop it in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=None if environment is None else dict(environment),
            )
        try:
            self.facts = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """``host:port`` of gRPC."""
        return str(self.facts["address"])

    @property
    def metrics_url(self) -> str:
        """Address of /metrics."""
        return str(self.facts["metrics"])

    @property
    def peak_memory_bytes(self) -> int:
        """Largest resident size so far; 0 when it has ended."""
        try:
            with open(f"/proc/{self._process.pid}/status") as status:
                line = next((line for line in status if line.startswith("VmHWM")), "VmHWM: 0 kB")
        except FileNotFoundError:
            return 0
        return int(line.split()[1]) * 1024

    def stop(self) -> int:
        """Let it drain, kill it if it does not end; return its exit code. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        except BaseException:
            # A second Ctrl-C while it drains: do not leave it behind.
            self._process.kill()
            self._process.wait()
            raise

    def _wait_until_ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready_path.exists():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                what = "took too long to start" if code is None else f"ended with exit code {code}"
                tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"lorary serve {what}; the end of '{self.log_path}':\n{tail}")
            time.sleep(0.05)
        return dict(json.loads(self._ready_path.read_text()))
