"""The images' health check against a real health service."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.deploy.files import DEPLOY

if TYPE_CHECKING:
    from collections.abc import Iterator


def check(address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEPLOY / "docker/healthcheck.py"), address],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


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
