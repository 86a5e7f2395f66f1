"""The control plane, reflection, and connections."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorary.errors import ConfigError, CorruptArtifact
from lorary.server.adapters.probe_runs import Verdict
from lorary.server.app import check_ports_free
from lorary.server.config import ServerConfig
from lorary.v1 import control_pb2 as pb
from lorary.v1 import inference_pb2
from tests.edge.fakes import digest_of, eventually, serving
from tests.edge.test_bad_input import details

if TYPE_CHECKING:
    from tests.edge.fakes import Edge


async def test_list_load_unload(edge: Edge) -> None:
    listed = await edge.control.ListAdapters(pb.ListAdaptersRequest())
    assert [a.name for a in listed.adapters] == ["alpha", "beta", "other-base"]
    assert {a.residency for a in listed.adapters} == {pb.RESIDENCY_REGISTRY}
    assert listed.adapters[1].task == "classification"

    loaded = await edge.control.LoadAdapter(pb.LoadAdapterRequest(adapter="alpha", pin=True))
    assert loaded.adapter.residency == pb.RESIDENCY_RESIDENT
    assert loaded.adapter.pinned
    assert (loaded.adapter.digest, loaded.adapter.device_bytes) == (digest_of("alpha"), 4096)
    assert loaded.load_ns == 0  # the fake has it at once
    assert edge.residency.num_held == 0

    resident = await edge.control.ListAdapters(pb.ListAdaptersRequest(resident_only=True))
    assert [(a.name, list(a.aliases)) for a in resident.adapters] == [("alpha", ["prod"])]

    unloaded = await edge.control.UnloadAdapter(pb.UnloadAdapterRequest(adapter="alpha@1"))
    assert unloaded.adapter.residency == pb.RESIDENCY_REGISTRY
    assert (unloaded.adapter.name, unloaded.adapter.version) == ("alpha", 1)
    await edge.control.UnloadAdapter(pb.UnloadAdapterRequest(adapter="alpha"))


async def test_a_load_is_answered_when_it_arrives(edge: Edge) -> None:
    edge.residency.slow.add("alpha")
    call = edge.control.LoadAdapter(pb.LoadAdapterRequest(adapter="alpha"))
    await eventually(lambda: bool(edge.residency.leases))
    listed = await edge.control.ListAdapters(pb.ListAdaptersRequest(resident_only=True))
    assert listed.adapters[0].residency == pb.RESIDENCY_LOADING
    assert not call.done()
    edge.residency.arrive("alpha")
    assert (await call).load_ns > 0
    assert edge.residency.num_held == 0


async def test_what_came_of_the_probes_is_shown_and_a_load_tries_again(edge: Edge) -> None:
    """A quarantined version is refused in calls, listed among what is resident, and lifted by a load."""
    digest = digest_of("alpha")
    edge.residency.refused[digest] = CorruptArtifact("alpha is 3 nats off; it is quarantined.")
    edge.residency.verdicts[digest] = Verdict(
        state="failed", divergence=3.0, limit=0.02, num_probes=2
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in edge.inference.Generate(
            inference_pb2.GenerateRequest(adapter="alpha", input=inference_pb2.Input(prompt="2"))
        ):
            pass
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    listed = await edge.control.ListAdapters(pb.ListAdaptersRequest(resident_only=True))
    (alpha,) = listed.adapters
    assert (alpha.name, alpha.verified, alpha.quarantined) == ("alpha", "failed", True)
    assert (alpha.verified_divergence, alpha.verified_limit) == (3.0, 0.02)
    assert alpha.residency == pb.RESIDENCY_REGISTRY

    edge.residency.verdicts[digest] = Verdict(
        state="passed", divergence=0.01, limit=0.02, num_probes=2
    )
    loaded = await edge.control.LoadAdapter(pb.LoadAdapterRequest(adapter="alpha"))
    assert (loaded.adapter.verified, loaded.adapter.quarantined) == ("passed", False)


async def test_a_load_that_fails_or_is_given_up_holds_nothing(edge: Edge) -> None:
    edge.residency.slow.add("alpha")
    # On a busy machine the deadline may pass before anything has begun.
    for _ in range(20):
        given_up = edge.control.LoadAdapter(pb.LoadAdapterRequest(adapter="alpha"), timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await given_up
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if edge.residency.leases:
            break
    await eventually(lambda: bool(edge.residency.leases) and edge.residency.num_held == 0)
    failed = edge.control.LoadAdapter(pb.LoadAdapterRequest(adapter="alpha"))
    await eventually(lambda: edge.residency.num_held == 1)
    edge.residency.fail("alpha", CorruptArtifact("adapter 'alpha@1' is damaged"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await failed
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    await eventually(lambda: edge.residency.num_held == 0)


@pytest.mark.parametrize(
    ("adapter", "code"),
    [
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("../x", grpc.StatusCode.INVALID_ARGUMENT),
        ("nobody", grpc.StatusCode.NOT_FOUND),
        ("other-base", grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_control_refuses_as_inference_does(
    edge: Edge, adapter: str, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.control.LoadAdapter(pb.LoadAdapterRequest(adapter=adapter))
    assert caught.value.code() == code
    assert details(caught.value)["ErrorInfo"].domain == "lorary"


async def reflected(edge: Edge) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub
    call = stub(edge.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    return {s.name async for answer in call for s in answer.list_services_response.service}


async def test_reflection_lists_every_service_on_loopback(edge: Edge) -> None:
    names = {"lorary.v1.Inference", "lorary.v1.Control", "grpc.health.v1.Health"}
    assert names <= await reflected(edge)


async def test_reflection_can_be_switched_off() -> None:
    async with serving(reflection=False) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(edge)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_that_pings_each_second_on_a_silent_stream_is_kept(edge: Edge) -> None:
    """With gRPC's defaults the server cut such a client off after 3 s: "Too many pings".

    The option that is often copied for this is ignored by core, so only behaviour proves ours.
    """
    edge.engine.gate.clear()
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with grpc.aio.insecure_channel(edge.address, options=options) as channel:
        generate = channel.unary_stream(
            "/lorary.v1.Inference/Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        call = generate(
            inference_pb2.GenerateRequest(
                input=inference_pb2.Input(prompt="2"),
                sampling=inference_pb2.SamplingParams(max_tokens=1),
            )
        )
        await eventually(lambda: bool(edge.engine.submitted))
        await asyncio.sleep(5.0)
        edge.engine.gate.set()
        assert [event async for event in call][-1].complete.text == "3 "


@pytest.mark.parametrize("which", ["port", "metrics_port"])
async def test_a_port_in_use_is_a_configuration_error(edge: Edge, which: str) -> None:
    taken = edge.address if which == "port" else edge.metrics_url.removesuffix("/metrics")
    number = int(taken.rsplit(":", 1)[-1])
    ports: dict[str, Any] = {"port": 0, "metrics_port": 0, which: number}
    with pytest.raises(ConfigError, match=f"{number}.*in use"):
        check_ports_free(ServerConfig(base="tiny", registry="r", **ports))
    with pytest.raises(ConfigError, match=f"{number}.*in use"):
        async with serving(**ports):
            pass
