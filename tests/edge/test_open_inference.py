"""The Open Inference Protocol over gRPC and HTTP, with answers worked out in ``fakes``."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import grpc
import httpx2 as httpx
import pytest
import pytest_asyncio

from lorary.errors import InvalidRequest
from lorary.oip import open_inference_pb2 as oip
from lorary.oip import open_inference_pb2_grpc
from lorary.server.access.tokens import token_hash
from lorary.server.open_inference.tensors import read_texts
from tests.edge.fakes import FINGERPRINT, FakeRegistry, digest_of, serving
from tests.edge.test_bad_input import details

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.edge.fakes import Edge

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Names as published; a field's number is its place, from 1 on. Every client has them compiled in.
FIELDS = {
    "ServerLiveResponse": "live",
    "ServerReadyResponse": "ready",
    "ModelReadyRequest": "name version",
    "ModelReadyResponse": "ready",
    "ServerMetadataResponse": "name version extensions",
    "ModelMetadataRequest": "name version",
    "ModelMetadataResponse": "name versions platform inputs outputs",
    "ModelMetadataResponse.TensorMetadata": "name datatype shape",
    "ModelInferRequest": "model_name model_version id parameters inputs outputs raw_input_contents",
    "ModelInferRequest.InferInputTensor": "name datatype shape parameters contents",
    "ModelInferRequest.InferRequestedOutputTensor": "name parameters",
    "ModelInferResponse": "model_name model_version id parameters outputs raw_output_contents",
    "ModelInferResponse.InferOutputTensor": "name datatype shape parameters contents",
    "InferParameter": "bool_param int64_param string_param double_param uint64_param",
    "InferTensorContents": "bool_contents int_contents int64_contents uint_contents uint64_contents "
    "fp32_contents fp64_contents bytes_contents",
}
CALLS = "ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelInfer"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge() -> AsyncIterator[Edge]:
    async with serving(open_inference=True, http_port=0) as running:
        yield running


@pytest.fixture
def stub(edge: Edge) -> Any:
    return stub_of(edge)


@pytest_asyncio.fixture(loop_scope="module")
async def http(edge: Edge) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=edge.http, timeout=10) as opened:
        yield opened


def stub_of(edge: Edge) -> Any:
    kind: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub
    return kind(edge.channel)


def asking(
    model: str, *texts: str, version: str = "", outputs: tuple[str, ...] = (), **parameters: Any
) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model, model_version=version)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
    tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    for name in outputs:
        request.outputs.add(name=name)
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def raw_texts(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text.encode() for text in texts)


async def test_names_and_numbers_are_the_published_ones() -> None:
    (service,) = oip.DESCRIPTOR.services_by_name.values()
    assert service.full_name == "inference.GRPCInferenceService"
    assert [method.name for method in service.methods] == CALLS.split()
    for path, names in FIELDS.items():
        message, *nested = path.split(".")
        found = oip.DESCRIPTOR.message_types_by_name[message]
        for name in nested:
            found = found.nested_types_by_name[name]
        numbered = {name: number for number, name in enumerate(names.split(), 1)}
        assert {field.name: field.number for field in found.fields} == numbered, path


async def test_server_and_models_tell_what_they_are(edge: Edge, stub: Any) -> None:
    assert (await stub.ServerLive(oip.ServerLiveRequest())).live
    assert (await stub.ServerReady(oip.ServerReadyRequest())).ready
    server = await stub.ServerMetadata(oip.ServerMetadataRequest())
    assert (server.name, server.version) == ("lorary", "0.0")
    for name, version in (("beta", ""), ("beta", "1"), ("beta@prod", ""), ("tiny", "")):
        assert (await stub.ModelReady(oip.ModelReadyRequest(name=name, version=version))).ready
    found = await stub.ModelMetadata(oip.ModelMetadataRequest(name="beta"))
    assert (list(found.versions), found.platform) == (["1"], "lorary")
    assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs] == [
        ("text_input", "BYTES", [-1])
    ]
    assert {one.name: list(one.shape) for one in found.outputs}["embedding"] == [-1, 4]
    edge.residency.refused[digest_of("beta")] = ValueError("damaged")  # type: ignore[assignment]
    try:
        assert not (await stub.ModelReady(oip.ModelReadyRequest(name="beta"))).ready
    finally:
        edge.residency.refused.clear()


async def test_texts_are_answered_with_their_receipt(edge: Edge, stub: Any) -> None:
    """Prompts [2, 5] and [7] under beta, whose tokens go up by three."""
    request = asking("beta", "2 5", "7", version="1", max_tokens=2, temperature=0, stop="99")
    request.id = "mine"
    call = stub.ModelInfer(request)
    found = await call
    outputs = {one.name: one for one in found.outputs}
    assert list(outputs["text_output"].contents.bytes_contents) == [b"8 11 ", b"10 13 "]
    assert list(outputs["finish_reason"].contents.bytes_contents) == [b"length"] * 2
    assert list(outputs["completion_tokens"].contents.int64_contents) == [2, 2]
    assert [list(one.shape) for one in found.outputs] == [[2]] * 3
    assert (found.model_name, found.model_version, found.id) == ("beta", "1", "mine")
    assert found.parameters["lorary_digest"].string_param == digest_of("beta")
    assert found.parameters["lorary_base_fingerprint"].string_param == FINGERPRINT
    assert dict(await call.trailing_metadata())["lorary-adapter-digest"] == digest_of("beta")
    sampling = edge.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.stop) == (0.0, ("99",))


async def test_a_shape_has_up_to_eight_dimensions(stub: Any) -> None:
    request = asking("tiny", "2 5", max_tokens=1)
    request.inputs[0].shape[:] = [1] * 8
    found = await stub.ModelInfer(request)
    assert [list(one.shape) for one in found.outputs] == [[1] * 8] * 3


async def test_shapes_are_not_multiplied_before_they_are_known_to_be_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """400,000 dimensions of 62 bits fit into one message; their product would hold up every caller for minutes."""
    multiplied: list[int] = []
    prod = math.prod

    def noted(shape: list[int]) -> int:
        multiplied.append(len(shape))
        return prod(shape)

    monkeypatch.setattr(math, "prod", noted)
    with pytest.raises(InvalidRequest, match="has 400000 dimensions; at most 8"):
        read_texts(broken(shape=[2**62] * 400_000), most=128)
    read_texts(broken(shape=[1, 1]), most=128)
    assert multiplied == [2]


async def test_metadata_of_a_name_reads_that_name_alone() -> None:
    """A registry has thousands of others, and a Hub is asked for each."""
    registry = FakeRegistry()
    async with serving(open_inference=True, registry=registry) as edge:
        known = len(registry.listed)
        stub = stub_of(edge)
        found = await stub.ModelMetadata(oip.ModelMetadataRequest(name="beta@prod"))
        assert list(found.versions) == ["1"]
        found = await stub.ModelMetadata(oip.ModelMetadataRequest(name="alpha", version="1"))
        assert list(found.versions) == ["1"]
        found = await stub.ModelMetadata(oip.ModelMetadataRequest(name="tiny"))
        assert list(found.versions) == []
        assert registry.listed[known:] == ["beta", "alpha"]


async def test_raw_texts_are_answered_raw(stub: Any) -> None:
    request = asking("tiny", max_tokens=1, outputs=("completion_tokens", "text_output"))
    request.inputs[0].shape[:] = [2, 1]
    request.raw_input_contents.append(raw_texts("2 5", "7"))
    found = await stub.ModelInfer(request)
    assert list(found.raw_output_contents) == [struct.pack("<2q", 1, 1), raw_texts("6 ", "8 ")]
    assert [list(one.shape) for one in found.outputs] == [[2, 1]] * 2
    assert not any(one.HasField("contents") for one in found.outputs)
    assert found.model_version == ""


async def test_labels_and_vectors_are_asked_for_by_their_outputs(edge: Edge, stub: Any) -> None:
    found = await stub.ModelInfer(
        asking("beta", "2 5", outputs=("probability", "label"), use_template=True)
    )
    assert edge.engine.submitted[-1].prompt_ids == [100, 2, 5]
    assert list(found.outputs[1].contents.bytes_contents) == [b"8"]
    assert found.outputs[0].contents.fp32_contents[0] == pytest.approx(1 / (1 + 2.718281828**-2))
    found = await stub.ModelInfer(
        asking("alpha", "7 3", "5", outputs=("embedding",), pooling="last", dimensions=2)
    )
    assert list(found.outputs[0].contents.fp32_contents) == [3.0, 4.0, 5.0, 4.0]
    assert list(found.outputs[0].shape) == [2, 2]


def broken(**changes: Any) -> oip.ModelInferRequest:
    """A good call with one thing changed: in its only tensor, or its raw contents."""
    request = asking("beta", "2 5")
    raw = changes.pop("raw", None)
    if raw is not None:
        request.raw_input_contents.extend(raw)
    tensor = request.inputs[0]
    for name, value in changes.items():
        if name == "shape":
            tensor.shape[:] = value
        elif name == "contents":
            tensor.contents.CopyFrom(value)
        else:
            setattr(tensor, name, value)
    return request


FAULTS: dict[str, tuple[oip.ModelInferRequest, str]] = {
    "no input": (oip.ModelInferRequest(model_name="beta"), "inputs"),
    "unknown input": (broken(name="image"), "inputs"),
    "datatype": (broken(datatype="FP32"), "inputs[0].datatype"),
    "other contents": (
        broken(contents=oip.InferTensorContents(int_contents=[2, 5])),
        "inputs[0].contents.int_contents",
    ),
    "shape": (broken(shape=[2]), "inputs[0].shape"),
    "no shape": (broken(shape=[]), "inputs[0].shape"),
    "negative shape": (broken(shape=[-1, -1]), "inputs[0].shape"),
    "huge shape": (broken(shape=[2**62, 2**62]), "inputs[0].shape"),
    "many dimensions": (broken(shape=[1] * 9), "inputs[0].shape"),
    "both contents": (broken(raw=[raw_texts("2")]), "raw_input_contents"),
    "cut raw": (
        broken(contents=oip.InferTensorContents(), raw=[raw_texts("2 5")[:-1]]),
        "raw_input_contents",
    ),
    # What is beyond the shape is not read: a million empty elements would hold everybody up.
    "much raw": (
        broken(contents=oip.InferTensorContents(), raw=[raw_texts("2", "5") + b"\1"]),
        "inputs[0].shape",
    ),
    "short raw": (broken(contents=oip.InferTensorContents(), raw=[b"\1\0"]), "raw_input_contents"),
    "not UTF-8": (
        broken(contents=oip.InferTensorContents(bytes_contents=[b"\xff"])),
        "inputs[0].contents.bytes_contents[0]",
    ),
    "empty text": (asking("beta", ""), "inputs[0]"),
    "long text": (asking("beta", "5 " * 64), "inputs[0]"),
    "unknown output": (asking("beta", "2", outputs=("logits",)), "outputs[0].name"),
    "mixed outputs": (asking("beta", "2", outputs=("label", "embedding")), "outputs"),
    "twice": (asking("beta", "2", outputs=("label", "label")), "outputs[1]"),
    "unknown parameter": (asking("beta", "2", max_token=4), "parameters.max_token"),
    "kind of another": (asking("beta", "2", outputs=("label",), seed=1), "parameters.seed"),
    "type": (asking("beta", "2", max_tokens="4"), "parameters.max_tokens"),
    "boolean number": (asking("beta", "2", temperature=True), "parameters.temperature"),
    "out of the field": (asking("beta", "2", max_tokens=-1), "parameters.max_tokens"),
    "out of range": (asking("beta", "2", top_p=1.5), "parameters.top_p"),
    "too many": (asking("beta", "2", max_tokens=65), "parameters.max_tokens"),
    "pooling": (asking("beta", "2", outputs=("embedding",), pooling="cls"), "parameters.pooling"),
    "dimensions": (
        asking("beta", "2", outputs=("embedding",), dimensions=5),
        "parameters.dimensions",
    ),
    "no labels": (asking("alpha", "2", outputs=("label",)), "outputs"),
    "two versions": (asking("beta@prod", "2", version="1"), "model_version"),
    "base's version": (asking("tiny", "2", version="1"), "model_version"),
    "id": (oip.ModelInferRequest(id="\n", inputs=asking("", "2").inputs), "id"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_cannot_be_answered_is_refused_by_its_field(stub: Any, fault: str) -> None:
    request, field = FAULTS[fault]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ModelInfer(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, refused.value.details()
    assert details(refused.value)["BadRequest"].field_violations[0].field == field


async def test_unknown_models_are_not_found(stub: Any) -> None:
    for call in (
        stub.ModelReady(oip.ModelReadyRequest(name="nobody")),
        stub.ModelMetadata(oip.ModelMetadataRequest(name="beta", version="7")),
        stub.ModelInfer(asking("nobody", "2")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


TEXT: dict[str, Any] = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["5"]}


async def test_http_says_the_same(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v2/health/live")).json() == {"live": True}
    assert (await http.get("/v2/health/ready")).json() == {"ready": True}
    assert (await http.get("/v2")).json()["name"] == "lorary"
    ready = await http.get("/v2/models/beta/versions/1/ready")
    assert (ready.status_code, ready.json()) == (200, {"name": "beta", "ready": True})
    assert (await http.get("/v2/models/beta@prod")).json()["versions"] == ["1"]
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "data": [["2 5"], ["7"]]}
    body = {"id": "mine", "inputs": [tensor], "parameters": {"max_tokens": 1, "temperature": 0.0}}
    answer = (await http.post("/v2/models/beta/infer", json=body)).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("beta", "1", "mine")
    wanted = {"name": "text_output", "datatype": "BYTES", "shape": [2, 1], "data": ["8 ", "10 "]}
    assert answer["outputs"][0] == wanted
    assert answer["parameters"]["lorary_digest"] == digest_of("beta")
    body = {"inputs": [tensor], "outputs": [{"name": "embedding"}]}
    answer = (await http.post("/v2/models/beta/versions/1/infer", json=body)).json()
    assert answer["outputs"][0]["data"] == [3.5, 5.0, 0.0, 4.0, 7.0, 5.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("nobody/infer", {"inputs": []}, 400),
        ("beta/infer", {"inputs": [{"name": "text_input", "data": [1]}]}, 400),
        ("beta/infer", {"inputs": [{"name": "text_input", "shape": [2**70]}]}, 400),
        ("beta/infer", {"inputs": [], "parameters": {"max_tokens": [1]}}, 400),
        ("beta/infer", {"input": []}, 400),
        # No header may end with a space, and the id of an answer is one.
        ("beta/infer", {"id": " ", "inputs": [TEXT]}, 400),
        ("beta/versions/8/infer", "text", 404),
    ],
)
async def test_http_errors_are_a_text(
    http: httpx.AsyncClient, path: str, body: Any, status: int
) -> None:
    if body == "text":
        body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": "5"}]}
    answer = await http.post(f"/v2/models/{path}", json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert isinstance(answer.json()["error"], str)


async def test_tenants_hold_for_this_door_and_health_is_open(tmp_path: Path) -> None:
    token = f"lry_globex-{'x' * 40}"
    access = tmp_path / "tenants.yaml"
    tenant = f'{{tokens: ["{token_hash(token)}"], adapters: ["be*"]}}'
    access.write_text(f"tenants: {{globex: {tenant}}}")
    async with serving(open_inference=True, access=access) as edge:
        stub = stub_of(edge)
        assert (await stub.ServerLive(oip.ServerLiveRequest())).live
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(asking("beta", "2"))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {token}"),)
        found = await stub.ModelInfer(asking("beta", "2", max_tokens=1), metadata=metadata)
        assert found.outputs[0].contents.bytes_contents[0] == b"5 "
        with pytest.raises(grpc.aio.AioRpcError) as hidden:
            await stub.ModelReady(oip.ModelReadyRequest(name="alpha"), metadata=metadata)
        assert hidden.value.code() == grpc.StatusCode.NOT_FOUND


async def test_without_the_switch_there_is_no_such_service() -> None:
    async with serving() as edge:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub_of(edge).ServerLive(oip.ServerLiveRequest())
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
