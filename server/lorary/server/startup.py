"""What a starting server is doing: a bar on a terminal, and one log line for each phase."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress, TaskID

log = logging.getLogger("lorary.server")

# Without a terminal a long phase says how far it is this often, so that nobody takes it for hung.
SAY_EVERY_S = 15.0


class Startup:
    """Shows phases: ``with startup.phase("packing weights") as progress: progress(3, 90)``.

    Every phase that ends well is one log line with its seconds. A context manager: bars are gone at its
    end, also when a phase fails.

    Args:
        bars: draw a bar on stderr; only for people on a terminal.
    """

    def __init__(self, *, bars: bool = False) -> None:
        self._bars: Progress | None = None
        if bars:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeElapsedColumn as Elapsed

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                Elapsed(),
                console=Console(file=sys.stderr),
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show ``name`` for the time of the block; yields ``progress(done, total)``."""
        started = said = time.monotonic()
        task: TaskID | None = None
        if self._bars is not None:
            task = self._bars.add_task(name, total=None)

        def progress(done: int, total: int) -> None:
            nonlocal said
            if self._bars is not None and task is not None:
                self._bars.update(task, completed=done, total=total)
            elif done < total and time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                log.info("%s: %d of %d", name, done, total)

        try:
            yield progress
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
        log.info("%s: %.1f s", name, time.monotonic() - started)
