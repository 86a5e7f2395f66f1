"""How calls end early: cancel, deadline, refusal, failed load, drain, a broken engine.

Whatever the phase, afterwards no lease is held, no call is in flight, and the engine was told.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary.errors import CorruptArtifact, EngineFailed, Overloaded
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import eventually, serving
from tests.edge.test_bad_input import details, generate_error

if TYPE_CHECKING:
    from tests.edge.fakes import Edge


def request(adapter: str = "alpha", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        adapter=adapter, input=pb.Input(prompt="2 5"), sampling=pb.SamplingParams(**fields)
    )


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pass


async def all_is_given_back(edge: Edge) -> None:
    await eventually(lambda: edge.calls.num_in_flight == 0)
    await eventually(lambda: edge.residency.num_held == 0)
    await eventually(lambda: edge.engine.num_running + edge.engine.num_waiting == 0)


async def reach(edge: Edge, phase: str, call: Any) -> bool:
    """Bring a call into a phase: waiting for its adapter, for its first token, or streaming.

    Returns whether it came so far: its deadline may pass before.
    """
    if phase != "decode":
        await eventually(lambda: bool(edge.engine.submitted) or call.done())
        return not call.done()
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        return False
    return True


@pytest.mark.parametrize("phase", ["loading", "prefill", "decode"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
async def test_an_early_end_gives_everything_back(phase: str, how: str) -> None:
    # On a busy machine a deadline may pass before its call has come so far.
    for _ in range(20 if how == "deadline" else 1):
        async with serving() as edge:
            if await ends_early(edge, phase, how):
                return
    pytest.fail("no call came so far")


async def ends_early(edge: Edge, phase: str, how: str) -> bool:
    """End a call in a phase, and look at what it leaves; whether it came so far."""
    if phase == "loading":
        edge.residency.slow.add("alpha")
    if phase == "decode":
        edge.engine.hold_at(1)
    else:
        # Nor does the engine see for itself that a deadline has passed.
        edge.engine.gate.clear()
    channel = grpc.aio.insecure_channel(edge.address)
    generate = channel.unary_stream(
        "/lorary.v1.Inference/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    timeout = 0.5 if how == "deadline" else None
    call = generate(request(max_tokens=62, n=16), timeout=timeout)
    if not await reach(edge, phase, call):
        await channel.close(None)
        return False
    if how == "cancel":
        call.cancel()
    elif how == "disconnect":
        await channel.close(None)
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_the_end(call)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: edge.calls.num_in_flight == 0)
    edge.engine.gate.set()
    await all_is_given_back(edge)
    assert edge.engine.cancelled
    await channel.close(None)
    code = "DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED"
    labels = {"method": "Generate", "code": code}
    await eventually(
        lambda: edge.metrics.registry.get_sample_value("lorary_requests_total", labels) == 1
    )
    return True


async def test_the_deadline_reaches_the_engine(edge: Edge) -> None:
    before = time.monotonic()
    async for _ in edge.inference.Generate(request(max_tokens=1), timeout=30):
        pass
    deadline_s = edge.engine.submitted[0].deadline_s
    assert deadline_s is not None
    assert before + 29 < deadline_s < time.monotonic() + 31


async def test_a_refused_answer_of_several_takes_the_others_back(edge: Edge) -> None:
    edge.engine.refusal = Overloaded("the queue is full", retry_after_s=2.0)
    error = await generate_error(edge, request(n=4))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.seconds == 2
    await all_is_given_back(edge)


async def test_more_calls_than_the_server_takes_are_refused_before_any_work() -> None:
    async with serving(limit=2) as edge:
        edge.engine.gate.clear()
        calls = [edge.inference.Generate(request(max_tokens=1)) for _ in range(2)]
        await eventually(lambda: edge.calls.num_in_flight == 2)
        error = await generate_error(edge, request())
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(edge.residency.leases) == 2
        edge.engine.gate.set()
        for call in calls:
            assert [e async for e in call][-1].HasField("complete")


async def test_a_load_that_fails_ends_its_calls_and_no_others(edge: Edge) -> None:
    edge.residency.slow.add("alpha")
    waiting = edge.inference.Generate(request("alpha"))
    await eventually(lambda: bool(edge.engine.submitted))
    assert [e async for e in edge.inference.Generate(request("beta", max_tokens=1))]
    edge.residency.fail("alpha", CorruptArtifact("adapter 'alpha@1' is damaged."))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await waiting.read()
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    await all_is_given_back(edge)


async def test_a_load_that_arrives_lets_its_calls_run(edge: Edge) -> None:
    edge.residency.slow.add("alpha")
    waiting = edge.inference.Generate(request("alpha", max_tokens=2))
    await eventually(lambda: bool(edge.engine.submitted))
    edge.residency.arrive("alpha")
    assert [e async for e in waiting][-1].complete.text == "7 9 "


async def health_of(edge: Edge, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub
    answer = await stub(edge.channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def test_health_names_the_process_and_the_service(edge: Edge) -> None:
    assert await health_of(edge, "") == health_pb2.HealthCheckResponse.SERVING
    assert await health_of(edge, "lorary.v1.Inference") == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(edge, "nobody")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    stub: Any = health_pb2_grpc.HealthStub(edge.channel)
    listed = await stub.List(health_pb2.HealthListRequest())
    assert {"", "lorary.v1.Inference"} <= set(listed.statuses)


async def test_drain_lets_running_calls_end_and_refuses_new_ones() -> None:
    # A busy machine may be longer than the delay at what has to happen within it.
    for delay_s in (0.3, 3.0, 30.0):
        if await drained(delay_s):
            return
    pytest.fail("nobody came within the delay")


async def drained(delay_s: float) -> bool:
    """Drain a server that has a call; whether another one came within the delay."""
    async with serving(drain_delay=delay_s) as edge:
        edge.engine.gate.clear()
        running = edge.inference.Generate(request(max_tokens=3))
        await eventually(lambda: bool(edge.engine.submitted))
        stopping = asyncio.create_task(edge.server.serve_until_stopped())
        edge.server.request_stop()
        began_s = time.monotonic()
        # In the delay: not ready for balancers, still serving.
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        for _ in range(3000):
            if await health_of(edge, "lorary.v1.Inference") == not_serving:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("balancers are not told")
        late = edge.inference.Generate(request(max_tokens=1))
        await eventually(lambda: len(edge.engine.submitted) == 2 or late.done())
        is_served = len(edge.engine.submitted) == 2
        assert is_served or time.monotonic() - began_s >= delay_s, "refused within the delay"
        await eventually(lambda: edge.calls.is_refusing, delay_s + 30)
        error = await generate_error(edge, request())
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert details(error)["RetryInfo"].retry_delay.seconds == 0
        edge.engine.gate.set()
        assert [e async for e in running][-1].complete.text == "7 9 11 "
        if is_served:
            assert [e async for e in late][-1].complete.text == "7 "
        await asyncio.wait_for(stopping, 30)
        assert not edge.server.was_hurried
    return is_served


async def test_calls_that_outlast_the_drain_end_with_unavailable() -> None:
    async with serving(drain_timeout=0.1) as edge:
        edge.engine.gate.clear()
        running = edge.inference.Generate(request())
        await eventually(lambda: bool(edge.engine.submitted))
        edge.server.request_stop()
        stopping = asyncio.create_task(edge.server.serve_until_stopped())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.read()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert details(caught.value)["ErrorInfo"].reason == "UNAVAILABLE"
        edge.engine.gate.set()
        await asyncio.wait_for(stopping, 30)
        await all_is_given_back(edge)


async def test_a_second_request_to_stop_cuts_the_drain_short() -> None:
    async with serving(drain_delay=60, drain_timeout=60) as edge:
        edge.engine.gate.clear()
        running = edge.inference.Generate(request())
        await eventually(lambda: bool(edge.engine.submitted))
        stopping = asyncio.create_task(edge.server.serve_until_stopped())
        edge.server.request_stop()
        await asyncio.sleep(0.1)
        edge.server.request_stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await running.read()
        edge.engine.gate.set()
        await asyncio.wait_for(stopping, 30)
        assert edge.server.was_hurried


async def test_a_broken_engine_ends_every_call_and_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as edge:
        stopping = asyncio.create_task(edge.server.serve_until_stopped())
        edge.engine.gate.clear()
        running = edge.inference.Generate(request())
        await eventually(lambda: bool(edge.engine.submitted))
        edge.engine.bomb = ZeroDivisionError("in a kernel")
        edge.engine.gate.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.read()
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        with pytest.raises(EngineFailed, match="ZeroDivisionError"):
            await asyncio.wait_for(stopping, 30)
        assert edge.metrics.registry.get_sample_value("lorary_engine_up") == 0
