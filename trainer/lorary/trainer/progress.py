"""What a person sees while a run goes on: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOG_INTERVAL_S = 15.0


class Reporter:
    """Prints notes, and tracks one phase at a time; with ``quiet`` it says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def note(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, markup=False)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Track ``total`` units of work; yields ``advance(count, detail)``."""
        if self.console.is_terminal:
            columns = (
                *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
                *(TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn()),
                TextColumn("{task.fields[detail]}"),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(name, total=total, completed=done, detail="")

                def advance(count: int, detail: str = "") -> None:
                    progress.update(task, advance=count, detail=detail)

                yield advance
            return
        yield self._plain(name, total, done)

    def _plain(self, name: str, total: int, done: int) -> Callable[[int, str], None]:
        """Return an ``advance`` that prints a line now and then, with the time left."""
        start = last = time.monotonic()
        count_done = done

        def advance(count: int, detail: str = "") -> None:
            nonlocal count_done, last
            count_done += count
            now = time.monotonic()
            if count_done < total and now - last < _LOG_INTERVAL_S:
                return
            last = now
            left = (now - start) / max(1, count_done - done) * (total - count_done)
            self.note(f"{name} {count_done}/{total} · eta {left:.0f}s {detail}".rstrip())

        return advance


def step_detail(logs: dict[str, Any], tokens_per_s: float) -> str:
    """Return loss, learning rate and speed of a step in one line."""
    parts = []
    if "loss" in logs:
        parts.append(f"loss {logs['loss']:.3f}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    parts.append(f"{tokens_per_s:.0f} tokens/s")
    return "· " + " · ".join(parts)
