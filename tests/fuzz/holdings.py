"""What a server process holds: in the system, on its event loop, in its engine, on its device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.service_parts import resident_bytes
from tests.processes import metric

if TYPE_CHECKING:
    from tests.processes import ServerProcess

SETTLED_S = 60.0
"""What connections and tasks may take to be gone after the last call."""

ALLOWED = {"threads": 8}
"""gRPC starts threads of its pool as it needs them, and lets them go again; a leak is one for each call."""


def holdings(server: ServerProcess) -> dict[str, int]:
    """Return the counts that must not grow, whoever called how."""
    folder = Path(f"/proc/{server.process.pid}")
    gauges = {
        "tasks": ("lorary_event_loop_tasks", {}),
        "running": ("lorary_requests_running", {}),
        "waiting for a place": ("lorary_requests_waiting", {"reason": "capacity"}),
        "waiting for an adapter": ("lorary_requests_waiting", {"reason": "adapter_loading"}),
        "loading": ("lorary_adapters", {"state": "loading"}),
        "unloading": ("lorary_adapters", {"state": "unloading"}),
        "adapter bytes": ("lorary_adapter_bytes", {}),
    }
    return {
        "threads": len(list((folder / "task").iterdir())),
        "files": len(list((folder / "fd").iterdir())),
        **{
            name: int(metric(server.metrics_url, gauge, **labels))
            for name, (gauge, labels) in gauges.items()
        },
    }


def grown(before: dict[str, int], server: ServerProcess) -> dict[str, tuple[int, int]]:
    """Wait until no count is above what it was; return those that stay so."""
    ends = time.monotonic() + SETTLED_S
    while True:
        now = holdings(server)
        more = {
            name: (before[name], now[name])
            for name in before
            if now[name] > before[name] + ALLOWED.get(name, 0)
        }
        if not more or time.monotonic() > ends:
            return more
        time.sleep(0.2)


def resident_mb(server: ServerProcess) -> float:
    """Return its resident memory."""
    return resident_bytes(server.process.pid) / 2**20
