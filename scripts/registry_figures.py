"""What the registry promises, and how each promise is read from what a part left behind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.registry_run import BARS, accepted_cases
from scripts.transcript_run import COMMANDS, recorded
from scripts.verify_figures import Figure, at_least, at_most, not_measured

if TYPE_CHECKING:
    from pathlib import Path

BACKENDS = {"folder": "in a folder", "hub": "on a hub, by LFS", "hub-xet": "on a hub, by Xet"}


def contract_figures(log: str) -> list[Figure]:
    """Read how many tests of the contract passed in each place; as many in each."""
    passed = {key: len(re.findall(rf"::\S*\[(?:\S*-)?{key}\] PASSED", log)) for key in BACKENDS}
    # "hub-xet" ends like no other, and "hub" is no end of it.
    most = max(passed.values())
    return [
        Figure(
            f"contract: tests passed {BACKENDS[key]}",
            str(count),
            f"{most}, as many as elsewhere",
            is_ok=count == most > 0,
        )
        for key, count in passed.items()
    ]


def history_figures(log: str, operations: int, kills: int) -> list[Figure]:
    """Read what the history of killed processes was, and that it has an order."""
    found = re.search(r"linearizable: (\d+) operations of \d+ processes, (\d+) kills", log)
    done, killed = (int(n) for n in found.groups()) if found else (0, 0)
    return [
        at_least("linearizable: operations of killed processes", done, operations),
        at_least("linearizable: processes killed meanwhile", killed, kills),
    ]


def speed_figures(path: Path) -> list[Figure]:
    """Read the benchmark's figures."""
    found = accepted_cases(report.read(path)) if path.exists() else {}
    figures = []
    for case, (what, bar) in BARS.items():
        if case in found:
            figures.append(at_most(f"speed: {what}", found[case]["figure"], bar))
        else:
            note = "no run on a quiet machine; see .lorary/verify/speeds.log"
            figures.append(not_measured(f"speed: {what}", f"at most {bar:g}", note))
    return figures


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show the session and the benchmark's table."""
    begin, end = report.markers("registry")
    section = (root / "docs" / "benchmarks.md").read_text().partition(begin)[2].partition(end)[0]
    rows = sum(f"| {what} |" in section for what, _ in BARS.values())
    shown = sum(f"$ {command}\n" in recorded() for command, _ in COMMANDS)
    return [
        at_least("docs/registry.md: commands of the recorded session", shown, len(COMMANDS)),
        at_least("docs/benchmarks.md: figures of the registry", rows, len(BARS)),
    ]
