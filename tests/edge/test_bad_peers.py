"""Peers that misbehave without a wrong word: they stop reading, send half of it, or live in another time."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from lorary.client import AsyncClient, channel
from lorary.errors import DeadlineExceeded, Unavailable
from lorary.server import app
from lorary.server.http import connection, listener
from lorary.server.interceptors import ErrorInterceptor
from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc
from tests.edge.black_hole import BlackHole
from tests.edge.fakes import eventually, serving

if TYPE_CHECKING:
    from tests.edge.fakes import Edge

WORDY: dict[str, Any] = {"max_tokens": 60, "n": 16, "logprobs": 20}
"""16 answers of which each token is told with 20 others: far more than buffers hold."""


def wordy() -> pb.GenerateRequest:
    sampling = pb.SamplingParams(**WORDY)
    return pb.GenerateRequest(adapter="alpha", input=pb.Input(prompt="2 5"), sampling=sampling)


def http_address(edge: Edge) -> tuple[str, int]:
    return "127.0.0.1", int(edge.http.rpartition(":")[2])


def completion(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def is_given_back(edge: Edge) -> None:
    """Wait until the only call's place is free, and then its hold on the adapter; others go on."""
    await eventually(lambda: edge.calls.num_in_flight == 0, 30)
    edge.engine.gate.set()
    await eventually(lambda: edge.residency.num_held == 0)
    await answers_others(edge)


def counted(edge: Edge, method: str, code: str) -> float:
    labels = {"method": method, "code": code}
    return edge.metrics.registry.get_sample_value("lorary_requests_total", labels) or 0.0


async def answers_others(edge: Edge) -> None:
    request = pb.GenerateRequest(
        adapter="beta", input=pb.Input(prompt="2 5"), sampling=pb.SamplingParams(max_tokens=3)
    )
    # Not by a deadline of the call's: this client reckons it by a clock that a test may turn.
    async with asyncio.timeout(30):
        events = [event async for event in edge.inference.Generate(request)]
    assert events[-1].complete.text == "8 11 14 "


async def test_a_stream_that_is_not_read_ends_and_gives_its_place_back() -> None:
    """S15, over gRPC: windows that do not grow are full at 64 KiB."""
    # A busy machine may be longer than that at what has to happen while the stream is waited for.
    for stall_s in (2.0, 20.0):
        if await stalled(stall_s):
            return
    pytest.fail("nobody was waited for")


async def stalled(stall_s: float) -> bool:
    """Let a stream stall; whether it was seen waiting before its time was up."""
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14))
    async with serving(stall_timeout=stall_s) as edge:
        channel = grpc.aio.insecure_channel(edge.address, options=options)
        async with channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            began_s = time.monotonic()
            unread = stub.Generate(wordy())
            await unread.read()
            await answers_others(edge)
            await eventually(lambda: edge.residency.num_held == 0)
            is_waiting = edge.calls.num_in_flight == 1
            assert is_waiting or time.monotonic() - began_s >= stall_s
            await eventually(lambda: edge.calls.num_in_flight == 0, stall_s + 30)
            assert counted(edge, "Generate", "CANCELLED") == 1
            await answers_others(edge)
    return is_waiting


async def test_a_stream_over_http_that_is_not_read_is_cut() -> None:
    """S15: the system cuts what takes nothing, so nothing waits for ever."""
    body = json.dumps({"model": "alpha", "prompt": ["2 5"] * 8, **WORDY, "stream": True}).encode()
    async with serving(http_port=0, stall_timeout=0.5, limit=64) as edge:
        edge.engine.gate.clear()
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(http_address(edge))
            peer.sendall(completion(body))
            await eventually(lambda: edge.calls.num_in_flight == 8)
            edge.engine.gate.set()
            await answers_others(edge)
            await eventually(lambda: edge.calls.num_in_flight == 0)
            await eventually(lambda: counted(edge, "Completions", "CANCELLED") == 1)


