"""Requests of every route, as they should not be, and bytes that are no request at all."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from lorary.errors import HTTP_STATUSES
from tests.fuzz.messages import HINTS, TEXTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.fuzz.messages import Draw

PATIENCE_S = 120.0
_LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
_CALL = {"id": "call", "type": "function", "function": {"name": "look", "arguments": "{}"}}
SEEDS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": (
        {
            "model": "judge@prod",
            "messages": [{"role": "user", "content": "the cat"}],
            "max_tokens": 4,
        },
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "sat"}]},
                {"role": "user", "content": "the cat"},
            ],
            "max_completion_tokens": 4,
            "temperature": 0.5,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}},
        },
        {
            "model": "alpha",
            "messages": [
                {"role": "user", "content": "the cat"},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "content": "sat", "tool_call_id": "call"},
            ],
            "tools": [_LOOK],
            "tool_choice": "auto",
            "max_tokens": 6,
        },
    ),
    "/v1/completions": (
        {"model": "alpha", "prompt": "the cat", "max_tokens": 4, "logprobs": 1, "echo": True},
        {
            "prompt": [[5, 9, 12], [30]],
            "max_tokens": 3,
            "stop": ["cat"],
            "logit_bias": {"5": 1.5},
            "stream": True,
            "seed": -3,
            "top_k": -1,
            "structured_outputs": {"regex": "[a-c]+"},
            "execution": "batched",
        },
    ),
    "/v1/embeddings": (
        {
            "model": "alpha",
            "input": ["the cat", "sat"],
            "dimensions": 8,
            "encoding_format": "float",
        },
    ),
    "/tokenize": (
        {"model": "judge", "prompt": "the cat", "return_token_strs": True},
        {"messages": [{"role": "user", "content": "the cat"}]},
    ),
    "/detokenize": ({"tokens": [5, 9, 12]},),
    "/console/api/promote": (
        {"name": "alpha", "alias": "canary", "version": 1, "expect_version": 0, "reason": "why"},
    ),
    "/console/api/rollback": ({"name": "alpha", "alias": "prod", "expect_version": 1},),
}
_TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["the cat", "sat"]}
_INFERS: tuple[dict[str, Any], ...] = (
    {"id": "id", "inputs": [_TENSOR], "parameters": {"max_tokens": 3, "stop": "cat", "seed": 1}},
    {
        "inputs": [{**_TENSOR, "shape": [2, 1], "data": [["the cat"], ["sat"]]}],
        "parameters": {"max_tokens": 2, "temperature": 0.5, "use_template": True},
    },
    {"inputs": [_TENSOR], "outputs": [{"name": "label"}, {"name": "probability"}]},
    {
        "inputs": [_TENSOR],
        "outputs": [{"name": "embedding"}],
        "parameters": {"dimensions": 8, "normalize": True, "pooling": "last"},
    },
)
V2_SEEDS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "/v2/models/judge@prod/infer": _INFERS,
    "/v2/models/judge/versions/1/infer": _INFERS,
    "/v2/models/base/infer": _INFERS,
    "/v2/models/alpha/infer": _INFERS,
    "/v2/models/nobody/infer": _INFERS,
}
V2_GETS = (
    *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/alpha", "/v2/models/base/ready"),
    *("/v2/models/alpha/versions/1", "/v2/models/judge/versions/1/ready", "/v2/models/a/b/c"),
    *("/v2/models/judge@prod/ready", "/v2/models/alpha@1/versions/1", "/v2/models/nobody/ready"),
    *("/v2/models/base", "/v2/models/base/versions/1", "/v2/models/alpha/versions/99"),
)
_ODD_V2_PATHS = (
    *("/v2/", "/v2/models", "/v2/models/", "/v2/models//infer", "/v2/models/alpha/versions//infer"),
    *("/v2/models/%00/ready", "/v2/models/%ff%fe", "/v2/models/%ED%A0%80/infer", "/v2//models/x"),
    *("/v2/models/..%2f..%2fetc%2fpasswd", "/v2/models/" + "x" * 3000 + "/ready", "/v2/health"),
    *("/v2/models/alpha/versions/" + "9" * 5000, "/v2/models/alpha/versions/1%0a/ready"),
    *("/v2/models/alpha@sha256:/ready", "/v2/models/@/infer", "/v2/repository/index"),
    *("/v2/models/alpha/versions/1/versions/1/infer", "/v2/models/%5B%7B/infer", "/v2?%ff=%00"),
)
GETS = (
    *("/v1/models", "/v1/models/alpha", "/v1/models/judge@prod", "/v1/models/nobody", "/health"),
    *("/ready", "/metrics", "/console", "/console/", "/console/api/state", "/console/api/figures"),
    *("/console/api/moves/alpha", "/console/api/moves/nobody", "/console/main.js", "/", "/nothing"),
)
_ODD_PATHS = (
    *("/v1/models/%00", "/v1/models/..%2f..%2fetc%2fpasswd", "/console/..%2f..%2fapp.py", "//"),
    *(
        "/v1/models/" + "x" * 3000,
        "/v1/models/%ff%fe",
        "/v1/models/%ED%A0%80",
        "/v1//models",
        "/health/",
    ),
    *(
        "/console/api/moves/%0a",
        "/v1/models?%ff=%00",
        "/v1/models/",
        "*",
        "http://x/y",
        "/%2e%2e/",
        "/[",
    ),
)
_METHODS = (
    *(
        "GET",
        "GET",
        "POST",
        "POST",
        "HEAD",
        "PUT",
        "DELETE",
        "OPTIONS",
        "PATCH",
        "TRACE",
        "CONNECT",
    ),
    *("BREW", "get"),
)
STATUSES = frozenset({200, 304, 307, 405, 413, *HTTP_STATUSES.values()} - {499, 500})
"""What a request may end with (docs/openai.md); 500 is a fault of the server's."""
_DEEP = 3000
# JSON that Python's own writer does not write: what stands for it, and what it is.
_RAW = {
    "@huge": "1e400",
    "@nan": "NaN",
    "@digits": "9" * 5000,
    "@lists": "[" * _DEEP + "]" * _DEEP,
    "@deep": "[" * 960 + "]" * 960,
    "@objects": '{"a":' * 970 + "1" + "}" * 970,
    "@twin": '{"a": 1, "a": 2}',
}
_NAMES = (
    *(
        "model",
        "messages",
        "prompt",
        "tools",
        "functions",
        "temperature",
        "role",
        "content",
        "name",
    ),
    *(
        "best_of",
        "suffix",
        "user",
        "parameters",
        "max_tokens",
        "pooling",
        "modalities",
        "max_token",
        "json",
        "choice",
        "grammar",
        "",
        "\ud800",
    ),
)
_SCALARS: st.SearchStrategy[Any] = (
    st.sampled_from(
        (
            *(None, True, False, 0, 1, -1, 2, 3, 20, 21, 128, 2**31, 2**32, 2**63, 2**64, 10**400),
            *(-(2**63), 0.0, 0.5, -0.0, 1e-45, 1e308, -1e308, "\ud800", "a\udfff", {}, []),
            *_RAW,
        )
    )
    | st.sampled_from(TEXTS)
    | st.sampled_from([hint for hints in HINTS.values() for hint in hints])
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpInput:
    """What is sent over one connection.

    Attributes:
        parts: the bytes, a moment between each.
        is_whole: it is one request, well formed as far as HTTP goes: one answer must come.
        ends: how the caller leaves: "answered", "closed" (its half of the connection), "reset".
        is_gone: there need not be an answer.
    """

    what: str
    parts: tuple[bytes, ...]
    is_whole: bool = True
    ends: str = "answered"
    port: str = "http"
    door: str = "HTTP"

    async def faults(self, host: str, port: int) -> str:
        """Send it; return what is wrong with what came back, "" if nothing is."""
        reader, writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                received = await self._exchange(reader, writer)
        except TimeoutError:
            return f"no end within {PATIENCE_S:.0f} s"
        except OSError:
            received = None  # closed while we wrote, as it may be on what is too long or no request
        finally:
            writer.transport.abort()
        if self.ends == "reset" or self.port != "http":
            return ""
        if not received:
            return "no answer" if self.is_whole and received is not None else ""
        return self._wrong(received)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        for i, part in enumerate(self.parts):
            if i:
                await asyncio.sleep(0.005)
            writer.write(part)
            await writer.drain()
        if self.ends == "reset":
            return None
        if self.ends == "closed":
            writer.write_eof()
        return await reader.read()

    def _wrong(self, received: bytes) -> str:
        while received.startswith(b"HTTP/1.1 1"):  # go on, says the server
            received = received.partition(b"\r\n\r\n")[2]
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        said = f"{status}: {body[:200]!r}"
        if not self.is_whole:
            return said if status == 500 else ""
        if status not in STATUSES:
            # 499 never travels, and what HTTP itself refuses is uvicorn's to say.
            return said
        if self.what.startswith("HEAD"):
            return f"HEAD with a body: {said}" if body else ""
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join(_chunks(body))
        kind = headers.get("content-type", "")
        if kind.startswith("application/json"):
            return _wrong_v2(body, status) if self.door == "OIP HTTP" else _wrong_json(body, status)
        if kind.startswith("text/event-stream"):
            return _wrong_stream(body)
        return f"an error without JSON: {said}" if status >= 400 and body else ""


def _chunks(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        yield rest[:length]
        body = rest[length + 2 :]


def _strict(raw: bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(raw, parse_constant=refuse)


def _wrong_json(body: bytes, status: int) -> str:
    try:
        found = _strict(body)
    except ValueError as error:
        return f"{status} with what is no JSON ({error}): {body[:200]!r}"
    if status < 400:
        return ""
    told = found.get("error", {})
    is_whole = {"message", "type", "param", "code"} <= told.keys() and told["message"]
    if not is_whole or told["code"] == "internal_error":
        return f"{status} with {body[:300]!r}"
    return ""


def _wrong_v2(body: bytes, status: int) -> str:
    """Return what is wrong with an answer of /v2, whose errors are a text; only strangers' paths have OpenAI's."""
    try:
        found = _strict(body)
    except ValueError as error:
        return f"{status} with what is no JSON ({error}): {body[:200]!r}"
    for tensor in found.get("outputs", ()) if "model_name" in found else ():
        if len(tensor["data"]) != math.prod(tensor["shape"]):
            return f"{tensor['name']} has {len(tensor['data'])} elements, shape {tensor['shape']}"
    if status < 400 or found.get("ready") is False:
        return ""
    told = found.get("error")
    if isinstance(told, dict):
        return _wrong_json(body, status)
    is_told = isinstance(told, str) and told and not told.startswith("internal error")
    return "" if is_told else f"{status} with {body[:300]!r}"


def _wrong_stream(body: bytes) -> str:
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not events:
        return "a stream without events"
    *others, last = events
    try:
        read = [_strict(event) for event in others]
        ended = None if last == b"[DONE]" else _strict(last)
    except ValueError as error:
        return f"an event that is no JSON ({error})"
    if any("error" in event for event in read):
        return "an error in the middle of a stream"
    if ended is None:
        return ""
    is_internal = ended.get("error", {}).get("code", "internal_error") == "internal_error"
    return f"a stream that ends with {last[:300]!r}" if is_internal else ""


def change_json(draw: Draw, value: Any) -> Any:
    """Return a JSON value with one of its parts changed; lists and objects are changed in place."""
    if isinstance(value, dict) and value and draw(st.sampled_from((True, True, True, False))):
        name = draw(st.sampled_from(sorted(value)))
        what = draw(st.sampled_from(("change", "change", "change", "remove", "add")))
        if what == "change":
            value[name] = change_json(draw, value[name])
        elif what == "remove":
            del value[name]
        else:
            value[draw(st.sampled_from(_NAMES))] = draw(_SCALARS)
        return value
    if isinstance(value, list) and value and draw(st.sampled_from((True, True, False))):
        at = draw(st.integers(0, len(value) - 1))
        value[at] = change_json(draw, value[at])
        if draw(st.sampled_from((False, False, True))):
            value.extend([value[at]] * draw(st.sampled_from((1, 2, 17, 129, 300))))
        return value
    return draw(_SCALARS)


def _body(draw: Draw, path: str) -> bytes:
    seeds = SEEDS.get(path) or V2_SEEDS.get(path) or ({"model": "alpha"},)
    body = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 2, 4)))):
        body = change_json(draw, body)
    text = json.dumps(body)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


