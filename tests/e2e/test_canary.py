"""A second version under traffic, end to end: its share, its copies, its gate, and the line in the log."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from typing import TYPE_CHECKING

from lorary.client import AsyncClient, Client, GenerateResult
from lorary.registry import Registry
from lorary.server.rollout.splits import share
from tests.conftest import AdapterRecipe, build_adapter, write_manifest
from tests.e2e.conftest import registry_cli
from tests.processes import metric

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import World
    from tests.processes import ServerProcess

PROMPT = [7, 21, 33]


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def test_a_canary_that_answers_otherwise_is_rolled_back_and_no_stream_breaks(
    server: ServerProcess, world: World, tmp_path: Path
) -> None:
    digests = []
    for seed in (31, 32):
        recipe = AdapterRecipe(seed=seed, strength=0.3)
        folder = build_adapter(world.base, tmp_path / str(seed), recipe)
        digests.append(world.push(write_manifest(world.base, folder), "careful")["digest"])
    opened = Registry.open(world.registry)
    opened.set_alias("careful", "prod", 1)
    here = {"adapter": "careful", "alias": "prod"}

    async with AsyncClient(server.address, timeout_s=120) as client:

        async def ask(user: str, max_tokens: int = 2) -> GenerateResult:
            return await client.generate(
                token_ids=PROMPT,
                adapter="careful@prod",
                routing_key=user,
                max_tokens=max_tokens,
                ignore_eos=True,
            )

        assert not (await ask("first")).receipt.canary
        registry_cli(
            *("canary", "careful", "prod", "2", "--percent", "30", "--registry", world.registry)
        )
        await until(
            lambda: metric(server.metrics_url, "lorary_canary_percent", **here, how="answers") == 30
        )
        users = [f"user-{i}" for i in range(40)]
        for _ in range(2):  # sticky: the same callers again
            for user, answer in zip(users, await asyncio.gather(*map(ask, users)), strict=True):
                is_drawn = share("canary\0careful\0prod\0002", user) < 30
                assert answer.receipt.canary == is_drawn
                assert answer.receipt.digest == digests[is_drawn]
        drawn = metric(
            server.metrics_url, "lorary_canary_calls_total", **here, role="canary", result="ok"
        )
        others = metric(
            server.metrics_url, "lorary_canary_calls_total", **here, role="holder", result="ok"
        )
        assert (drawn + others, 0.1 < drawn / 80 < 0.5) == (80, True)

        running = [asyncio.create_task(ask(user, 200)) for user in users[:12]]
        registry_cli(
            *("canary", "careful", "prod", "2", "--percent", "10", "--shadow", "100"),
            *("--gate", "divergence=0.2", "--gate", "calls=5", "--registry", world.registry),
        )
        # Copies of the answers under way may end it before anybody looks here.
        await until(
            lambda: (
                metric(server.metrics_url, "lorary_canary_percent", **here, how="copies") == 100
                or opened.rollouts.of("careful", "prod") is None
            )
        )
        async with asyncio.timeout(90):
            while opened.rollouts.of("careful", "prod") is not None:
                # One after the other: copies are only made while nobody waits.
                await ask(users[-1], 8)
        for answer in await asyncio.gather(*running):
            assert answer.usage.completion_tokens == 200
            assert answer.receipt.digest == digests[answer.receipt.canary]
        last = opened.log("careful", "prod")[-1]
        assert last.actor.startswith("server ")
        assert re.match(r"gate divergence: \d+ copies differ .* allowed is 0.2", last.reason)
        shown = registry_cli("log", "careful", "--json", "--registry", world.registry).stdout
        assert last.reason in shown
        await until(lambda: metric(server.metrics_url, "lorary_canary_percent", **here) == 0)
        assert {a.receipt.version for a in await asyncio.gather(*map(ask, users[:8]))} == {1}
    # The line is in the log a moment before the server counts it.
    await until(
        lambda: metric(server.metrics_url, "lorary_canaries_ended_total", result="failed") == 1
    )
    assert metric(server.metrics_url, "lorary_shadow_calls_total", result="different") >= 5


def test_a_canary_that_holds_its_gates_takes_the_alias(
    server: ServerProcess, world: World, tmp_path: Path
) -> None:
    opened = Registry.open(world.registry)
    for description, seed in (("first", 41), ("second", 41)):
        # The same weights with another stop string: another version that answers the same.
        folder = build_adapter(world.base, tmp_path / description, AdapterRecipe(seed=seed))
        write_manifest(world.base, folder, stop=(description,))
        world.push(folder, "twin")
    opened.set_alias("twin", "prod", 1)
    with Client(server.address, timeout_s=60) as client:

        def ask(user: str) -> GenerateResult:
            return client.generate(
                token_ids=PROMPT, adapter="twin@prod", routing_key=user, max_tokens=4
            )

        ask("first")
        registry_cli(
            *("canary", "twin", "prod", "2", "--percent", "50", "--auto-promote", "10"),
            *("--gate", "errors=0.1", "--gate", "calls=5", "--registry", world.registry),
        )
        deadline = time.monotonic() + 60
        for number in itertools.count():
            if ask(f"user-{number}").receipt.version == 2 and opened.aliases("twin")["prod"] == 2:
                break
            assert time.monotonic() < deadline, "never promoted"
        assert "held its gates" in opened.log("twin", "prod")[-1].reason
        assert opened.rollback("twin", "prod").to_version == 1
