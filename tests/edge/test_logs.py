"""What the log says of a call whose answer cannot be sent."""

from __future__ import annotations

import logging
from typing import Any

import grpc.aio
import pytest

from lorary.server import logs
from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc

METHOD = "/lorary.v1.Inference/Tokenize"


class _Long(inference_pb2_grpc.InferenceServicer):
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(pieces=["x" * 10_000])


@pytest.fixture
async def record(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """Return what gRPC itself logs of an answer that it cannot send."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", 1000)])
    inference_pb2_grpc.add_InferenceServicer_to_server(_Long(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Tokenize(pb.TokenizeRequest())
    finally:
        await server.stop(None)
    (found,) = (r for r in caplog.records if r.exc_info and METHOD in r.getMessage())
    return found


@pytest.mark.parametrize("level", ["info", "warning"])
async def test_an_answer_that_could_not_be_sent_is_a_line_and_no_error(
    record: logging.LogRecord, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert record.levelno == logging.ERROR
    with caplog.at_level(level.upper(), logger="lorary"):
        assert logs._Unsent().filter(record) is (level == "info")
    told = logs._Human().format(record)
    assert METHOD in told
    assert "INFO" in told
    assert "\n" not in told


def test_other_errors_stay_what_they_are() -> None:
    error = ValueError("of a handler")
    record = logging.makeLogRecord(
        {"name": "grpc._cython.cygrpc", "levelno": logging.ERROR, "msg": "Unexpected [%s]"}
        | {"args": ("x",), "exc_info": (ValueError, error, None)}
    )
    assert logs._Unsent().filter(record)
    assert record.levelno == logging.ERROR
    assert record.exc_info
