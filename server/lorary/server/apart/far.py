"""The door's ports, whose other side is in the engine's process (``lorary.server.ports`` says what each must do).

What changes something is asked and waited for, which takes that process' turn at its interpreter. What only shows
something may be as old as ``process.FRESH_S``. What a call needs of its adapter is sent along with the call: it waits
for nothing, and what is wrong with its adapter comes back as its output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorary.errors import EngineFailed, LoraryError
from lorary.server.adapters.host_tier import HostStats
from lorary.server.adapters.resident import ResidentAdapter
from lorary.server.apart import nouns
from lorary.server.apart.nouns import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from lorary.server.adapters.merging import MergedAdapter
    from lorary.server.adapters.probe_runs import Verdict
    from lorary.server.apart.process import EngineProcess
    from lorary.server.engine.request import Constraint, Execution, Lease, Request

# What a look says when the other process is gone.
_NO_DIGESTS: tuple[str, ...] = ()
_NO_VERDICTS: dict[str, Verdict | None] = {}
_NO_COPIES = HostStats(num_adapters=0, num_bytes=0, num_hits=0, num_misses=0)


class FarLease:
    """What a request shall hold over there; held only if somebody here waits for it.

    Args:
        process: the engine's.
        wanted: what to hold.
    """

    def __init__(self, process: EngineProcess, wanted: Wanted) -> None:
        self._process = process
        self.wanted = wanted
        self._number: int | None = None
        self._is_over = False
        self._error: LoraryError | None = None

    @property
    def digest(self) -> str:
        """The version's digest, or the composition's."""
        return self.wanted.digest

    @property
    def is_ready(self) -> bool:
        """Whether the version is on the device, held from the first time that this is asked.

        Raises:
            LoraryError: it cannot be loaded.
        """
        resolved = self.wanted.resolved
        if self._number is None and resolved is not None:
            self._number = self._process.hold(resolved, self._on_end)
        return self._is_over and self._error is None

    @property
    def error(self) -> LoraryError | None:
        """Why its load failed, if it did."""
        return self._error

    def release(self) -> None:
        """Give back what is held; a second call does nothing."""
        if self._number is not None:
            self._process.drop(self._number)

    def _on_end(self, error: LoraryError | None) -> None:
        if not self._is_over:
            self._error = error
            self._is_over = True


class FarEngine:
    """The engine."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def start(self) -> None:
        """Start its thread.

        Raises:
            EngineFailed: its process is gone already.
        """
        if self._process.is_gone:
            raise EngineFailed("the engine's process ended before the first call.")
        self._process.send("start")

    def submit(self, request: Request) -> None:
        """Send a request; if it is refused, that is its output.

        Raises:
            Unavailable: the engine is gone.
        """
        lease = request.lease
        wanted = lease.wanted if isinstance(lease, FarLease) else Wanted()
        self._process.send("submit", request, wanted)
        # Over there it has a lease of its own from here on.
        lease.release()

    def cancel(self, request_id: str) -> None:
        """Drop every answer of a request at the next step."""
        if not self._process.is_gone:
            self._process.send("cancel", request_id)

    def shutdown(self) -> None:
        """End its process."""
        self._process.close()

    @property
    def num_running(self) -> int:
        """Requests that have a place in the steps."""
        return self._load[0]

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place or for their adapter."""
        return self._load[1]

    @property
    def _load(self) -> tuple[int, int]:
        return self._process.look("load_of_engine", _pair, gone=(0, 0))


class FarResidency:
    """Which adapters are on the device."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def acquire(self, resolved: Any) -> Lease:
        """Return what a request, or who waits for it, shall hold."""
        return FarLease(self._process, Wanted(digest=resolved.digest, parts=((resolved, 1.0),)))

    def prefetch(self, resolved: Any) -> None:
        """Begin to load a version."""
        self._process.ask("prefetch", resolved)

    def check_fits(self, ranks: Mapping[str, int]) -> None:
        """Check that versions can be on the device together."""
        self._process.ask("check_fits", dict(ranks))

    def load(self, resolved: Any, *, pin: bool = False) -> object:
        """Return when a version is resident, pinned if asked."""
        return self._process.ask("load", resolved, pin)

    def readmit(self, digest: str) -> None:
        """Forget what was found wrong with a version."""
        self._process.ask("readmit", digest)

    def verdict(self, digest: str) -> Verdict | None:
        """Return what came of a version's golden probes."""
        return self._process.look("verdicts", _verdicts, gone=_NO_VERDICTS).get(digest)

    def quarantined(self) -> tuple[str, ...]:
        """Return the digests that are refused."""
        return self._process.look("quarantined", _digests, gone=_NO_DIGESTS)

    def unload(self, digest: str) -> object:
        """Unpin it and free it once nobody holds it."""
        return self._process.ask("unload", digest)

    def pin(self, digest: str, *, pinned: bool = True) -> object | None:
        """Pin or unpin what is here or on its way."""
        found: object | None = self._process.ask("pin", digest, pinned)
        return found

    def listen(self, listener: Callable[[str, Any, str], object]) -> None:
        """Tell of every change."""
        self._process.listener = listener

    def snapshot(self) -> list[ResidentAdapter]:
        """Return what is resident, loading or unloading."""
        return self._process.look("residents", _residents, gone=[])

    def has_copy(self, digest: str) -> bool:
        """Whether host memory has a copy."""
        return digest in self._process.look("copies", _digests, gone=_NO_DIGESTS)

    def host_stats(self) -> HostStats:
        """Return what host memory holds."""
        return self._process.look("host_stats", _host_stats, gone=_NO_COPIES)


class FarCompositions:
    """Several versions at once."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def acquire(
        self, digest: str, resolved: Mapping[str, Any], weights: Mapping[str, float]
    ) -> Lease:
        """Return what a request shall hold; nobody here waits for several."""
        parts = tuple((resolved[part], weight) for part, weight in weights.items())
        return FarLease(self._process, Wanted(digest=digest, parts=parts))


class FarMerging:
    """Which adapter is merged."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def hold(self, resolved: Any, lease: Lease, execution: Execution) -> Lease:
        """Return a lease in the place of ``lease``: it says how its request may run."""
        assert isinstance(lease, FarLease), "a lease of this server's residency"
        return FarLease(self._process, replace(lease.wanted, execution=execution))

    def drop(self, digest: str) -> None:
        """Let a version's copy go when its running answers have ended."""
        self._process.ask("unmerge", digest)

    def merged(self) -> MergedAdapter | None:
        """Return what is merged, or about to be."""
        return self._process.look("merged", nouns.merged, gone=None)


class FarGrammars:
    """From constraints to grammars."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def submit(self, constraint: Constraint) -> Future[None]:
        """Say whether a constraint compiles. Its grammar stays there, and is found by the constraint."""
        return self._process.request("compile", constraint)


def _pair(row: nouns.Row) -> tuple[int, int]:
    running, waiting = row
    return running, waiting


def _digests(row: list[str]) -> tuple[str, ...]:
    return tuple(row)


def _verdicts(rows: dict[str, nouns.Row]) -> dict[str, Verdict | None]:
    return {digest: nouns.verdict(row) for digest, row in rows.items()}


def _residents(rows: list[nouns.Row]) -> list[ResidentAdapter]:
    return [nouns.plain(ResidentAdapter, row) for row in rows]


def _host_stats(row: nouns.Row) -> HostStats:
    return nouns.plain(HostStats, row)
