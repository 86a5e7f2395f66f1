"""A container's limit counts as much as the system's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lorary.bases import free_memory
from lorary.bases.free_memory import free_bytes

if TYPE_CHECKING:
    from pathlib import Path

MB = 1 << 20


@pytest.fixture
def control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a control group without files, on a system with 1,000 MB to give."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", meminfo)
    folder = tmp_path / "cgroup"
    (folder / "memory").mkdir(parents=True)
    monkeypatch.setattr(free_memory, "_CGROUP", folder)
    return folder


def test_system_without_a_container(control_group: Path) -> None:
    assert free_bytes() == 1000 * MB


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (str(600 * MB), 250 * MB),
        (str(200 * MB), 0),
        (str(9000 * MB), 1000 * MB),
        ("max", 1000 * MB),
    ],
    ids=["limit", "spent", "limit above the system's", "no limit"],
)
def test_version_2(control_group: Path, limit: str, expected: int) -> None:
    (control_group / "memory.max").write_text(limit + "\n")
    (control_group / "memory.current").write_text(f"{400 * MB}\n")
    (control_group / "memory.stat").write_text(f"anon {350 * MB}\ninactive_file {50 * MB}\n")
    assert free_bytes() == expected


def test_version_1(control_group: Path) -> None:
    folder = control_group / "memory"
    (folder / "memory.limit_in_bytes").write_text(f"{600 * MB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{400 * MB}\n")
    (folder / "memory.stat").write_text(f"inactive_file {1 * MB}\ntotal_inactive_file {50 * MB}\n")
    assert free_bytes() == 250 * MB
