"""Real processes for tests: a server on free ports, and whatever else runs beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 90.0
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """Where a running server answers, and what it is made of."""

    address: str
    metrics_url: str
    http_url: str | None = None
    engine_pid: int
    process: subprocess.Popen[bytes]
    log: Path


def wait_for(
    what: str, is_true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path
) -> None:
    """Wait until ``is_true()``; a process that ended, or the limit, fails with its log."""
    until = time.monotonic() + READY_TIMEOUT_S
    while not is_true():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"no {what}; its log:\n{log.read_text()[-4000:]}", pytrace=False)
        time.sleep(0.1)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process beside the test, with one thread of maths; terminate it at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def serving(base: Path, registry: Path, work: Path, *options: str) -> Iterator[ServerProcess]:
    """Run ``lorary serve`` as ``started``; at the end it must drain and exit with 0."""
    with started(base, registry, work, *options) as server:
        yield server
        server.process.terminate()
        assert server.process.wait(STOP_TIMEOUT_S) == 0, server.log.read_text()[-4000:]


@contextmanager
def started(base: Path, registry: Path, work: Path, *options: str) -> Iterator[ServerProcess]:
    """Run ``lorary serve`` on free ports until the end, or until it is ended.

    Args:
        base: folder of the base.
        registry: folder of the registry.
        work: folder for its log and ready file.
        options: further ones of ``lorary serve``.
    """
    ready, log = work / "ready.json", work / "server.log"
    command = [str(BIN / "lorary"), "serve", "--base", str(base), "--registry", str(registry)]
    command += ["--port", "0", "--metrics-port", "0", "--ready-file", str(ready)]
    command += ["--device", "cpu", "--dtype", "float32", "--max-context", "256", *options]
    with running(command, log) as process:
        wait_for("server", ready.exists, process, log)
        facts = json.loads(ready.read_text())
        yield ServerProcess(
            address=facts["address"],
            metrics_url=facts["metrics"],
            http_url=facts["http"],
            engine_pid=facts["engine_pid"],
            process=process,
            log=log,
        )


def metric(url: str, name: str, **labels: str) -> float:
    """Return one sample of /metrics; 0 where there is none."""
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    for line in text.splitlines():
        match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if match and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")).items():
            return float(match[2])
    return 0.0
