"""What the engine's process does and tells: the other side of ``far`` and ``process``."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from lorary.errors import EngineFailed, LoraryError, Unavailable
from lorary.server.adapters.merging import MergeLease, hold_version
from lorary.server.adapters.residency import BaseLease
from lorary.server.apart import nouns
from lorary.server.engine.request import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorary.server.adapters.probe_runs import Verdict
    from lorary.server.apart.channel import Channel
    from lorary.server.apart.nouns import Row, Wanted
    from lorary.server.build import Backend
    from lorary.server.engine.request import Lease, Request, StepStats
    from lorary.server.ports import MergedLike

log = logging.getLogger("lorary.server")


class Teller:
    """Tells the door what engine and residency report; called on their threads."""

    def __init__(self, channel: Channel) -> None:
        self._send = channel.send

    def deliver(self, outputs: list[Output]) -> None:
        """Send what one step made."""
        self._send("outputs", outputs)

    def on_step(self, stats: StepStats) -> None:
        """Send the figures of a step."""
        self._send("step", stats)

    def on_error(self, error: BaseException) -> None:
        """Send of what kind an error was; this process has logged it."""
        self._send("broke", type(error).__name__)

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """Send how a load ended."""
        self._send("observed", "on_load", (name, seconds, error))

    def on_verify(self, name: str, verdict: Verdict) -> None:
        """Send what came of a version's probes."""
        self._send("observed", "on_verify", (name, verdict))

    def on_evict(self, cause: str) -> None:
        """Send why a version left."""
        self._send("observed", "on_evict", (cause,))

    def on_merge(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """Send how a merge ended."""
        self._send("observed", "on_merge", (name, seconds, error))

    def on_unmerge(self, cause: str) -> None:
        """Send why a merged copy left."""
        self._send("observed", "on_unmerge", (cause,))


class Listener:
    """Does what the door says, on the thread that reads it; nothing here waits for files or steps.

    Args:
        backend: what was built.
        channel: to the door.
    """

    def __init__(self, backend: Backend, channel: Channel) -> None:
        self._backend = backend
        residency: Any = backend.residency
        self._residency = residency
        self._send = channel.send
        self._holds: dict[int, Lease] = {}
        # Held while a request is handed over or cancelled, so that a cancel finds it on one side or the other.
        self._lock = threading.Lock()
        self._compiling: set[tuple[str, int]] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="asked")
        self._orders: dict[str, Callable[..., None]] = {
            "start": backend.engine.start,
            "submit": self._submit,
            "cancel": self._cancel,
            "ask": self._answer,
            "drop": self._drop,
        }
        self._answers: dict[str, Callable[..., Any]] = {
            "hold": self._hold,
            "prefetch": lambda row: residency.prefetch(nouns.resolved(row)),
            "check_fits": residency.check_fits,
            "load": self._load,
            "readmit": residency.readmit,
            "unload": lambda digest: residency.unload(digest) is not None,
            "pin": lambda digest, pinned: residency.pin(digest, pinned=pinned),
            "unmerge": self._unmerge,
            "merged": self._merged,
            "load_of_engine": lambda: (backend.engine.num_running, backend.engine.num_waiting),
            "residents": residency.snapshot,
            "verdicts": residency.verdicts,
            "quarantined": residency.quarantined,
            "copies": residency.copies,
            "host_stats": residency.host_stats,
            "compile": self._compile,
        }
        residency.listen(self._on_change)

    def listen(self, messages: Iterator[list[Any]]) -> None:
        """Obey until the door says stop or is gone."""
        for what, *args in messages:
            if what == "stop":
                return
            self._orders[what](*args)

    def close(self) -> None:
        """Stop everything."""
        self._backend.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- requests -----------------------------------------------------------------------------

    def _submit(self, row: Row, held: Row) -> None:
        request, wanted = nouns.request(row, BaseLease()), nouns.wanted(held)
        constraint = request.sampling.constraint
        if constraint is None:
            with self._lock:
                self._run(request, wanted)
            return
        # As a rule it has been compiled a moment ago; if not, others do not wait for it.
        with self._lock:
            self._compiling.add(request.key)
        compiled = self._backend.grammars.submit(constraint)
        compiled.add_done_callback(lambda found: self._compiled(found, request, wanted))

    def _compiled(self, found: Future[Any], request: Request, wanted: Wanted) -> None:
        with self._lock:
            if request.key not in self._compiling:
                return  # cancelled
            self._compiling.discard(request.key)
            error = _error_of(found)
            if error is not None:
                self._refuse(request, error)
                return
            request.grammar = found.result()
            self._run(request, wanted)

    def _run(self, request: Request, wanted: Wanted) -> None:
        """Give a request its lease, and to the engine."""
        try:
            lease = self._lease(wanted)
            request.lease = lease
            request.execution = wanted.execution if isinstance(lease, MergeLease) else "batched"
            try:
                self._backend.engine.submit(request)
            except BaseException:
                lease.release()
                raise
        except LoraryError as error:
            self._refuse(request, error)
        except Exception as error:
            # Whoever sent it waits for an output, whatever is wrong with it.
            log.exception("a request could not be handed over")
            self._refuse(request, _unforeseen(error))

    def _lease(self, wanted: Wanted) -> Lease:
        if not wanted.parts:
            return BaseLease()
        resolved = wanted.resolved
        if resolved is None:
            versions = {version.digest: version for version, _ in wanted.parts}
            weights = {version.digest: weight for version, weight in wanted.parts}
            return self._backend.compositions.acquire(wanted.digest, versions, weights)
        merging = self._backend.merging
        return hold_version(self._residency, merging, resolved, wanted.execution)

    def _refuse(self, request: Request, error: LoraryError) -> None:
        output = Output(request_id=request.request_id, index=request.index, error=error)
        self._send("outputs", [output])

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            self._compiling = {key for key in self._compiling if key[0] != request_id}
            self._backend.engine.cancel(request_id)

    # -- questions ----------------------------------------------------------------------------

    def _answer(self, number: int, what: str, args: list[Any]) -> None:
        def say(answer: Future[Any]) -> None:
            error = _error_of(answer)
            self._send("said", number, None if error else answer.result(), error)

        try:
            answer = self._answers[what](*args)
        except LoraryError as error:
            self._send("said", number, None, error)
        except Exception as error:
            log.exception("'%s' could not be answered", what)
            self._send("said", number, None, _unforeseen(error))
        else:
            if isinstance(answer, Future):
                answer.add_done_callback(say)
            else:
                self._send("said", number, answer, None)

    def _load(self, row: Row, pin: bool) -> Future[bool]:
        """Load and wait, on a thread of its own: other questions go on."""
        version = nouns.resolved(row)
        return self._pool.submit(lambda: bool(self._residency.load(version, pin=pin)))

    def _unmerge(self, digest: str) -> None:
        if self._backend.merging is not None:
            self._backend.merging.drop(digest)

    def _merged(self) -> MergedLike | None:
        return None if self._backend.merging is None else self._backend.merging.merged()

    def _compile(self, row: Row) -> Future[None]:
        """Compile a constraint, or say what is wrong with it; the grammar stays here."""
        compiled: Future[None] = Future()

        def end(found: Future[Any]) -> None:
            error = _error_of(found)
            if error is None:
                compiled.set_result(None)
            else:
                compiled.set_exception(error)

        self._backend.grammars.submit(nouns.constraint(row)).add_done_callback(end)
        return compiled

    def _hold(self, number: int, row: Row) -> tuple[bool, LoraryError | None]:
        lease: Lease = self._residency.acquire(nouns.resolved(row))
        # First this, then a look: what happens in between is told twice and never missed.
        self._holds[number] = lease
        return lease.is_ready or lease.error is not None, lease.error

    def _drop(self, number: int) -> None:
        lease = self._holds.pop(number, None)
        if lease is not None:
            lease.release()

    def _on_change(self, kind: str, resolved: Any, why: str) -> None:
        """Tell the door of a change; on any thread, under the residency's lock."""
        if kind in ("resident", "load_failed"):
            for number, lease in list(self._holds.items()):
                if lease.digest == resolved.digest:
                    self._send("held", number, lease.error)
        self._send("told", kind, resolved, why)


def _error_of(work: Future[Any]) -> LoraryError | None:
    """Return what some work failed with, as it travels; None when it did not."""
    if work.cancelled():
        return Unavailable("the engine stops; try another replica.")
    error = work.exception()
    if error is None or isinstance(error, LoraryError):
        return error
    log.error("the engine's process failed in what it was asked for", exc_info=error)
    return _unforeseen(error)


def _unforeseen(error: BaseException) -> LoraryError:
    """Return what is told of an error that is none of ours; all else stays in this process' log."""
    return EngineFailed(f"the engine's process raised {type(error).__name__}")
