"""Exit 0 if the server at ADDRESS takes calls, else say why and exit 1.

Usage: python healthcheck.py [ADDRESS] (default 127.0.0.1:50051). Asks grpc.health.v1 for the service
that clients call, which is SERVING once the base is loaded and until the server drains. Speaks TLS
where LORARY_CA names the authority's file, to the name LORARY_TLS_NAME where the address is not in the
certificate, and shows LORARY_CERT and LORARY_KEY to a server that asks for a client certificate.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "lorary.v1.Inference"
TIMEOUT_S = 3.0


def main(address: str = "127.0.0.1:50051") -> int:
    """Ask once; return the exit code."""
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    with _channel(address) as channel:
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


def _channel(address: str) -> grpc.Channel:
    if "LORARY_CA" not in os.environ:
        return grpc.insecure_channel(address)
    ca, key, certificate = (
        Path(os.environ[name]).read_bytes() if os.environ.get(name) else None
        for name in ("LORARY_CA", "LORARY_KEY", "LORARY_CERT")
    )
    name = os.environ.get("LORARY_TLS_NAME")
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
