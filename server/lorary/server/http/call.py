"""One HTTP request's life: an id, its body, the work, and what ends it.

What the gRPC interceptors do for a call, ``Endpoint`` does here: the id goes into logs and headers, an error
becomes a status, the call is counted and timed. When the client goes away, the work is cancelled at whichever
``await`` it is, which frees its rows at the next step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from lorary.errors import outcome
from lorary.server import status
from lorary.server.access.guard import audited
from lorary.server.current_call import begin_call
from lorary.server.http.body import parse_object
from lorary.server.http.problems import Problem, problem, problem_of
from lorary.server.interceptors import REQUEST_ID_KEY, is_valid_request_id, set_request_id
from lorary.server.service import ADAPTER_KEY, DIGEST_KEY, VERSION_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from starlette.types import Receive, Scope, Send

    from lorary.server.access.grants import Role
    from lorary.server.access.guard import Guard
    from lorary.server.interceptors import CallMetrics
    from lorary.server.tracing.calls import Tracing
    from lorary.server.tracing.span import CallSpan

log = logging.getLogger("lorary.server")

PING_S = 15.0
"""A stream that is silent for so long gets a comment line; proxies cut what says nothing for a minute."""

MAX_PATH_CHARS = 256

_HEADERS = {
    REQUEST_ID_KEY: "x-request-id",
    ADAPTER_KEY: "x-lorary-adapter",
    VERSION_KEY: "x-lorary-version",
    DIGEST_KEY: "x-lorary-digest",
}


class _TooLarge(Exception):
    """The body is longer than the server takes."""


class _Gone(Exception):
    """The client went away before its body was whole."""


class HttpCall:
    """One request: what was sent, and what its answer is written to."""

    def __init__(
        self,
        scope: Scope,
        send: Send,
        *,
        members: Mapping[str, Any],
        error_body: Callable[[Problem], bytes],
    ) -> None:
        self.members = members
        self._error_body = error_body
        self.path: Mapping[str, str] = scope.get("path_params", {})
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self.is_started = False
        self.status = 0
        self._send = send
        self._facts: tuple[tuple[str, str], ...] = ()
        self._sent_s = 0.0

    def header(self, name: str) -> str:
        """Return a header of the request, by its name in lower case; empty where it has none."""
        wanted = name.encode()
        return next((v.decode("latin-1") for k, v in self._headers if k.lower() == wanted), "")

    # -- facts about the answer, as the service keeps them ---------------------------------------

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Facts about the answer; they become headers."""
        return self._facts

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Replace the facts."""
        self._facts = tuple(metadata)

    def time_remaining(self) -> float | None:
        """HTTP has no deadlines; a client whose patience ends goes away."""
        return None

    # -- what endpoints answer with --------------------------------------------------------------

    async def answer(
        self,
        content: bytes,
        *,
        code: int = 200,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a whole response."""
        size = {"content-length": str(len(content))}
        await self._start(code, kind, {**size, **(headers or {})})
        await self._send({"type": "http.response.body", "body": content})

    async def answer_json(self, value: Any) -> None:
        """Send a whole response of JSON."""
        await self.answer(encode(value))

    async def event(self, value: Any) -> None:
        """Send one server-sent event; the first one sends the head of the response before it."""
        await self._stream(b"data: " + encode(value) + b"\n\n")

    async def end(self) -> None:
        """Send the event that ends an OpenAI stream, and end the response."""
        await self._stream(b"data: [DONE]\n\n", is_last=True)

    async def keep_alive(self) -> None:
        """Send a comment line whenever the stream has been silent for long, until cancelled."""
        self._sent_s = time.monotonic()
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s >= PING_S:
                await self._stream(b": waiting\n\n")
                silent_s = 0.0
            await asyncio.sleep(PING_S - silent_s)

    async def fail(self, found: Problem) -> None:
        """Send an error: as a status where nothing was sent yet, else as a stream's last event."""
        if not self.is_started:
            body = self._error_body(found)
            await self.answer(body, code=found.status, headers=found.headers)
            return
        await self._stream(b"data: " + self._error_body(found) + b"\n\n", is_last=True)

    async def _stream(self, data: bytes, *, is_last: bool = False) -> None:
        if not self.is_started:
            await self._start(
                200, "text/event-stream; charset=utf-8", {"cache-control": "no-store"}
            )
        self._sent_s = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def _start(self, code: int, kind: str, headers: Mapping[str, str]) -> None:
        self.is_started, self.status = True, code
        facts = {_HEADERS[key]: value for key, value in self._facts if value}
        all_headers = {"content-type": kind, **headers, **facts}
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in all_headers.items()]
        await self._send({"type": "http.response.start", "status": code, "headers": pairs})


