"""Runs benchmarks into files of their own; a whole one of this commit need not be run again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.harness.machine import ROOT, commit
from scripts.verify_run import FOLDER, console, exit_code, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from scripts.verify_figures import Figure


class Measured:
    """The benchmarks of one verification.

    Args:
        verification: its name, with which the files' names begin.
        resume: keep what this very commit has measured whole.
    """

    def __init__(self, verification: str, *, resume: bool) -> None:
        self._verification = verification
        self._resume = resume

    def part(
        self,
        name: str,
        script: str,
        options: Sequence[str],
        read: Callable[[Path], list[Figure]],
    ) -> list[Figure]:
        """Run one benchmark and read its figures."""
        out = FOLDER / f"{self._verification}-{name}.jsonl"
        stamp = FOLDER / f"{self._verification}-{name}.done.json"
        this = {**commit(), "options": list(options)}
        if self._resume and _is_of(stamp, this) and out.exists():
            console.print(f"{name}: not run again, by --resume; {out.relative_to(ROOT)}")
            return read(out)
        for file in (out, stamp):
            file.unlink(missing_ok=True)
        python = str(ROOT / ".venv/bin/python")
        command = [python, f"benchmarks/{script}", *options, "--out", str(out)]
        done = run(name, command)
        if done.code == 0:
            stamp.write_text(json.dumps(this))
        return [exit_code(f"benchmarks/{script}", done), *read(out)]


def _is_of(stamp: Path, this: dict[str, Any]) -> bool:
    """Whether a part was run whole, by this commit without local changes, with these options."""
    if this["modified"] or not stamp.exists():
        return False
    return bool(json.loads(stamp.read_text()) == this)
