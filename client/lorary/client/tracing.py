"""Calls that continue the caller's trace, where its program is traced with OpenTelemetry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lorary.client.metadata import WithMetadata

if TYPE_CHECKING:
    from lorary.client.metadata import Metadata

# A program that has a span has imported this; for all others OpenTelemetry stays unread.
_API = "opentelemetry.trace"


def with_trace(stub: Any) -> Any:
    """Return a stub whose calls carry the active span's ``traceparent``, if there is one.

    How it is written is up to the program's propagators: W3C's Trace Context unless it has set others.
    """
    return WithMetadata(stub, _trace)


def _trace(_request: Any) -> Metadata:
    if _API not in sys.modules:
        return ()
    from opentelemetry import propagate, trace

    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
