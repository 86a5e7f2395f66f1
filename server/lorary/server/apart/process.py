"""The door's side of the engine's process: starts it, asks it, hears what it tells, and notices when it is gone."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorary.errors import EngineFailed, LoraryError, Unavailable
from lorary.server.apart import nouns
from lorary.server.apart.channel import Channel
from lorary.server.engine.request import StepStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorary.server.apart.nouns import Ready, Row
    from lorary.server.config import ServerConfig
    from lorary.server.ports import Deliver, Observer

log = logging.getLogger("lorary.server")

Answer = TypeVar("Answer")

MODULE = "lorary.server.apart.child"
ASK_S = 10.0
"""How long an answer may take. What is asked waits for no file and for no step."""
FRESH_S = 0.02
"""How long an answer to a look is good for: a list of a thousand adapters looks two thousand times."""
STOP_S = 30.0
"""How long the process may take to end: its step, loads and a merge that run."""
_GONE_S = 5.0
# What an observer is told last, where that is no plain text.
_LAST_OBSERVED: dict[str, Callable[[Row | None], object]] = {
    "on_load": nouns.error,
    "on_merge": nouns.error,
    "on_verify": nouns.verdict,
}


class EngineProcess:
    """The other process, from its start to its end.

    Args:
        config: how the server runs.
        deliver: takes the outputs of a step; called on a thread of this object.
        observer: told what engine and residency report; likewise.
    """

    def __init__(self, config: ServerConfig, *, deliver: Deliver, observer: Observer) -> None:
        self._deliver = deliver
        self._observer = observer
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._looks: dict[str, tuple[float, Any]] = {}
        self._num_changes = 0
        self._holds: dict[int, Callable[[LoraryError | None], None]] = {}
        self._is_ending = self._has_failed = False
        self._gone: str | None = None
        self.listener: Callable[[str, Any, str], object] = lambda _kind, _resolved, _why: None
        self._heard: dict[str, Callable[..., None]] = {
            "outputs": self._on_outputs,
            "step": self._on_step,
            "said": self._on_said,
            "held": self._on_held,
            "told": self._on_told,
            "observed": self._on_observed,
            "broke": self._on_broke,
        }
        ours, theirs = socket.socketpair()
        # Nothing is ever written to it: the kernel ends the process when our end is closed, with us or by us.
        life, held = os.pipe()
        self._life = os.fdopen(held, "wb", buffering=0)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(life)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for the ready line
                pass_fds=(theirs.fileno(), life),
                # Ctrl-C drains the door, which then ends this one.
                process_group=0,
            )
        finally:
            theirs.close()
            os.close(life)
        self._channel = Channel(ours)
        self._messages: Iterator[list[Any]] = self._channel.receive()
        self._reader = threading.Thread(target=self._read, name="engine-process", daemon=True)
        self._channel.send("config", settings(config))

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether it takes nothing any more."""
        return self._gone is not None

    def wait_ready(self) -> Ready:
        """Wait until the engine is built, as long as that takes; from then on it is heard.

        Raises:
            LoraryError: what the engine could not be built for.
            EngineFailed: its process ended without a word.
        """
        first = next(self._messages, None)
        if first is None:
            raise EngineFailed(f"{self._describe_end()} while it started; the log above says more.")
        kind, row = first
        if kind == "failed":
            failure = nouns.error(row)
            assert failure is not None
            raise failure
        self._reader.start()
        return nouns.ready(row)

    def send(self, *message: Any) -> None:
        """Send what has no answer.

        Raises:
            Unavailable: the process is gone.
        """
        if self._gone is not None:
            raise Unavailable(self._gone)
        self._channel.send(*message)

    def request(self, what: str, *args: Any) -> Future[Any]:
        """Ask; return what will be the answer.

        Raises (from the future):
            LoraryError: what it was answered with.
            Unavailable: the process is gone.
        """
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()  # who asked may lose interest; it is answered all the same
        number = next(self._numbers)
        with self._lock:
            if self._gone is not None:
                answer.set_exception(Unavailable(self._gone))
                return answer
            self._asked[number] = answer
        self._channel.send("ask", number, what, args)
        return answer

    def ask(self, what: str, *args: Any) -> Any:
        """Ask and wait: for what takes no longer than the other process' turn at its interpreter.

        Raises:
            LoraryError: what it was answered with.
            Unavailable: the process is gone, or does not answer.
        """
        try:
            return self._wait(what, self.request(what, *args))
        finally:
            self._forget_looks()

    def look(self, what: str, read: Callable[[Any], Answer], *, gone: Answer) -> Answer:
        """Return a state of the other process, at most ``FRESH_S`` old; ``gone`` once there is none.

        Raises:
            Unavailable: the process does not answer.
        """
        with self._lock:
            known = self._looks.get(what)
            num_changes = self._num_changes
        if known is not None and time.monotonic() - known[0] < FRESH_S:
            found: Answer = known[1]
            return found
        asked_s = time.monotonic()
        try:
            found = read(self._wait(what, self.request(what)))
        except Unavailable:
            if self._gone is None:
                raise
            return gone
        with self._lock:
            if num_changes == self._num_changes:
                self._looks[what] = (asked_s, found)
        return found

    def _wait(self, what: str, answer: Future[Any]) -> Any:
        try:
            return answer.result(ASK_S)
        except TimeoutError as error:
            raise Unavailable(
                f"the engine's process has not answered '{what}' for {ASK_S:g} s; retry later."
            ) from error

    def _forget_looks(self) -> None:
        """What was seen is not so any more."""
        with self._lock:
            self._num_changes += 1
            self._looks.clear()

    def hold(self, resolved: Any, on_end: Callable[[LoraryError | None], None]) -> int:
        """Hold a version over there until ``drop``; ``on_end`` is called when its load has ended.

        Raises:
            LoraryError: it cannot be loaded; nothing is held.
        """
        number = next(self._numbers)
        self._holds[number] = on_end
        try:
            is_over, row = self.ask("hold", number, resolved)
        except LoraryError:
            self.drop(number)
            raise
        if is_over:
            on_end(nouns.error(row))
        return number

    def drop(self, number: int) -> None:
        """Give a hold back."""
        if self._holds.pop(number, None) is not None:
            self._channel.send("drop", number)

    def close(self) -> None:
        """End the process; idempotent. What it still does is let to its end, for ``STOP_S``."""
        if self._is_ending:
            return
        self._is_ending = True
        self._channel.send("stop")
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("the engine's process has not ended for %g s and is killed", STOP_S)
        self.kill()

    def kill(self) -> None:
        """End the process now, if it has not ended."""
        self._is_ending = True
        self._process.kill()
        self._process.wait()
        self._channel.close()
        self._life.close()

    # -- the reader's thread ------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for kind, *rest in self._messages:
                self._heard[kind](*rest)
        except Exception:
            # Neither side can be trusted to know what the other one does.
            log.exception("what the engine's process said was not understood; it is killed")
            self._process.kill()
        self._on_end()

    def _on_end(self) -> None:
        """Fail what still waits for an answer, and tell whoever did not ask for this end."""
        with self._lock:
            self._gone = "the engine is gone; try another replica."
            asked, self._asked = self._asked, {}
        for answer in asked.values():
            answer.set_exception(Unavailable(self._gone))
        for on_end in list(self._holds.values()):
            on_end(Unavailable(self._gone))
        if self._is_ending:
            return
        what = self._describe_end()
        log.error("%s", what)
        self._fail(EngineFailed(what))

    def _fail(self, error: EngineFailed) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._observer.on_error(error)

    def _on_outputs(self, rows: list[Row]) -> None:
        self._deliver([nouns.output(row) for row in rows])

    def _on_step(self, row: Row) -> None:
        self._observer.on_step(nouns.plain(StepStats, row))

    def _on_said(self, number: int, said: Any, failure: Row | None) -> None:
        with self._lock:
            answer = self._asked.pop(number)
        error = nouns.error(failure)
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(said)

    def _on_held(self, number: int, failure: Row | None) -> None:
        on_end = self._holds.get(number)
        if on_end is not None:
            on_end(nouns.error(failure))

    def _on_told(self, kind: str, row: Row, why: str) -> None:
        self._forget_looks()
        self.listener(kind, nouns.resolved(row), why)

    def _on_observed(self, what: str, args: list[Any]) -> None:
        read = _LAST_OBSERVED.get(what)
        if read is not None:
            args[-1] = read(args[-1])
        getattr(self._observer, what)(*args)

    def _on_broke(self, kind: str) -> None:
        self._fail(EngineFailed(f"a step raised {kind}"))

    def _describe_end(self) -> str:
        """Say how the process ended; it has closed its end, so it has, or is about to."""
        try:
            code = self._process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "the engine's process has stopped to speak and was killed"
        if code >= 0:
            return f"the engine's process has ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
        return f"the engine's process was ended by {name}{hint}"


def settings(config: ServerConfig) -> dict[str, Any]:
    """Return a configuration as the other process reads it: paths are texts."""
    fields = dataclasses.fields(config)
    given = {field.name: getattr(config, field.name) for field in fields}
    return {key: str(v) if isinstance(v, Path) else v for key, v in given.items()}
