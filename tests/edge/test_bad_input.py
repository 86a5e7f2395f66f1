"""Bad input, one row each: the status, the field's path, and a server that lives on."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2

from lorary.errors import InvalidRequest
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import CONTEXT, VOCAB, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.edge.fakes import Edge

NAN = math.nan
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge() -> AsyncIterator[Edge]:
    """One server for the whole table: it must survive every row."""
    async with serving() as running:
        yield running


def trailing(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    metadata: Any = error.trailing_metadata()
    return dict(metadata)


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details of an error, by message name."""
    raw = trailing(error)["grpc-status-details-bin"]
    found = {}
    for packed in status_pb2.Status.FromString(raw).details:
        name = packed.TypeName().rsplit(".", 1)[-1]
        message = getattr(error_details_pb2, name)()
        packed.Unpack(message)
        found[name] = message
    return found


async def generate_error(edge: Edge, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in edge.inference.Generate(request):
            pass
    return caught.value


SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "sampling.temperature"),
    ({"temperature": NAN}, "sampling.temperature"),
    ({"temperature": math.inf}, "sampling.temperature"),
    ({"temperature": 100.5}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_p": 1.01}, "sampling.top_p"),
    ({"top_p": NAN}, "sampling.top_p"),
    ({"min_p": -0.5}, "sampling.min_p"),
    ({"frequency_penalty": 2.5}, "sampling.frequency_penalty"),
    ({"presence_penalty": -2.5}, "sampling.presence_penalty"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ({"repetition_penalty": 2.5}, "sampling.repetition_penalty"),
    ({"max_tokens": 0}, "sampling.max_tokens"),
    ({"max_tokens": 2**31}, "sampling.max_tokens"),
    ({"max_tokens": CONTEXT - 1}, "sampling.max_tokens"),  # and a prompt of 2
    ({"min_tokens": 4, "max_tokens": 3}, "sampling.min_tokens"),
    ({"min_tokens": 1000}, "sampling.min_tokens"),
    ({"n": 0}, "sampling.n"),
    ({"n": 17}, "sampling.n"),
    ({"logprobs": 21}, "sampling.logprobs"),
    ({"prompt_logprobs": 21}, "sampling.prompt_logprobs"),
    ({"stop": ["x"] * 17}, "sampling.stop"),
    ({"stop": ["x", ""]}, "sampling.stop[1]"),
    ({"stop": ["x" * 257]}, "sampling.stop[0]"),
    ({"stop_token_ids": [1, VOCAB]}, "sampling.stop_token_ids[1]"),
    ({"stop_token_ids": [1] * 129}, "sampling.stop_token_ids"),
    ({"logit_bias": {VOCAB: 1.0}}, "sampling.logit_bias"),
    ({"logit_bias": {1: 100.5}}, "sampling.logit_bias"),
    ({"logit_bias": {1: NAN}}, "sampling.logit_bias"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias"),
    ({"regex": ""}, "sampling.regex"),
    ({"regex": "("}, "sampling.regex"),
    ({"lark": "x" * 65_537}, "sampling.lark"),
    ({"choice": pb.Choices()}, "sampling.choice"),
    ({"choice": pb.Choices(texts=["a", ""])}, "sampling.choice"),
    ({"json_schema": "{}", "min_tokens": 1}, "sampling.json_schema"),
    ({"json_schema": "{}", "ignore_eos": True}, "sampling.json_schema"),
]


@pytest.mark.parametrize(("fields", "path"), SAMPLING)
async def test_impossible_sampling_is_refused_by_its_path(
    edge: Edge, fields: dict[str, Any], path: str
) -> None:
    request = pb.GenerateRequest(input=pb.Input(prompt="2 5"), sampling=pb.SamplingParams(**fields))
    error = await generate_error(edge, request)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == path
    assert details(error)["ErrorInfo"].reason == "INVALID_REQUEST"
    assert not edge.engine.submitted


async def test_extreme_but_possible_sampling_is_taken(edge: Edge) -> None:
    sampling = pb.SamplingParams(
        temperature=100, top_p=1e-6, min_p=1, top_k=2**32 - 1, n=16, max_tokens=1, logprobs=20,
        frequency_penalty=-2, presence_penalty=2, repetition_penalty=2, seed=2**64 - 1,
        stop=["x" * 256] * 16,
    )  # fmt: skip
    request = pb.GenerateRequest(input=pb.Input(prompt="2 5"), sampling=sampling)
    events = [event async for event in edge.inference.Generate(request)]
    assert sum(event.HasField("complete") for event in events) == 16
    assert edge.engine.submitted[0].sampling.top_k == 0
    edge.engine.submitted.clear()


INPUTS: list[tuple[pb.Input, str]] = [
    (pb.Input(), "input"),
    (pb.Input(prompt=""), "input.prompt"),
    (pb.Input(text=""), "input.text"),
    (pb.Input(text="2"), "input.text"),  # the bare base has no template
    (pb.Input(prompt="1 " * CONTEXT), "input"),
    (pb.Input(prompt="1" * (CONTEXT * 32 + 1)), "input.prompt"),
    (pb.Input(token_ids=pb.TokenIds()), "input.token_ids.ids"),
    (pb.Input(token_ids=pb.TokenIds(ids=[0, 1, 2, VOCAB])), "input.token_ids.ids[3]"),
    (pb.Input(token_ids=pb.TokenIds(ids=[1] * CONTEXT)), "input"),
    (pb.Input(chat=pb.ChatMessages()), "input.chat.messages"),
    (
        pb.Input(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="")])),
        "input.chat.messages[0].content",
    ),
]


