"""``lorary serve`` as a process: ready line, real adapters in real steps, signals, exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary.client import AsyncClient, Client, GenerateResult
from lorary.errors import AdapterNotFound, Cancelled, Unavailable
from lorary.registry import BaseCard
from tests.conftest import peft_greedy, wait_until
from tests.server.conftest import registry_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LORARY = [sys.executable, "-m", "lorary.cli.main"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def lorary(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LORARY, *args], capture_output=True, text=True, env=environment(), timeout=120, **options
    )


@pytest.fixture(scope="module")
def registry(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A registry with ``alpha@prod`` and ``team/bravo``."""
    adapters = {"alpha": tiny_adapters["alpha"], "team/bravo": tiny_adapters["bravo"]}
    root = tmp_path_factory.mktemp("registry")
    registry_of(root, tiny_base, adapters).set_alias("alpha", "prod", 1)
    return root / "store"


@contextmanager
def served(base: Path, registry: Path | str, *args: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Start ``lorary serve --json``; yield the process and its ready line."""
    command = [
        *LORARY, "serve", "--base", str(base), "--registry", str(registry), "--port", "0",
        "--metrics-port", "0", "--device", "cpu", "--dtype", "float32", "--threads", "1", "--json", *args,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            yield process, json.loads(line)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def running(tiny_base: Path, registry: Path) -> Iterator[dict[str, Any]]:
    with served(tiny_base, registry) as (_, ready):
        yield ready


def test_the_ready_line_says_where_and_what(running: dict[str, Any], tiny_base: Path) -> None:
    assert running["event"] == "ready"
    assert running["fingerprint"] == BaseCard.from_folder(tiny_base).fingerprint
    assert running["metrics"].endswith("/metrics")
    with Client(running["address"]) as client:
        assert client.wait_until_ready(60).base == "tiny-llama"


def test_answers_through_the_socket_are_pefts(
    running: dict[str, Any], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    prompt = [5, 9, 12, 30]
    cases = {"": None, "alpha@prod": tiny_adapters["alpha"], "team/bravo@1": tiny_adapters["bravo"]}
    with Client(running["address"]) as client:
        for ref, folder in cases.items():
            answer = client.generate(
                token_ids=prompt, adapter=ref, max_tokens=12, ignore_eos=True, timeout_s=60
            )
            wanted = peft_greedy(tiny_base, folder, prompt, 12)
            assert list(answer.token_ids)[: len(wanted)] == wanted, ref
            assert answer.receipt.ref == ref
        residents = {a.name for a in client.list_adapters(resident_only=True)}
        assert residents == {"alpha", "team/bravo"}


async def test_concurrent_calls_of_different_adapters_share_steps_and_stay_right(
    running: dict[str, Any], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Sixty calls at once, three kinds, cancels among them: every answer equals its solo run."""
    folders = {"": None, "alpha": tiny_adapters["alpha"], "team/bravo": tiny_adapters["bravo"]}
    prompts = [[5, 9, 12, 30], [7, 7, 40, 3, 22, 11]]
    wanted = {
        (ref, i): peft_greedy(tiny_base, folder, prompt, 16)
        for ref, folder in folders.items()
        for i, prompt in enumerate(prompts)
    }

    async with AsyncClient(running["address"]) as client:

        async def ask(ref: str, i: int) -> None:
            answer = await client.generate(
                token_ids=prompts[i], adapter=ref, max_tokens=16, ignore_eos=True
            )
            expected = wanted[ref, i]
            assert list(answer.token_ids)[: len(expected)] == expected, (ref, i)

        async def give_up(ref: str) -> None:
            async for _ in client.stream(token_ids=[5], adapter=ref, max_tokens=200):
                break

        # On a busy machine they may come, and be answered, one by one.
        for _ in range(20):
            asks = [ask(ref, i) for _ in range(9) for ref, i in wanted]
            await asyncio.gather(*asks, *(give_up(ref) for ref in folders for _ in range(2)))
            steps = (await client.server_info()).steps_by_distinct_adapters
            if len(steps) == 3:
                break
    assert len(steps) == 3
    assert steps[2] > 0


def test_the_command_line_calls_it(running: dict[str, Any]) -> None:
    target = ("--target", running["address"])
    asked = lorary(
        "call", "alpha@prod", "the cat", "--prompt", "--max-tokens", "4", "--json", *target
    )
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["usage"]["completion_tokens"] <= 4
    assert answer["receipt"]["name"] == "alpha"
    scored = lorary(
        "call", "", "the cat", "--prompt", "--label", " good", "--label", " bad", *target
    )
    assert "good" in scored.stdout
    assert "bad" in scored.stdout
    streamed = lorary(
        *("call", "", "-", "--prompt", "--stream", "--max-tokens", "3", "--priority", "-5"),
        *target,
        input="the",
    )
    assert streamed.returncode == 0, streamed.stderr
    shown = lorary("ps", "--all", *target)
    assert "tiny-llama" in shown.stdout
    assert "team/bravo" in shown.stdout
    facts = json.loads(lorary("ps", "--json", *target).stdout)
    assert facts["server"]["max_batch"] == 32


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["nobody", "x"], 3, "nobody"),
        (["../x", "x"], 2, "not valid"),
        (["", "x"], 2, "bare base"),
        (["alpha", "x", "--prompt", "--chat"], 2, "one of them"),
        (["alpha", "x", "--temperature", "-1", "--prompt"], 2, "temperature is -1"),
        (["alpha"], 2, "no task template"),
        (["alpha", "x", "--prompt", "--priority", "11"], 2, "priority is 11"),
    ],
)
def test_call_exits_with_the_errors_code(
    running: dict[str, Any], args: list[str], code: int, text: str
) -> None:
    done = lorary("call", *args, "--target", running["address"], input="x")
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_exit_78_in_one_line_before_the_base_is_loaded(
    running: dict[str, Any],
) -> None:
    port = running["address"].rsplit(":", 1)[-1]
    done = lorary("serve", "--base", "/no/such/base", "--port", port, "--metrics-port", "0")
    assert done.returncode == 78
    assert f"127.0.0.1:{port}" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--base", "nosuchbase", "--registry", "REGISTRY"], 3, "nosuchbase"),
        (["--base", "BASE", "--registry", "/no/such/registry"], 8, "/no/such/registry"),
        (["--base", "BASE", "--registry", "https://example.org/x"], 78, "example.org"),
        (["--base", "BASE", "--host", "0.0.0.0"], 78, "--insecure-bind"),
        (["--base", "BASE", "--adapter-memory", "lots"], 2, "lots"),
        (["--base", "BASE", "--max-batch", "0"], 2, "--max-batch"),
        (["--base", "BASE", "--registry", "REGISTRY", "--device", "tpu0"], 78, "--device"),
        (
            [
                "--base",
                "BASE",
                "--registry",
                "REGISTRY",
                "--device",
                "cpu",
                "--adapter-dtype",
                "fp8",
            ],
            78,
            "--adapter-dtype int8",
        ),
        (["--base", "BASE", "--ready-file", "/no/such/folder/x"], 78, "--ready-file"),
        (
            ["--base", "BASE", "--registry", "REGISTRY", "--signatures", "warn"],
            78,
            "--trusted-keys",
        ),
        (
            ["--base", "BASE", "--tls-cert", "/no/such.pem", "--tls-key", "/x.key"],
            78,
            "/no/such.pem",
        ),
        (["--base", "BASE", "--max-batches", "8"], 2, "--max-batches"),
        ([], 2, "--base"),
    ],
)
def test_serve_refuses_what_it_cannot_do(
    tiny_base: Path, registry: Path, args: list[str], code: int, text: str
) -> None:
    words = {"BASE": str(tiny_base), "REGISTRY": str(registry)}
    done = lorary("serve", "--port", "0", "--metrics-port", "0", *(words.get(a, a) for a in args))
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_sigterm_lets_a_stream_end_and_exits_0(
    tiny_base: Path, registry: Path, tmp_path: Path
) -> None:
    ready_file = tmp_path / "ready.json"
    with served(tiny_base, registry, "--ready-file", str(ready_file)) as (process, ready):
        assert json.loads(ready_file.read_text())["address"] == ready["address"]
        with Client(ready["address"]) as client:
            stream = client.stream(
                token_ids=[5, 9], adapter="alpha", max_tokens=400, ignore_eos=True, temperature=1.0
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            last = list(stream)[-1]
            assert isinstance(last, GenerateResult)
            assert last.usage.completion_tokens == 400
        assert process.wait(30) == 0
        assert not ready_file.exists()


def test_a_second_signal_stops_at_once_with_130(tiny_base: Path, registry: Path) -> None:
    with served(tiny_base, registry, "--drain-delay", "300") as (process, ready):
        process.send_signal(signal.SIGINT)
        # Two signals that come together are one.
        with grpc.insecure_channel(ready["address"]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            asked = health_pb2.HealthCheckRequest(service="lorary.v1.Inference")
            not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
            wait_until(lambda: health.Check(asked).status == not_serving)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        host, port = ready["address"].rsplit(":", 1)
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


def test_a_killed_server_is_unavailable_and_one_restarted_serves_again(
    tiny_base: Path, registry: Path
) -> None:
    # On a busy machine an answer may be here, to its end, before its server is dead.
    for _ in range(5):
        with (
            served(tiny_base, registry) as (process, ready),
            Client(ready["address"]) as client,
        ):
            stream = client.stream(
                token_ids=[5, 9], max_tokens=500, ignore_eos=True, adapter="alpha"
            )
            next(stream)
            process.kill()
            process.wait(30)
            try:
                list(stream)
            except (Unavailable, Cancelled):
                pass
            else:
                continue
            port = ready["address"].rsplit(":", 1)[-1]
            with served(tiny_base, registry, "--port", port):
                client.wait_until_ready(60)
                assert client.generate(token_ids=[5], adapter="alpha@1", max_tokens=1).token_ids
                with pytest.raises(AdapterNotFound):
                    client.generate(token_ids=[5], adapter="gone")
            return
    pytest.fail("no server died within an answer")
