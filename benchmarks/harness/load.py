"""How much processor time others took while something was measured (Linux)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Cores in use on average; ``foreign`` includes what the hypervisor gave to other machines."""

    own: float
    foreign: float


class CpuMeter:
    """Measures from its creation to ``stop``; own is this process and all its descendants.

    Those that ended in between count as own once their parent has waited for them.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._busy = _busy_ticks()
        self._own = _own_ticks()

    def stop(self) -> Load:
        """Return the load since the start."""
        seconds = max(time.monotonic() - self._started_s, 1e-9)
        own = (_own_ticks() - self._own) / _TICKS_PER_S / seconds
        busy = (_busy_ticks() - self._busy) / _TICKS_PER_S / seconds
        return Load(own=round(own, 3), foreign=round(max(0.0, busy - own), 3))


def _busy_ticks() -> int:
    """Return the ticks all cores spent on anything but idling, since boot."""
    # user nice system idle iowait irq softirq steal …
    ticks = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4]


def process_tree(root: int) -> dict[int, int]:
    """Return the living processes below ``root``, itself included, with their ticks so far.

    A process's ticks include those of its children that have ended and that it has waited for.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command's name may hold spaces and parentheses; fields follow the last one.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    tree = {root}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= children
        grown = bool(children)
    return {pid: ticks.get(pid, 0) for pid in tree}


def _own_ticks() -> int:
    return sum(process_tree(os.getpid()).values())
