"""Take one row of a benchmark in a process of its own, and note how quiet the machine was."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.harness.load import CpuMeter
from benchmarks.harness.machine import ROOT

MAX_FOREIGN = 0.2
"""Most cores that others may use on average for seconds to count."""
STARRED = " Seconds with a star were taken while others used the machine, and say little."


def run_case(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``benchmarks.harness.<module>`` with ``arguments`` and a scratch folder; return what it prints.

    It prints one JSON object, to which ``foreign_cores`` and ``quiet`` are added here.

    Raises:
        subprocess.CalledProcessError: it failed; its own words are on stderr.
    """
    meter = CpuMeter()
    with tempfile.TemporaryDirectory(prefix="lorary-case-") as scratch:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.harness.{module}", *arguments, scratch],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout)
    foreign = meter.stop().foreign
    return {**found, "foreign_cores": foreign, "quiet": foreign <= MAX_FOREIGN}


def step_cell(record: dict[str, Any]) -> str:
    """Return a record's seconds of a step, with a star where they do not count."""
    return f"{record['step_s']:.2f}" + ("" if record["quiet"] else " *")
