"""From a gRPC status back to the error that the server raised.

Lorary's servers send the class' name as ``ErrorInfo.reason``; what comes from elsewhere (a proxy, the
network, gRPC itself) is mapped by its status code.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from lorary.errors import (
    OUTCOMES,
    AccessDenied,
    AlreadyExists,
    Cancelled,
    Conflict,
    CorruptArtifact,
    DeadlineExceeded,
    InvalidRequest,
    LoraryError,
    NotFound,
    Overloaded,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
    reason,
)

DOMAIN = "lorary"
DETAILS_KEY = "grpc-status-details-bin"

_BY_REASON: dict[str, type[LoraryError]] = {reason(cls): cls for cls in OUTCOMES}
_BY_CODE: dict[grpc.StatusCode, type[LoraryError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.DATA_LOSS: CorruptArtifact,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_rpc_error(error: grpc.RpcError, target: str) -> LoraryError:
    """Return the error to raise for a failed call to ``target``; ``raise … from error``."""
    # Both the sync and the asyncio errors have these methods; the common base class has none.
    call: Any = error
    code, text = call.code(), call.details() or ""
    found = _details(call.trailing_metadata())
    info = found.get("ErrorInfo")
    if info is not None and info.domain == DOMAIN:
        return _rebuild(_BY_REASON.get(info.reason, LoraryError), text, found)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidRequest(f"the message is too large for '{target}': {text}. Send less.")
    if code == grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"no server answers at '{target}': {text}. Is it running?")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"'{target}' did not answer in time; allow more with timeout_s.")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return LoraryError(f"'{target}' does not offer this call: {text}. Is it a Lorary server?")
    return _BY_CODE.get(code, LoraryError)(f"'{target}' answered {code.name}: {text}")


def _rebuild(cls: type[LoraryError], text: str, found: dict[str, Any]) -> LoraryError:
    """Build the server's error again, with what its class carries."""
    if issubclass(cls, InvalidRequest):
        violations = found["BadRequest"].field_violations if "BadRequest" in found else ()
        return cls(text, field=violations[0].field if violations else "")
    error = cls(text)
    if "RetryInfo" in found:
        error.retry_after_s = found["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
    if isinstance(error, QuotaExceeded) and "QuotaFailure" in found:
        error.subject = next((v.subject for v in found["QuotaFailure"].violations), "")
    return error


def _details(metadata: Any) -> dict[str, Any]:
    """Return the ``google.rpc`` details of trailing metadata, by message name."""
    raw = next((value for key, value in metadata or () if key == DETAILS_KEY), None)
    if raw is None:
        return {}
    found: dict[str, Any] = {}
    try:
        for packed in status_pb2.Status.FromString(raw).details:
            name = packed.TypeName().rsplit(".", 1)[-1]
            kind = getattr(error_details_pb2, name, None)
            if kind is not None:
                found[name] = kind.FromString(packed.value)
    except DecodeError:  # a proxy's own details: the status code still says enough
        return {}
    return found
