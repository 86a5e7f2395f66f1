"""Measure until the machine was quiet, keep a record of every attempt, and say what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.harness.load import CpuMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """When a run counts: others use at most ``max_foreign`` cores; else it is run again."""

    max_foreign: float = 0.1
    retries: int = 3
    tolerate: bool = False


def make_all(runs: Sequence[T], make: Callable[[T, int], bool], rounds: int) -> list[T]:
    """Make every run; those that failed once more behind all others, and so on; return which failed in all rounds.

    Neighbours come for minutes: whom they disturbed is better tried again when they may have gone, and
    until then others can be measured.

    Args:
        runs: in their order.
        make: makes one, in the round of that number; whether it counts.
        rounds: how often at most.
    """
    left = list(runs)
    for number in range(rounds):
        left = [run for run in left if not make(run, number)]
    return left


class Kept:
    """The records of one run of a benchmark.

    Args:
        path: the JSONL file that records are appended to.
        first: what every record begins with.
        quiet: when a measurement counts.

    Attributes:
        is_complete: whether all that was measured was accepted.
    """

    def __init__(self, path: Path, first: dict[str, Any], quiet: Quiet) -> None:
        self._path = path
        self._first = first
        self._quiet = quiet
        self.is_complete = True

    def measure(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure once or several times; return the accepted record, or the last one."""
        for attempt in range(1 + self._quiet.retries):
            meter = CpuMeter()
            found = make()
            load = meter.stop()
            is_quiet = load.foreign <= self._quiet.max_foreign
            record = {
                **found,
                "attempt": attempt,
                "load": {"own_cores": load.own, "foreign_cores": load.foreign},
                "quiet": is_quiet,
                "accepted": is_quiet or self._quiet.tolerate,
            }
            report.append(self._path, {**self._first, **record})
            if record["accepted"]:
                break
        self.is_complete &= bool(record["accepted"])
        return record

    def finish(self, console: Console, table_of: Callable[[Sequence[dict[str, Any]]], str]) -> None:
        """Print where the records are, and their table.

        Raises:
            typer.Exit: with 1, when something was not measured on a quiet machine.
        """
        console.print(f"records: {self._path}")
        Console().print(table_of(report.read(self._path)), highlight=False, soft_wrap=True)
        if not self.is_complete:
            console.print("not all was measured on a quiet machine; wait, or pass --tolerate-load")
            raise typer.Exit(1)
