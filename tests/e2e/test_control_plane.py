"""What an operator sees and does: load, pin, watch and wait for adapters on one real server."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary.client import AdapterEvent, Client, Snapshot
from lorary.errors import AdapterNotFound, Unavailable
from tests.processes import BIN

if TYPE_CHECKING:
    from tests.processes import ServerProcess

REF = "delta@prod"
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


def lorary(server: ServerProcess, *words: str) -> Any:
    command = [str(BIN / "lorary"), *words, "--target", server.address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_an_adapter_comes_is_pinned_and_goes_and_everybody_is_told(
    server: ServerProcess, client: Client
) -> None:
    client.unload_adapter(REF)
    watch = client.watch(timeout_s=120)
    first = next(watch)
    assert isinstance(first, Snapshot)
    assert "delta" not in {a.name for a in first.adapters}

    def told(kind: str) -> AdapterEvent:
        return next(
            e for e in watch if isinstance(e, AdapterEvent) and (e.name, e.kind) == ("delta", kind)
        )

    with grpc.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub
        request = health_pb2.HealthCheckRequest(service=f"lorary.adapter/{REF}")
        health = stub(channel).Watch(request, timeout=120)
        assert next(health).status == NOT_SERVING
        with pytest.raises(AdapterNotFound, match="nothing to pin"):
            client.pin_adapter(REF)
        assert lorary(server, "prefetch", REF)["name"] == "delta"
        assert next(health).status == SERVING, "a client can wait for an adapter"
        unknown = health_pb2.HealthCheckRequest(service="lorary.adapter/nobody")
        with pytest.raises(grpc.RpcError):
            stub(channel).Check(unknown)
        told("loading")
        assert told("resident").digest == client.get_adapter(REF).digest

        assert lorary(server, "pin", REF)["pinned"]
        told("pinned")

        def delta() -> dict[str, Any]:
            return next(a for a in lorary(server, "ps")["adapters"] if a["name"] == "delta")

        # Other tests use this server, too.
        num_before = delta()["num_served"]
        answer = client.generate(token_ids=[5, 9], adapter=REF, max_tokens=2)
        shown = delta()
        assert (shown["pinned"], shown["num_pages"]) == (True, 1)
        assert shown["num_served"] == num_before + 1
        assert shown["digest"] == answer.receipt.digest
        assert shown["last_used_s"] > 0
        assert lorary(server, "ps")["registry_trouble"] == ""
        assert not client.unpin_adapter(REF).pinned

        # A tiny answer may be over before it is ended: then another one is asked for.
        for _ in range(20):
            stream = client.stream(token_ids=[5, 9], adapter=REF, max_tokens=250, ignore_eos=True)
            next(stream)
            assert client.unload_adapter(REF, force=True).name == "delta"
            try:
                list(stream)
            except Unavailable as error:
                assert "by force" in str(error)  # noqa: PT017 - not every round has one
                break
        else:
            pytest.fail("no answer was ended by force")
        told("evicted")
        assert next(health).status == NOT_SERVING
        health.cancel()


def test_ps_follows_events_as_lines(server: ServerProcess, client: Client) -> None:
    client.unload_adapter("charlie")
    command = [str(BIN / "lorary"), "ps", "--watch", "--target", server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert "adapters" in process.stdout.readline()
        client.load_adapter("charlie")
        lines = [process.stdout.readline() for _ in range(2)]
        watchdog.cancel()
        process.kill()
    assert "loading charlie@1" in lines[0]
    assert "resident charlie@1" in lines[1]