def _damaged_body(draw: Draw, good: bytes) -> bytes:
    how = draw(
        st.sampled_from(("cut", "flip", "bom", "utf16", "latin", "random", "empty", "large"))
    )
    at: int = draw(st.integers(0, len(good) - 1))
    made: dict[str, bytes] = {
        "cut": good[:at],
        "flip": good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :],
        "bom": b"\xef\xbb\xbf" + good,
        "utf16": good.decode().encode("utf-16"),
        "latin": good[:at] + b"\xe9\xff" + good[at:],
        "random": draw(st.binary(max_size=100)),
        "empty": b"",
        "large": b'{"%s": 1}' % (b"x" * 300_000),
    }
    return made[how]


_HEADERS = (
    *(b"x-request-id: id", b"x-request-id: " + b"x" * 500, b"authorization: Bearer x", b"host: ["),
    *(b"accept-encoding: br", b"origin: http://evil", b"if-none-match: \xe9", b"range: bytes=9-1"),
    *(b"expect: 100-continue", b"upgrade: websocket", b"upgrade: h2c", b"host: evil.example"),
    *(
        b"x-odd: " + b"y" * 20_000,
        b"cookie: a=b",
        b"x-forwarded-for: 1.1.1.1",
        b"content-encoding: gzip",
    ),
)
_TYPES = (
    *(b"application/json",) * 8,
    *(b"text/plain", b"", b"application/json; charset=utf-16", b"multipart/form-data", b"a" * 300),
)


