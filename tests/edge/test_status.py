"""The error contract: every public error has a status and details, and nothing internal leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2

from lorary import errors
from lorary.errors import OUTCOMES, LoraryError, outcome, reason
from lorary.server import status
from lorary.v1 import inference_pb2 as pb
from tests.edge.test_bad_input import details, generate_error, trailing

if TYPE_CHECKING:
    from google.rpc import status_pb2

    from tests.edge.fakes import Edge


def every_error(root: type[LoraryError] = LoraryError) -> list[type[LoraryError]]:
    return [root, *(e for child in root.__subclasses__() for e in every_error(child))]


def unpacked(rich: status_pb2.Status) -> set[str]:
    return {packed.TypeName().rsplit(".", 1)[-1] for packed in rich.details}


@pytest.mark.parametrize("cls", every_error())
def test_every_public_error_has_a_status_and_details(cls: type[LoraryError]) -> None:
    assert cls in OUTCOMES
    rich = status.to_status(cls("what — why — what to do"))
    assert rich.code == grpc.StatusCode[outcome(cls("x")).grpc_status].value[0] != 0
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason(cls), "lorary")


def test_no_two_errors_share_a_reason() -> None:
    reasons = [reason(cls) for cls in every_error()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (errors.InvalidRequest("x", field="a.b"), "BadRequest"),
        (errors.InvalidRef("x"), "BadRequest"),
        (errors.AdapterNotFound("x"), "ResourceInfo"),
        (errors.BaseNotFound("x"), "ResourceInfo"),
        (errors.NotFound("x"), "ResourceInfo"),
        (errors.IncompatibleAdapter("x"), "PreconditionFailure"),
        (errors.Overloaded("x"), "RetryInfo"),
        (errors.Unavailable("x"), "RetryInfo"),
    ],
)
def test_details_by_class(error: LoraryError, detail: str) -> None:
    assert unpacked(status.to_status(error)) == {"ErrorInfo", detail}


def test_retry_info_carries_the_estimate() -> None:
    rich = status.to_status(errors.Overloaded("x", retry_after_s=2.5))
    info = error_details_pb2.RetryInfo()
    assert rich.details[1].Unpack(info)
    assert info.retry_delay.ToTimedelta().total_seconds() == 2.5


def test_long_messages_are_cut_in_the_middle_and_fit_into_metadata() -> None:
    rich = status.to_status(errors.InvalidRequest("begin" + "é" * 10**6 + "end", field="f" * 10**6))
    assert rich.message.startswith("begin")
    assert rich.message.endswith("end")
    assert rich.ByteSize() < 6000


def test_folders_of_the_server_are_cut_out_but_not_what_the_caller_sent() -> None:
    text = "file '/var/lib/lorary/blobs/ab' is damaged"
    assert "/var" not in status.to_status(errors.CorruptArtifact(text)).message
    assert "'…/ab'" in status.to_status(errors.CorruptArtifact(text)).message
    assert "/etc/passwd" in status.to_status(errors.InvalidRef("'/etc/passwd' is no name")).message


PRIVATE: list[tuple[BaseException, grpc.StatusCode, str]] = [
    (RuntimeError("secret /srv/tenant-a"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    (KeyError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    (errors.StorageError("secret"), grpc.StatusCode.UNAVAILABLE, "STORAGE_ERROR"),
    (errors.EngineFailed("secret"), grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
]


@pytest.mark.parametrize(("raised", "code", "name"), PRIVATE)
async def test_what_is_not_for_callers_becomes_an_opaque_id_and_a_logged_cause(
    edge: Edge,
    caplog: pytest.LogCaptureFixture,
    raised: BaseException,
    code: grpc.StatusCode,
    name: str,
) -> None:
    edge.registry.broken = raised
    request = pb.GenerateRequest(adapter="alpha", input=pb.Input(prompt="2"))
    error = await generate_error(edge, request)
    assert error.code() == code
    assert "secret" not in repr(error)
    assert details(error)["ErrorInfo"].reason == name
    error_id = details(error)["RequestInfo"].request_id
    assert error_id in (error.details() or "")
    logged = [record for record in caplog.records if error_id in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info is not None
    assert "secret" in str(logged[0].exc_info[1])


async def test_unary_calls_have_the_same_catch_all(edge: Edge) -> None:
    edge.registry.broken = RuntimeError("secret")
    calls: list[Any] = [
        edge.inference.Tokenize(pb.TokenizeRequest(adapter="alpha", input=pb.Input(prompt="2"))),
        edge.inference.Classify(pb.ClassifyRequest(adapter="alpha", input=pb.Input(prompt="2"))),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in repr(caught.value)


async def test_an_error_keeps_the_request_id_in_the_trailing_metadata(edge: Edge) -> None:
    request = pb.GenerateRequest(adapter="nobody", input=pb.Input(prompt="2"), request_id="mine")
    error = await generate_error(edge, request)
    assert trailing(error)["lorary-request-id"] == "mine"