@pytest.mark.parametrize("is_answering", [False, True], ids=["waiting", "answering"])
async def test_a_peer_that_is_gone_without_a_word_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch, is_answering: bool
) -> None:
    """S16, over gRPC."""
    monkeypatch.setattr(app, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(app, "PING_TIMEOUT_MS", 500)
    async with serving() as edge, BlackHole.before(edge.address) as hole:
        edge.engine.gate.clear()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{hole.port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(wordy())
            reading = asyncio.ensure_future(call.read())
            await eventually(lambda: edge.calls.num_in_flight == 1)
            hole.swallow()
            if is_answering:
                edge.engine.gate.set()
            # Far less than the minute that gRPC's core waits for a ping of its own accord.
            await is_given_back(edge)
            reading.cancel()


async def test_a_peer_over_http_that_is_gone_without_a_word_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S16: nothing is written to it, so only the system can find out."""
    monkeypatch.setattr(listener, "PROBED_AFTER_S", 1)
    monkeypatch.setattr(listener, "PROBED_EVERY_S", 1)
    body = json.dumps({"model": "alpha", "prompt": "2 5"}).encode()
    async with serving(http_port=0, stall_timeout=1.0) as edge:
        edge.engine.gate.clear()
        host, port = http_address(edge)
        async with BlackHole.before(f"{host}:{port}") as hole:
            _, writer = await asyncio.open_connection("127.0.0.1", hole.port)
            writer.write(completion(body))
            await eventually(lambda: edge.calls.num_in_flight == 1)
            hole.swallow()
            await is_given_back(edge)
            writer.close()


async def test_a_server_that_is_gone_without_a_word_fails_its_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S16, seen by a client: what it waits for ends, and is not waited for until the call's deadline."""
    monkeypatch.setattr(channel, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(channel, "PING_TIMEOUT_MS", 500)
    async with serving() as edge, BlackHole.before(edge.address) as hole:
        edge.engine.gate.clear()
        async with AsyncClient(f"127.0.0.1:{hole.port}") as client:
            waiting = asyncio.ensure_future(client.generate("2 5", adapter="alpha"))
            await eventually(lambda: edge.calls.num_in_flight == 1)
            hole.swallow()
            with pytest.raises(Unavailable):
                await asyncio.wait_for(waiting, 60)
        edge.engine.gate.set()


HALVES = [
    b"",
    b"GET /v1/models HTTP/1.1\r\nhost",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET ",
]


@pytest.mark.parametrize("half", HALVES)
async def test_half_a_request_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    """Nor does one more byte, now and then, buy more time."""
    monkeypatch.setattr(connection, "REQUEST_S", 0.4)
    async with serving(http_port=0) as edge:
        # Of a moment that the machine took for something else nothing can be said.
        for _ in range(20):
            waited_s, longest_s, answer = await half_sent(edge, half)
            assert waited_s > 0.3
            assert answer.startswith(b"HTTP/1.1 200") == half.startswith(b"GET /health")
            if longest_s < 0.3:
                break
        assert waited_s < 1.5
        listener: Any = edge.server._http
        await eventually(lambda: not listener._server.server_state.connections)


async def half_sent(edge: Edge, half: bytes) -> tuple[float, float, bytes]:
    """Send half a request, then a byte now and then.

    Returns how long the server waited, the longest time between two looks of ours, and what it said.
    """
    started_s = looked_s = time.monotonic()
    longest_s = 0.0
    reader, writer = await asyncio.open_connection(*http_address(edge))
    writer.write(half)
    answering = asyncio.ensure_future(read_to_the_end(reader))
    while not answering.done():
        await asyncio.wait({answering}, timeout=0.1)
        now_s = time.monotonic()
        longest_s, looked_s = max(longest_s, now_s - looked_s), now_s
        assert now_s < started_s + 30
        if half and not answering.done() and now_s < started_s + 2:
            writer.write(b"x")
    writer.close()
    return looked_s - started_s, longest_s, answering.result()


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes; bytes that the peer has not read when it hangs up break the connection."""
    found = b""
    with suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            found += piece
    return found


CHUNKED = b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_what_follows_an_answer_and_is_no_request_ends_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An answer that did not wait for its request's body: there is no second one to say 400 with."""
    async with serving(http_port=0) as edge:
        reader, writer = await asyncio.open_connection(*http_address(edge))
        writer.write(CHUNKED)
        assert (await reader.readline()).startswith(b"HTTP/1.1 404")
        writer.write(b"no size\r\n")
        await asyncio.wait_for(reader.read(), 30)
        writer.close()
        await answers_others(edge)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_body_that_spoils_its_request_is_answered_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Head and body come together, so the application has the request and has not answered yet."""
    async with serving(http_port=0) as edge:
        reader, writer = await asyncio.open_connection(*http_address(edge))
        writer.write(CHUNKED + b"no size\r\n")
        answer = await asyncio.wait_for(reader.read(), 30)
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1") == 1
        writer.close()
        await answers_others(edge)
    assert not [record for record in caplog.records if record.exc_info]


class Gone:
    """The context of a call whose caller has gone: nothing can be sent any more."""

    def trailing_metadata(self) -> None:
        return None

    async def abort(self, *_: object, **__: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


@pytest.mark.parametrize(
    "raised", [grpc.aio.InternalError("Failed execute_batch"), Unavailable("draining")]
)
async def test_what_cannot_be_sent_is_no_fault_of_the_server(
    raised: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    context: Any = Gone()
    with pytest.raises(asyncio.CancelledError):
        async with ErrorInterceptor().around("/a/B", None, context):
            raise raised
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
async def test_a_clock_that_jumps_ends_nothing(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """S28: every limit is measured on a clock that does not jump."""
    edge.engine.gate.clear()
    call = edge.inference.Generate(wordy(), timeout=30)
    # gRPC tells a call's deadline by the clock that jumps, so it is read once, before the engine has the work.
    await eventually(lambda: len(edge.engine.submitted) == 16)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    edge.engine.gate.set()
    events = [event async for event in call]
    assert sum(event.HasField("complete") for event in events) == 16
    await answers_others(edge)


class Late:
    """A caller whose deadline has passed on the way."""

    def time_remaining(self) -> float:
        return -0.001

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: object, /) -> None:
        return None

    async def write(self, message: object, /) -> None:
        raise AssertionError("nothing is told to who is late")


async def test_a_deadline_that_has_passed_costs_no_step(edge: Edge) -> None:
    """S14."""
    with pytest.raises(DeadlineExceeded):
        await edge.server._core.inference.Generate(wordy(), Late())
    assert not edge.engine.submitted
    assert edge.residency.num_held == 0
