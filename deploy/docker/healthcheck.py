"""Exit 0 if the server at ADDRESS takes calls, else say why and exit 1.

Usage: python healthcheck.py [ADDRESS] (default 127.0.0.1:50051). Asks grpc.health.v1 for the service
that clients call, which is SERVING once the base is loaded and until the server drains.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "lorary.v1.Inference"
TIMEOUT_S = 3.0


def main(address: str = "127.0.0.1:50051") -> int:
    """Ask once; return the exit code."""
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}: {error.details()}\n")
            return 1
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        sys.stderr.write(f"{address}: {SERVICE} is {name}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
