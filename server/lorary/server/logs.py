"""The server's log on stderr: for people, or one JSON object per line. Set up by ``app`` only."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

import grpc.aio

from lorary.server.access.identity import tenant_name
from lorary.server.current_call import current_call, request_id

SELDOM_S = 60.0


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what is stderr at that moment: a progress bar stands below the lines it is given."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


class _Human(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s%(call)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        call = " ".join(part for part in (request_id(), tenant_name()) if part)
        record.call = f"  [{call}]" if call else ""
        return super().format(record)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if call := current_call():
            known = {
                "request_id": call.request_id,
                "adapter_digest": call.digest,
                "trace_id": call.trace_id,
                "span_id": call.span_id,
            }
            line |= {key: value for key, value in known.items() if value}
        if tenant := tenant_name():
            line["tenant"] = tenant
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Seldom(logging.Filter):
    """Lets OpenTelemetry say the same once a minute, such as that its collector is away."""

    def __init__(self) -> None:
        super().__init__()
        self._said_s: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry."):
            return True
        place, now = (record.name, record.lineno), time.monotonic()
        if now - self._said_s.get(place, -SELDOM_S) < SELDOM_S:
            return False
        self._said_s[place] = now
        return True


class _Unsent(logging.Filter):
    """Says in a line what gRPC says as an error of the server's, with a traceback: an answer did not reach its caller.

    A deadline that passes while a call's only message is being sent fails that before the server is told that the
    caller has gone. The caller has its status, and nobody can do anything about it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not record.name.startswith("grpc.") or not isinstance(error, grpc.aio.InternalError):
            return True
        method = re.search(r"\[(.+)\]", record.getMessage())
        record.msg = (
            "%s was answered, and that could not be sent: its caller has gone, or it is longer than "
            "--max-message"
        )
        record.args = (method[1] if method else "a call",)
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        return logging.getLogger("lorary").isEnabledFor(logging.INFO)


def configure(log_format: str, level: str) -> None:
    """Send the log of this process to stderr; replaces what was set up before."""
    handler = _Stderr()
    handler.setFormatter(_Json() if log_format == "json" else _Human())
    handler.addFilter(_Seldom())
    handler.addFilter(_Unsent())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("lorary").setLevel(level.upper())