_BY_DOOR: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "HTTP": ((*SEEDS, *list(SEEDS)[:2]), GETS, _ODD_PATHS),
    "OIP HTTP": (tuple(V2_SEEDS), V2_GETS, _ODD_V2_PATHS),
}
"""By door: paths that take a body, those that do not, and those that nobody serves."""


@st.composite
def http_inputs(draw: Draw, door: str = "HTTP") -> HttpInput:
    """Any request of any route of Lorary's own, or of /v2, that is one request."""
    posts, gets, strangers = _BY_DOOR[door]
    oddity = draw(
        st.sampled_from((*("none",) * 9, "method", "path", "header", "type", "body", "chunks"))
    )
    is_post = draw(st.sampled_from((True, True, True, False)))
    path = draw(st.sampled_from(posts if is_post else gets))
    method = "POST" if is_post else "GET"
    body = _body(draw, path) if is_post else b""
    if oddity == "method":
        method = draw(st.sampled_from(_METHODS))
    elif oddity == "path":
        path = draw(st.sampled_from(strangers))
    elif oddity == "body" and body:
        body = _damaged_body(draw, body)
    # Which method may have no body, or a path of its own, is HTTP's to say.
    is_odd = method in ("CONNECT", "get") or path in ("*", "http://x/y")
    kind = draw(st.sampled_from(_TYPES)) if oddity == "type" else b"application/json"
    lines = [f"{method} {path} HTTP/1.1".encode(), b"connection: close", b"content-type: " + kind]
    extra = draw(st.sampled_from(_HEADERS)) if oddity == "header" else b""
    if not extra.startswith(b"host:"):
        lines.append(b"host: 127.0.0.1")
    lines += [extra] if extra else []
    if oddity == "chunks":
        lines.append(b"transfer-encoding: chunked")
        middle = len(body) // 2
        sent = [b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:middle], body[middle:]) if p]
        parts = [*sent, b"0\r\n\r\n"]
    else:
        lines.append(b"content-length: %d" % len(body))
        parts = [body]
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    whole = (head + parts[0], *parts[1:])
    ends = draw(st.sampled_from((*("answered",) * 12, "reset")))
    what = f"{method} {path[:60]}"
    return HttpInput(what=what, parts=whole, is_whole=not is_odd, ends=ends, door=door)


