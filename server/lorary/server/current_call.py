"""The call that the current task works for: what every line of the log says of it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class CurrentCall:
    """What is known of a call so far.

    One object for all tasks of the call: what one of them finds out, lines of the others say, too.

    Attributes:
        request_id: the caller's, or one of ours.
        digest: of the version that answers; empty for the bare base, and until the ref is resolved.
        trace_id: of the trace that the call is part of, in 32 hexadecimal digits; empty without traces.
        span_id: of the call's own span, in 16.
    """

    request_id: str = ""
    digest: str = ""
    trace_id: str = ""
    span_id: str = ""


_current: ContextVar[CurrentCall | None] = ContextVar("lorary_call", default=None)


def begin_call() -> CurrentCall:
    """Take what the current task does from here on as a new call; return what is known of it."""
    call = CurrentCall()
    _current.set(call)
    return call


def current_call() -> CurrentCall | None:
    """Return the call that this task works for; None outside of one."""
    return _current.get()


def request_id() -> str:
    """Return the id of the call that this task serves; ``""`` outside of a call."""
    call = _current.get()
    return "" if call is None else call.request_id
