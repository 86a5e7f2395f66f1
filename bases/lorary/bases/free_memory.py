"""What memory a process could still take: the system's, or what a container's limit leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**62


def free_bytes() -> int:
    """Return the bytes that could be had without swapping, as they are now; page cache counts as free.

    Where the system does not say (macOS), all of its memory.
    """
    return min(_system_bytes(), _control_group_bytes())


def _system_bytes() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_group_bytes() -> int:
    # Version 2, then 1.
    limit_file, used_file = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit_file.exists() and used_file.exists()):
        limit_file = _CGROUP / "memory" / "memory.limit_in_bytes"
        used_file = _CGROUP / "memory" / "memory.usage_in_bytes"
        if not (limit_file.exists() and used_file.exists()):
            return _NO_LIMIT
    limit = limit_file.read_text().strip()
    if limit == "max":
        return _NO_LIMIT
    stat = dict(
        line.split() for line in (used_file.parent / "memory.stat").read_text().splitlines()
    )
    # Version 1 counts the groups within this one under another name.
    cache = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
    return max(0, int(limit) - (int(used_file.read_text()) - int(cache)))