def encode(value: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(
        # A lone surrogate cannot come out of a tokenizer; if it does, it must not end the stream.
        errors="replace"
    )


class Handler(Protocol):
    """What an endpoint does."""

    def __call__(self, call: HttpCall) -> Coroutine[Any, Any, None]:
        """Answer one request."""
        ...


class Endpoint:
    """An ASGI application around one handler.

    Args:
        name: the method's name in metrics and logs.
        handler: what it does.
        metrics: who counts it.
        max_body: largest body accepted, in bytes; 0 for methods without one.
        guard: asks who calls; None asks nobody.
        error_body: what an error is told as; OpenAI's object unless it says otherwise.
        role: whom it is for. What an admin's call with a body asks for leaves a line of the audit log.
        tracing: gives every request a span; None gives none.
        path: its route, for the span.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        metrics: CallMetrics,
        *,
        max_body: int = 0,
        guard: Guard | None = None,
        role: Role = "user",
        tracing: Tracing | None = None,
        path: str = "",
        error_body: Callable[[Problem], bytes] = lambda found: found.body,
    ) -> None:
        self._error_body = error_body
        self._guard = guard
        self._tracing = tracing
        self._path = path
        self._role: Role = role
        self._name = name
        self._handler = handler
        self._metrics = metrics
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; every way it can end ends here."""
        started = time.monotonic()
        code = "OK"
        ended_by: BaseException | None = None
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        call = HttpCall(scope, send, members={}, error_body=self._error_body)
        given = headers.get(b"x-request-id", "")
        begin_call()
        set_request_id(call, given if is_valid_request_id(given) else secrets.token_hex(8))
        span = None if self._tracing is None else self._begin_span(self._tracing, scope, headers)
        try:
            with self._admitted(headers.get(b"authorization"), call):
                if self._max_body:
                    raw = await _read(receive, headers.get(b"content-length", ""), self._max_body)
                    call.members = parse_object(raw, headers.get(b"content-type", ""))
                if not await _until_gone(self._handler(call), receive):
                    code = "CANCELLED"
        except _Gone:
            code = "CANCELLED"
        except _TooLarge:
            code = "RESOURCE_EXHAUSTED"
            text = f"the body is larger than {self._max_body} bytes; send less, or raise --max-message."
            await call.fail(problem(413, text, code="request_too_large"))
        except Exception as error:
            code, ended_by = outcome(error).grpc_status, error
            found, error_id = problem_of(error)
            if error_id:
                log.exception("%s failed, error %s", self._name, error_id)
            else:
                text = status.clip(str(error))
                log.info("%s refused: %s: %s", self._name, type(error).__name__, text)
            await call.fail(found)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            seconds = time.monotonic() - started
            self._metrics.on_call(self._name, code, seconds)
            if span is not None:
                told = {"http.response.status_code": call.status} if call.status else {}
                span.end(code, ended_by, told)
            log.debug("%s ended: %s, %.4f s", self._name, code, seconds)

    def _begin_span(self, tracing: Tracing, scope: Scope, headers: Mapping[bytes, str]) -> CallSpan:
        facts = {
            "http.request.method": scope["method"],
            "http.route": self._path,
            "url.path": scope["path"][:MAX_PATH_CHARS],
            "url.scheme": scope["scheme"],
        }
        named = {key.decode("latin-1"): value for key, value in headers.items()}
        return tracing.begin(f"{scope['method']} {self._path}", named, facts)

    @contextmanager
    def _admitted(self, authorization: str | None, call: HttpCall) -> Iterator[None]:
        """Find out who calls, before anything of the body is read."""
        if self._guard is None:
            yield
            return
        tenant = self._guard.identify(authorization)
        is_audited = self._role == "admin" and self._max_body > 0
        line = audited(tenant, self._name, lambda: encode(call.members).decode())
        with (
            line if is_audited else nullcontext(),
            self._guard.admitted(tenant, role=self._role),
        ):
            yield


async def _read(receive: Receive, declared: str, limit: int) -> bytes:
    """Return the whole body.

    Raises:
        _TooLarge: it is longer than ``limit``; no more than that was read.
        _Gone: the client went away before it was whole.
    """
    if declared.isdecimal() and int(declared) > limit:
        raise _TooLarge
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _TooLarge
        if not message.get("more_body"):
            return b"".join(parts)


async def _until_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Run ``work`` to its end, or until the client goes away; whether it ended by itself.

    Raises:
        Exception: what ``work`` raised.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is not None:
                log.info("after the client had gone: %s", task.exception())
            return False
        task.result()
        return True
    finally:
        watcher.cancel()
        task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
