"""Calls in flight: who may enter, and how the engine's outputs find their call.

The engine hands over one list of outputs per step, from its own thread; one
``call_soon_threadsafe`` carries it to the event loop, where each output goes to its call's mailbox.
Everything but ``deliver`` runs on the event loop.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorary.errors import InvalidRequest, Overloaded, Unavailable
from lorary.server.engine.request import Output
from lorary.server.frames import Frames
from lorary.server.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.errors import LoraryError


class Calls:
    """Admission and dispatch of the calls in flight.

    Args:
        limit: calls that may be in flight together; more are refused before any work.
        frames_per_s: frames of all streams in a second, above which a frame carries several steps' tokens; 0: never.
    """

    def __init__(self, limit: int, frames_per_s: int = 0) -> None:
        self._limit = limit
        self._frames = Frames(frames_per_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mailboxes: dict[str, Mailbox[Output]] = {}
        self._digests: dict[str, tuple[str, ...]] = {}
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: str | None = None

    @property
    def num_in_flight(self) -> int:
        """Calls that were admitted and have not ended."""
        return self._num_in_flight

    @property
    def is_refusing(self) -> bool:
        """Whether nobody is admitted any more."""
        return self._refusal is not None

    @property
    def joins_steps(self) -> bool:
        """Whether a frame may carry several steps' tokens; if not, each step's are a frame of their own."""
        return self._frames.joins_steps

    @property
    def steps_per_frame(self) -> int:
        """Of how many steps a stream's frame carries the tokens now."""
        return self._frames.steps

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop serves the calls; before the engine delivers anything."""
        self._loop = loop

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        """Count a call as in flight while it runs; ``count`` of them, if it asks for so many answers apart.

        Raises:
            InvalidRequest: these are more than may ever be in flight together.
            Unavailable: the server is draining.
            Overloaded: ``limit`` calls are in flight.
        """
        if count > self._limit:
            raise InvalidRequest(
                f"{count} inputs were sent, each of which is a call; this server takes {self._limit} at once. "
                "Send fewer.",
                field="inputs",
            )
        if self._refusal is not None:
            raise Unavailable(self._refusal, retry_after_s=0.0)
        if self._num_in_flight + count > self._limit:
            raise Overloaded(
                f"{self._num_in_flight} calls are in flight; this server takes {self._limit}. "
                "Retry later; it is safe."
            )
        self._num_in_flight += count
        self._idle.clear()
        try:
            yield
        finally:
            self._num_in_flight -= count
            if self._num_in_flight == 0:
                self._idle.set()

    @contextmanager
    def listening(self, key: str, digests: tuple[str, ...] = ()) -> Iterator[Mailbox[Output]]:
        """Receive the outputs of the engine's request ``key``, in order; versions ``digests`` answer it."""
        mailbox: Mailbox[Output] = Mailbox()
        self._mailboxes[key] = mailbox
        self._digests[key] = digests
        try:
            yield mailbox
        finally:
            del self._mailboxes[key], self._digests[key]

    def deliver(self, outputs: list[Output]) -> None:
        """Hand over one step's outputs; called on the engine's thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return  # no loop, no calls: nobody waits for these
        loop.call_soon_threadsafe(self._dispatch, outputs)

    def refuse(self, message: str) -> None:
        """From now on, admit nobody."""
        self._refusal = message

    def fail_all(self, error: LoraryError) -> None:
        """End every call in flight with ``error``."""
        for key, mailbox in self._mailboxes.items():
            mailbox.put(Output(request_id=key, index=0, error=error))

    def fail_digest(self, digest: str, error: LoraryError) -> int:
        """End every call that a version answers with ``error``; return how many."""
        keys = [key for key, held in self._digests.items() if digest in held]
        for key in keys:
            self._mailboxes[key].put(Output(request_id=key, index=0, error=error))
        return len(keys)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no call is in flight; whether that came true in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _dispatch(self, outputs: list[Output]) -> None:
        assert self._loop is not None, "delivered by it"
        mailboxes = self._mailboxes
        # One that has none was cancelled, and this step did not know yet.
        self._frames.hand_over(
            [
                (mailbox, output)
                for output in outputs
                if (mailbox := mailboxes.get(output.request_id)) is not None
            ],
            self._loop,
        )
