"""From an error to what a caller over HTTP sees: a status and OpenAI's error object.

The status follows from the same table as gRPC's (``lorary.errors``). What may be said and what may not is
decided as there, too (``lorary.server.status``)::

    {"error": {"message": "…", "type": "invalid_request_error", "param": "temperature",
               "code": "invalid_request"}}
"""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorary.errors import (
    AdapterNotFound,
    InvalidRef,
    InvalidRequest,
    LoraryError,
    Overloaded,
    Unavailable,
    outcome,
    reason,
)
from lorary.server import status

if TYPE_CHECKING:
    from collections.abc import Mapping

_TYPES = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The protocol's paths, as the members of OpenAI's bodies.
_PARAMS = (
    (re.compile(r"^sampling\.(json_schema|choice|regex|lark|constraint)"), "response_format"),
    (re.compile(r"^sampling\.(.*)"), r"\1"),
    (re.compile(r"^input\.chat\.(tools\[\d+\])\.(\w+)"), r"\1.function.\2"),
    (
        re.compile(r"^input\.chat\.(messages.*tool_calls\[\d+\])\.(name|arguments)$"),
        r"\1.function.\2",
    ),
    (re.compile(r"^input\.chat\.tool_choice\..*"), "tool_choice"),
    (re.compile(r"^input\.chat\.((messages|tool).*)"), r"\1"),
    (re.compile(r"^input\.chat$"), "messages"),
    (re.compile(r"^input\.text$"), "messages"),
    (re.compile(r"^input\.token_ids\.ids"), "prompt"),
    (re.compile(r"^inputs(\[\d+\])?(\..*)?$"), r"input\1"),
    (re.compile(r"^input(\.prompt)?$"), "prompt"),
    (re.compile(r"^adapter$"), "model"),
)
# The client of OpenAI tries 409 and 5xx again unless it is told that this is useless.
_RETRIED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Problem:
    """What to send: a status, an error object, and further headers."""

    status: int
    content: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The error object as JSON."""
        return json.dumps(self.content).encode()


def problem(status_code: int, message: str, *, code: str, param: str | None = None) -> Problem:
    """Return a problem that HTTP alone knows, such as an unknown path."""
    kind = _TYPES.get(status_code, "server_error")
    content = {"message": message, "type": kind, "param": param, "code": code}
    headers = {"x-should-retry": "true" if status_code in _RETRIED else "false"}
    return Problem(status_code, {"error": content}, headers)


def problem_of(error: BaseException) -> tuple[Problem, str]:
    """Return what a caller sees of ``error``, and the id under which the log must tell the rest.

    The id is empty for errors that are the caller's to read.
    """
    found = outcome(error).http_status
    if not isinstance(error, LoraryError) or isinstance(error, status.PRIVATE):
        error_id = secrets.token_hex(8)
        message = f"internal error {error_id}; the server's log holds the cause."
        return problem(found, message, code="internal_error"), error_id
    made = problem(found, status.public_message(error), code=_code(error), param=_param(error))
    if isinstance(error, Overloaded | Unavailable):
        made = Problem(made.status, made.content, {**made.headers, **_retry(error.retry_after_s)})
    return made, ""


def _retry(seconds: float) -> dict[str, str]:
    return {
        "retry-after": str(math.ceil(seconds)),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
    }


def _code(error: LoraryError) -> str:
    if isinstance(error, AdapterNotFound):
        return "model_not_found"  # the one code that clients of OpenAI look for
    return reason(type(error)).lower()


def _param(error: LoraryError) -> str | None:
    if isinstance(error, InvalidRef | AdapterNotFound):
        return "model"
    if not isinstance(error, InvalidRequest) or not error.field:
        return None
    for pattern, param in _PARAMS:
        if pattern.match(error.field):
            return pattern.sub(param, error.field)
    return error.field
