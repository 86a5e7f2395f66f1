"""What one call says about the version that answered it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorary.errors import Cancelled, DeadlineExceeded, NotMergeable, Overloaded, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.server.engine.request import Output
    from lorary.server.rollout.endings import Endings
    from lorary.server.rollout.traffic import Traffic
    from lorary.server.targets import Target

NOT_ITS_FAULT = (Overloaded, Unavailable, DeadlineExceeded, Cancelled, NotMergeable)
"""Errors that say something about the server or the caller, and nothing about a version."""


class Observation:
    """One call under way, or the copy of one.

    Attributes:
        token_ids: its first answer so far.
        logprobs: the log probabilities of its labels, of a classification.
        embedding: its vector, of a call for one.
        first_token_s: seconds from arrival to the first token, without waiting for the adapter.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: tuple[float, ...] = ()
        self.embedding: tuple[float, ...] = ()
        self.first_token_s: float | None = None

    def see(self, output: Output) -> None:
        """Remember what one step made of the call."""
        if output.index:
            return
        self.token_ids += output.token_ids
        if output.finish is not None:
            finish = output.finish
            self.logprobs = finish.label_logprobs
            self.embedding = finish.embedding
            # The rarer side of a split is the colder one: the traffic's doing, not the version's.
            wait_ns = finish.queue_ns + finish.prefill_ns - finish.adapter_load_ns
            self.first_token_s = max(0, wait_ns) / 1e9


class Observer:
    """Counts calls for the versions that answer them and the canaries that they are part of."""

    def __init__(self, endings: Endings, traffic: Traffic) -> None:
        self._endings = endings
        self._traffic = traffic

    @contextmanager
    def observed(self, target: Target) -> Iterator[Observation]:
        """Count the call that runs inside, however it ends; on the event loop."""
        trial, observation = target.trial, Observation()
        if trial is None:
            yield observation
            self._traffic.count(target.digest)
            return
        tally = trial.canary if target.is_canary else trial.holder
        try:
            yield observation
        except Exception as error:
            if not isinstance(error, NOT_ITS_FAULT):
                tally.failed(error)
                self._endings.judge(trial)
            raise
        self._traffic.count(target.digest)
        tally.ok(observation.first_token_s)
        self._endings.judge(trial)
