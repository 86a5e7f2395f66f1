"""The images' health check against a real health service."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.deploy.files import DEPLOY
from tests.edge.certificates import issue, make_authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the check; again where its three seconds were not enough for this process to answer."""
    for _ in range(20):
        done = subprocess.run(
            [sys.executable, str(DEPLOY / "docker/healthcheck.py"), address],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, **environment},
        )
        if "DEADLINE_EXCEEDED" not in done.stderr:
            break
    return done


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    servicer = health.HealthServicer()
    running = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}", servicer
    running.stop(None).wait()


def test_healthcheck_follows_the_server(server: tuple[str, health.HealthServicer]) -> None:
    address, servicer = server
    starting = check(address)
    assert (starting.returncode, "NOT_FOUND" in starting.stderr) == (1, True)

    servicer.set("lorary.v1.Inference", health_pb2.HealthCheckResponse.SERVING)
    assert check(address).returncode == 0

    servicer.enter_graceful_shutdown()
    draining = check(address)
    assert (draining.returncode, "NOT_SERVING" in draining.stderr) == (1, True)


def test_healthcheck_fails_where_nobody_listens() -> None:
    done = check("127.0.0.1:1")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr


def test_healthcheck_speaks_tls_to_the_name_in_the_certificate(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    pair = issue(tmp_path, authority, "server", "DNS:lorary.example")
    servicer = health.HealthServicer()
    servicer.set("lorary.v1.Inference", health_pb2.HealthCheckResponse.SERVING)
    running = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, running)
    credentials = grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())]
    )
    port = running.add_secure_port("127.0.0.1:0", credentials)
    running.start()
    try:
        address, ca = f"127.0.0.1:{port}", str(authority.certificate)
        assert check(address, LORARY_CA=ca, LORARY_TLS_NAME="lorary.example").returncode == 0
        assert check(address, LORARY_CA=ca).returncode == 1
    finally:
        running.stop(None).wait()