_GOOD = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b'content-length: 36\r\n\r\n{"prompt": "the cat","max_tokens":2}'
)
_STARTS = (
    *(b"", b"GET / HTTP/1.1\r\n", b"GET", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 64),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
    *(b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/3.7\r\nhost: x\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n"),
    *(b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n", b"GET / HTTP/1.1\nhost: x\n\n", b"\r\n" * 500),
    *(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000, b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000),
    *(b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n"),
    *(b"GET / HTTP/1.1\r\nhost: x\r\nx\0y: z\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n folded\r\n\r\n"),
)  # fmt: skip
_SIZES = (
    b"100",
    b"10",
    b"-1",
    b"abc",
    b"9" * 30,
    b"36, 36",
    b"36\r\ncontent-length: 35",
    b"0",
    b"+36",
    b"\xb2",
)
_CHUNKED = (
    b"zz\r\n",
    b"-1\r\n",
    b"5\r\nab",
    b"ffffffffffffffff\r\n",
    b"1;x=" + b"y" * 70_000,
    b"0\r\nx: y\r\n\r\n",
)


@st.composite
def socket_inputs(draw: Draw) -> HttpInput:
    """Bytes on a socket of either door: no request, half of one, one whose length is wrong, or several."""
    how = draw(st.sampled_from(("start", "cut", "flip", "size", "chunks", "several", "random")))
    at = draw(st.integers(0, len(_GOOD) - 1))
    if how == "start":
        data = draw(st.sampled_from(_STARTS)) + draw(st.binary(max_size=60))
    elif how == "cut":
        data = _GOOD[:at]
    elif how == "flip":
        data = _GOOD[:at] + bytes([draw(st.integers(0, 255))]) + _GOOD[at + 1 :]
    elif how == "size":
        data = _GOOD.replace(b": 36", b": " + draw(st.sampled_from(_SIZES)), 1)
    elif how == "chunks":
        length = draw(st.sampled_from((b"transfer-encoding: chunked", b"transfer-encoding: chunked\r\ncontent-length: 36")))  # fmt: skip
        head = _GOOD.partition(b"\r\n\r\n")[0].replace(b"content-length: 36", length)
        data = head + b"\r\n\r\n" + draw(st.sampled_from(_CHUNKED))
        if draw(st.booleans()):  # answered before its body is there
            data = data.replace(b"/v1/completions", b"/nothing", 1)
    elif how == "several":
        data = _GOOD * draw(st.integers(2, 5)) + draw(st.binary(max_size=20))
    else:
        data = draw(st.binary(min_size=1, max_size=300))
    cut = draw(st.integers(0, len(data)))
    return HttpInput(
        what=f"socket, {how}",
        parts=(data[:cut], data[cut:]) if 0 < cut < len(data) else (data,),
        is_whole=False,
        ends=draw(st.sampled_from(("closed", "closed", "reset"))),
        port=draw(st.sampled_from(("http", "http", "grpc"))),
        door="sockets",
    )
