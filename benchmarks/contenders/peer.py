"""What peers have in common: a process of their own, which is told its adapters when it starts."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from benchmarks.workload import Contender

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness.process_group import ProcessGroup


class Peer(Contender):
    """Starts when it is first prepared, and anew for another set of adapters; sleeps in between."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: tuple[str, ...] = ()
        self._process: ProcessGroup | None = None

    def prepare(self, adapters: Sequence[str]) -> None:
        """Start it with exactly these adapters, or wake it.

        Raises:
            RuntimeError: it did not start; with the end of its log.
        """
        if self._process is not None and self._loaded == tuple(adapters):
            self._process.resume()
            return
        self.close()
        self._process = self._start(tuple(adapters))
        self._loaded = tuple(adapters)

    def rest(self) -> None:
        """Take it off the cores: a server that has nothing to do may spin."""
        if self._process is not None:
            self._process.pause()

    def close(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @property
    def _running(self) -> ProcessGroup:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not prepared")
        return self._process

    @abstractmethod
    def _start(self, adapters: tuple[str, ...]) -> ProcessGroup:
        """Start the process and wait until it is ready."""