@pytest.mark.parametrize(("message", "path"), INPUTS)
async def test_bad_inputs_are_refused_by_their_path(
    edge: Edge, message: pb.Input, path: str
) -> None:
    error = await generate_error(edge, pb.GenerateRequest(input=message))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == path
    assert not edge.engine.submitted


REFS = [
    "../x",
    "/etc/passwd",
    "a\0b",
    "x" * 300,
    "sentim\u0435nt",
    "alpha.",
    "alpha@",
    "@prod",
    "A",
    "a/b/c",
]


@pytest.mark.parametrize("ref", REFS)
async def test_refs_that_are_none_are_invalid(edge: Edge, ref: str) -> None:
    error = await generate_error(edge, pb.GenerateRequest(adapter=ref, input=pb.Input(prompt="2")))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == "adapter"


async def test_an_unknown_adapter_is_not_found_and_leaves_no_trace(edge: Edge) -> None:
    error = await generate_error(
        edge, pb.GenerateRequest(adapter="nobody@3", input=pb.Input(prompt="2"))
    )
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert details(error)["ErrorInfo"].reason == "ADAPTER_NOT_FOUND"
    assert details(error)["ResourceInfo"].resource_type == "adapter"
    assert not edge.residency.leases
    names = {
        sample.labels.get("adapter")
        for m in edge.metrics.registry.collect()
        for sample in m.samples
    }
    assert "nobody" not in names


async def test_an_adapter_of_another_base_is_refused(edge: Edge) -> None:
    error = await generate_error(
        edge, pb.GenerateRequest(adapter="other-base", input=pb.Input(prompt="2"))
    )
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)["PreconditionFailure"].violations[0].type == "INCOMPATIBLE_ADAPTER"
    assert not edge.residency.leases


@pytest.mark.parametrize("request_id", ["x" * 129, "tab\t", "naïve", "two\nlines", " ", "end "])
async def test_request_ids_must_fit_metadata(edge: Edge, request_id: str) -> None:
    error = await generate_error(
        edge, pb.GenerateRequest(input=pb.Input(prompt="2"), request_id=request_id)
    )
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == "request_id"


