"""What a client calls: the stubs of both services, with what every call brings along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.client.affinity import with_affinity
from lorary.client.tracing import with_trace
from lorary.v1 import control_pb2_grpc, inference_pb2_grpc

if TYPE_CHECKING:
    import grpc

    from lorary.client.credentials import Credentials


def stubs(
    channel: grpc.Channel | grpc.aio.Channel, credentials: Credentials, affinity: int
) -> tuple[Any, Any]:
    """Return the stubs of the inference and the control service.

    Every call has the caller's trace, the adapter that it is about where ``affinity`` is not 0, and the
    credentials' token in its metadata.
    """
    # The generated stubs are typed for channels of one kind.
    services: tuple[Any, ...] = (inference_pb2_grpc.InferenceStub, control_pb2_grpc.ControlStub)
    inference, control = (
        credentials.bound(with_affinity(with_trace(service(channel)), affinity))
        for service in services
    )
    return inference, control
