"""Calls that continue the caller's trace, where its program is traced with OpenTelemetry."""

from __future__ import annotations

import sys
from typing import Any

# A program that has a span has imported this; for all others OpenTelemetry stays unread.
_API = "opentelemetry.trace"


def with_trace(stub: Any) -> Any:
    """Return a stub whose calls carry the active span's ``traceparent``, if there is one.

    How it is written is up to the program's propagators: W3C's Trace Context unless it has set others.
    """
    return _Traced(stub)


class _Traced:
    """A stub with the trace in the metadata of every call that is part of one."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub, method)

        def traced(request: Any, *, metadata: tuple[tuple[str, str], ...] = (), **how: Any) -> Any:
            if _API in sys.modules:
                metadata = (*metadata, *_trace())
            return call(request, metadata=metadata, **how)

        return traced


def _trace() -> tuple[tuple[str, str], ...]:
    from opentelemetry import propagate, trace

    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