@pytest.mark.parametrize("priority", [-11, 11, -(2**31), 2**31 - 1])
async def test_priorities_out_of_range_are_refused(edge: Edge, priority: int) -> None:
    generate = pb.GenerateRequest(input=pb.Input(prompt="2"), priority=priority)
    classify = pb.ClassifyRequest(input=pb.Input(prompt="2"), labels=["3"], priority=priority)
    errors = [await generate_error(edge, generate)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.inference.Classify(classify)
    for error in (*errors, caught.value):
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert details(error)["BadRequest"].field_violations[0].field == "priority"
        assert f"priority is {priority}" in str(error.details())
    assert not edge.engine.submitted


LABELS: list[tuple[str, list[str], str]] = [
    ("", [], "labels"),
    ("alpha", [], "labels"),
    ("", ["1", " "], "labels[1]"),
    ("", ["1", "2", "1"], "labels[2]"),
    ("", ["1", "01"], "labels[1]"),  # other text, same tokens
    ("", [str(i) for i in range(129)], "labels"),
]


@pytest.mark.parametrize(("adapter", "labels", "path"), LABELS)
async def test_bad_labels_are_refused_by_their_path(
    edge: Edge, adapter: str, labels: list[str], path: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.inference.Classify(
            pb.ClassifyRequest(adapter=adapter, input=pb.Input(prompt="2"), labels=labels)
        )
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)["BadRequest"].field_violations[0].field == path


async def test_a_message_over_the_limit_is_refused_and_the_server_lives(edge: Edge) -> None:
    request = pb.GenerateRequest(input=pb.Input(prompt="1 " * 2_500_000))
    error = await generate_error(edge, request)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await edge.inference.GetServerInfo(pb.GetServerInfoRequest())).base == "tiny"


async def test_oversized_metadata_is_refused_and_the_server_lives(edge: Edge) -> None:
    call = edge.inference.GetServerInfo(
        pb.GetServerInfoRequest(), metadata=(("x-big", "x" * 20_000),)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await edge.inference.GetServerInfo(pb.GetServerInfoRequest())).base == "tiny"


GARBAGE = b"\xff\xff\xff"


@pytest.mark.parametrize(
    "method",
    [
        "lorary.v1.Inference/Generate",
        "lorary.v1.Inference/Tokenize",
        "lorary.v1.Control/ListAdapters",
        "grpc.health.v1.Health/Check",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_bytes_that_are_no_message_are_bad_input_like_any_other(
    edge: Edge, method: str
) -> None:
    """Of a unary method, of one that streams answers, and of one that streams both ways."""

    async def sent() -> AsyncIterator[bytes]:
        yield GARBAGE

    bare: Any = edge.channel.stream_stream
    call = bare(f"/{method}")(sent())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)["BadRequest"].field_violations[0].field == "request"
    assert trailing(caught.value)["lorary-request-id"]
    labels = {"method": method.rpartition("/")[2], "code": "INVALID_ARGUMENT"}
    assert edge.metrics.registry.get_sample_value("lorary_requests_total", labels)


async def test_handlers_are_wrapped_once_and_not_for_every_call(edge: Edge) -> None:
    """What is wrapped anew anywhere within is wrapped anew by all that is around it."""

    async def answer(request: Any, context: Any) -> Any:
        return request

    handler = grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=pb.TokenizeRequest.FromString
    )

    async def found(_: grpc.HandlerCallDetails) -> Any:
        return handler

    find: Any = found
    for interceptor in reversed(edge.server._core.interceptors()):
        find = partial(interceptor.intercept_service, find)
    details: Any = SimpleNamespace(method="/lorary.v1.Inference/Tokenize")
    wrapped = await find(details)
    assert wrapped is not handler
    assert await find(details) is wrapped


async def test_what_an_error_quotes_fits_on_the_wire_in_any_script(edge: Edge) -> None:
    """A status' text takes three bytes for one beyond ASCII, and peers cap all of an end at 8 KiB."""
    edge.registry.broken = InvalidRequest("begin" + "\U0001f600" * 5000 + "end", field="adapter")
    try:
        request = pb.GenerateRequest(adapter="unheard-of", input=pb.Input(prompt="2"))
        error = await generate_error(edge, request)
    finally:
        edge.registry.broken = None
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    said = details(error)["BadRequest"].field_violations[0].description
    assert said == error.details()
    assert said.startswith("begin\U0001f600")
    assert said.endswith("\U0001f600end")
