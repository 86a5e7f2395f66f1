"""From an error to what a caller sees: a gRPC status with ``google.rpc`` details.

Every status carries ``ErrorInfo(reason, domain)``, where the reason is the class' name
(``ADAPTER_NOT_FOUND``), so that a client can raise the same class again. Beside it:

====================================  ==========================================================
``InvalidRequest``, ``InvalidRef``    ``BadRequest`` with the field's path
``NotFound`` and below                ``ResourceInfo``
``IncompatibleAdapter``               ``PreconditionFailure``
``Overloaded``, ``Unavailable``       ``RetryInfo``; so has what a load failed with a moment ago
``QuotaExceeded``                     ``RetryInfo`` and ``QuotaFailure``
``PRIVATE``, and what is not ours     ``RequestInfo`` with an opaque id, and nothing of the cause
====================================  ==========================================================

Messages quote what the caller sent. What they might say of the server's own folders is cut out.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from lorary.errors import (
    AdapterNotFound,
    BaseNotFound,
    ConfigError,
    EngineFailed,
    IncompatibleAdapter,
    InvalidRef,
    InvalidRequest,
    LoraryError,
    MissingDependency,
    NotFound,
    QuotaExceeded,
    StorageError,
    TrainingFailed,
    outcome,
    reason,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN = "lorary"
DETAILS_KEY = "grpc-status-details-bin"
# Details travel in trailing metadata, which peers cap at 8 KiB; the message travels twice.
MAX_MESSAGE_CHARS = 700
MAX_WIRE_BYTES = 2048
"""Of a message as gRPC writes it: three bytes for each byte that is no printable ASCII."""
# Errors about the server's inside: the caller gets the status and an id, the log gets the text.
PRIVATE = (ConfigError, EngineFailed, MissingDependency, StorageError, TrainingFailed)
_FOLDERS = re.compile(r"(?<![\w/])/(?:[^\s'\":/]+/)+")


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the gRPC status code of ``error``."""
    return grpc.StatusCode[outcome(error).grpc_status]


def to_status(error: LoraryError) -> status_pb2.Status:
    """Return the rich status of one of our errors; its message is meant for the caller."""
    message = public_message(error)
    details = [_error_info(error), *_details(error, message), *_retry_info(error)]
    return _status(code_of(error), message, details)


def public_message(error: LoraryError) -> str:
    """Return the message of one of our errors, without the server's own folders."""
    message = str(error)
    if not isinstance(error, InvalidRequest | InvalidRef):
        message = _FOLDERS.sub("…/", message)
    message = clip(message)
    while (size := _wire_bytes(message)) > MAX_WIRE_BYTES:
        message = clip(message, len(message) * MAX_WIRE_BYTES // size)
    return message


def private_status(error: BaseException, error_id: str) -> status_pb2.Status:
    """Return a status that says nothing but an id to look for in the server's log."""
    request = error_details_pb2.RequestInfo(request_id=error_id)
    details = [_error_info(error), request, *_retry_info(error)]
    return _status(
        code_of(error), f"internal error {error_id}; the server's log holds the cause.", details
    )


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> None:
    """End the call with ``status``, keeping the trailing metadata that was set before.

    Raises:
        grpc.aio.AbortError: it is how grpc.aio ends a call.
        asyncio.CancelledError: the caller has gone meanwhile, so that nothing can be sent.
    """
    trailing = (*(context.trailing_metadata() or ()), (DETAILS_KEY, status.SerializeToString()))
    try:
        await context.abort(_CODES[status.code], status.message, trailing_metadata=trailing)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def as_code(code: grpc.StatusCode | int | None) -> grpc.StatusCode:
    """Return a status code that grpc.aio gave as a number or as an enum member."""
    if isinstance(code, grpc.StatusCode):
        return code
    return _CODES.get(code or 0, grpc.StatusCode.UNKNOWN)


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _error_info(error: BaseException) -> Message:
    name = reason(type(error)) if isinstance(error, LoraryError) else "INTERNAL"
    info: Message = error_details_pb2.ErrorInfo(reason=name, domain=DOMAIN)
    return info


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    packed = []
    for detail in details:
        any_detail = any_pb2.Any()
        any_detail.Pack(detail)
        packed.append(any_detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def _details(error: LoraryError, message: str) -> list[Message]:
    """Return what the class of ``error`` adds to ErrorInfo."""
    if isinstance(error, InvalidRequest | InvalidRef):
        field = error.field if isinstance(error, InvalidRequest) else "adapter"
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clip(field, 100), description=message
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, NotFound):
        kinds = {AdapterNotFound: "adapter", BaseNotFound: "base"}
        kind = next((k for cls, k in kinds.items() if isinstance(error, cls)), "resource")
        return [error_details_pb2.ResourceInfo(resource_type=kind, description=message)]
    if isinstance(error, IncompatibleAdapter):
        unmet = error_details_pb2.PreconditionFailure.Violation(
            type=reason(type(error)), subject="adapter", description=message
        )
        return [error_details_pb2.PreconditionFailure(violations=[unmet])]
    if isinstance(error, QuotaExceeded):
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.subject, description=message
        )
        return [error_details_pb2.QuotaFailure(violations=[violation])]
    return []


def _retry_info(error: BaseException) -> list[Message]:
    """Return when a retry may succeed, where the error knows."""
    retry_after_s = getattr(error, "retry_after_s", None)
    if not isinstance(error, LoraryError) or retry_after_s is None:
        return []
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(retry_after_s * 1e9))
    return [error_details_pb2.RetryInfo(retry_delay=delay)]


def _wire_bytes(message: str) -> int:
    plain = sum(" " <= c <= "~" and c != "%" for c in message)
    return plain + 3 * (len(message.encode(errors="replace")) - plain)


def clip(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """Cut a text in its middle, so that what and what-to-do both stay."""
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
