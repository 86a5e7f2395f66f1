"""What changes under a running server: aliases, callers that leave, and the server's own death."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorary.client import AsyncClient, Client, GenerateResult
from lorary.errors import Cancelled, Unavailable
from lorary.registry import Registry
from tests.conftest import AdapterRecipe, build_adapter, wait_until, write_manifest
from tests.e2e.conftest import registry_cli
from tests.processes import BIN, running, wait_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.e2e.conftest import Oracle, World
    from tests.processes import ServerProcess

PROMPT = [7, 21, 33]


async def test_promoting_an_alias_turns_the_next_call_and_spares_the_running_ones(
    server: ServerProcess, world: World, tmp_path: Path
) -> None:
    first, second = (
        world.push(make_adapter(world, tmp_path, seed), "rolling") for seed in (21, 22)
    )
    registry_cli("promote", "rolling@1", "prod", "--registry", world.registry)
    opened = Registry.open(world.registry)
    async with AsyncClient(server.address, timeout_s=60) as client:

        async def ask(max_tokens: int) -> GenerateResult:
            return await client.generate(
                token_ids=PROMPT, adapter="rolling@prod", max_tokens=max_tokens, ignore_eos=True
            )

        async def turned_to(version: int) -> GenerateResult:
            """Ask until new calls get a version; running ones go on meanwhile."""
            async with asyncio.timeout(60):
                while (answer := await ask(12)).receipt.version != version:
                    pass
            return answer

        before = await ask(12)
        assert before.receipt.digest == first["digest"], "latest is not prod"
        running = await all_running(client, lambda: ask(240), 8)
        opened.set_alias("rolling", "prod", 2)
        turned = await turned_to(2)
        assert (turned.receipt.digest, turned.receipt.version) == (second["digest"], 2)
        assert turned.token_ids != before.token_ids
        for answer in await asyncio.gather(*running):
            assert answer.receipt.digest == first["digest"]
            assert answer.token_ids[:12] == before.token_ids
        registry_cli("rollback", "rolling", "prod", "--registry", world.registry)
        back = await turned_to(1)
        assert back.receipt.digest == first["digest"]
        assert back.token_ids == before.token_ids


async def all_running(
    client: AsyncClient, ask: Callable[[], Awaitable[GenerateResult]], count: int
) -> list[asyncio.Future[GenerateResult]]:
    """Return that many answers, seen to share the steps; those that are over before are asked for again."""
    running: list[asyncio.Future[GenerateResult]]
    running = [asyncio.ensure_future(ask()) for _ in range(count)]
    async with asyncio.timeout(60):
        while (await client.server_info()).num_running < count:
            for place, one in enumerate(running):
                if one.done():
                    one.result()
                    running[place] = asyncio.ensure_future(ask())
            await asyncio.sleep(0.005)
    return running


def make_adapter(world: World, root: Path, seed: int) -> Path:
    recipe = AdapterRecipe(seed=seed, strength=0.3)
    return write_manifest(world.base, build_adapter(world.base, root / str(seed), recipe))


@contextmanager
def narrow_server(world: World, work: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with a single place in its steps; yields the process and its address."""
    work.mkdir(exist_ok=True)
    ready, log = work / "ready.json", work / "server.log"
    command = [str(BIN / "lorary"), "serve", "--base", str(world.base)]
    command += ["--registry", str(world.registry), "--port", "0", "--metrics-port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--max-batch", "1"]
    command += ["--max-context", "512", "--ready-file", str(ready)]
    ready.unlink(missing_ok=True)
    with running(command, log) as process:
        wait_for("server", ready.exists, process, log)
        yield process, json.loads(ready.read_text())["address"]


def test_a_caller_who_leaves_frees_the_place_and_a_killed_server_comes_back(
    world: World, oracle: Oracle, tmp_path: Path
) -> None:
    # A tiny answer may be over before the server dies: then another server is killed.
    for _ in range(10):
        with narrow_server(world, tmp_path / "first") as (process, address):
            with Client(address, timeout_s=60) as client:
                leave_and_be_replaced(client, oracle)
                is_broken = is_broken_by_a_kill(client, process)
            assert process.wait(30) == -signal.SIGKILL
        registry_cli("verify", "--registry", world.registry, "alpha")
        if is_broken:
            break
    assert is_broken
    with narrow_server(world, tmp_path / "second") as (process, address):
        with Client(address, timeout_s=60) as client:
            answer = client.generate(token_ids=PROMPT, adapter="alpha@prod", max_tokens=8)
            assert list(answer.token_ids) == oracle.greedy("alpha", PROMPT, 8)
        process.terminate()
        assert process.wait(30) == 0


def is_broken_by_a_kill(client: Client, process: subprocess.Popen[bytes]) -> bool:
    """Kill the server under a stream; tell whether the stream broke off, or was whole by then."""
    stream = client.stream(token_ids=PROMPT, adapter="alpha@prod", max_tokens=500, ignore_eos=True)
    next(stream)
    process.send_signal(signal.SIGKILL)
    try:
        list(stream)
    except (Unavailable, Cancelled):
        return True
    return False


def leave_and_be_replaced(client: Client, oracle: Oracle) -> None:
    """Take the only place with a long answer, leave, and let the next call have it."""
    # A tiny answer may be over before anybody looks: then it is asked for again.
    for _ in range(20):
        stream = client.stream(token_ids=PROMPT, max_tokens=500, ignore_eos=True)
        next(stream)
        is_running = client.server_info().num_running == 1
        stream.close()  # type: ignore[attr-defined]
        if is_running:
            break
    assert is_running
    answer = client.generate(token_ids=PROMPT, adapter="bravo", max_tokens=8)
    assert list(answer.token_ids) == oracle.greedy("bravo", PROMPT, 8)
    wait_until(lambda: client.server_info().num_running == 0)
