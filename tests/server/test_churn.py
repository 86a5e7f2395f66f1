"""Adapters come, go, move and are cancelled at random: every stream is token-exact with its solo run.

``LORARY_CHURN_SECONDS`` says how long; ``make verify-lifecycle`` lets it run for a minute.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import Cancelled
from lorary.registry import BaseCard, Registry
from tests.conftest import wait_until
from tests.server.conftest import EngineWorld
from tests.server.library import write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.registry import Resolved

SECONDS = float(os.environ.get("LORARY_CHURN_SECONDS", "6"))
NUM_LINES, NUM_VERSIONS = 32, 2
FITTING = 8
"""Adapters of the largest rank that there is memory for; there are 64."""
IN_HOST = 12
RANK = 16
TOKENS = 24
SOURCE = random.Random(11)
# Longer than a block, so that prompts are shared through the cache; the last is a beginning of another.
PROMPTS = [[SOURCE.randrange(3, 118) for _ in range(length)] for length in (70, 41, 5)]
PROMPTS.append(PROMPTS[0][:45])
LIMITS: dict[str, Any] = {"max_batch": 6, "max_waiting": 64, "draft_rows": 0, "prefill_budget": 48}


@dataclass(frozen=True)
class Lines:
    """A registry with 32 adapters of two versions each, ``prod`` on one of the two."""

    base: Path
    registry: Registry

    def all_versions(self) -> list[Resolved]:
        return [
            self.registry.resolve(f"line-{k}@{version}")
            for k in range(NUM_LINES)
            for version in range(1, NUM_VERSIONS + 1)
        ]


@pytest.fixture(scope="module")
def lines(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    root = tmp_path_factory.mktemp("churn")
    registry = Registry.open(root / "store", create=True)
    card = BaseCard.from_folder(tiny_base)
    for k in range(NUM_LINES):
        for version in range(NUM_VERSIONS):
            rank = (RANK, 1, 8, 9)[(k + version) % 4]
            folder = write_adapter(card, root / "one", rank=rank, seed=2 * k + version)
            registry.push(folder, f"line-{k}", base=card, aliases=["prod"])
    return Lines(tiny_base, registry)


@pytest.fixture(scope="module")
def solo(lines: Lines) -> dict[tuple[str, int], list[int]]:
    """What each digest ("": the bare base) answers to each prompt when it is alone in the engine."""
    world = EngineWorld(lines.base, lines.registry, **LIMITS, prefix_cache=False)
    said: dict[tuple[str, int], list[int]] = {}
    for resolved in [None, *lines.all_versions()]:
        ref = "" if resolved is None else f"{resolved.name}@{resolved.version}"
        for index, prompt in enumerate(PROMPTS):
            request = world.submit(prompt, ref, max_tokens=TOKENS, ignore_eos=True)
            tokens, _, error = world.collector.wait(request)
            assert error is None
            said["" if resolved is None else resolved.digest, index] = tokens
    world.close()
    # Else a stream could be another's and nobody would see it.
    first = {tuple(said[digest, 0]) for digest, index in said if index == 0}
    assert len(first) > 0.9 * (NUM_LINES * NUM_VERSIONS + 1)
    return said


def page_bytes(lines: Lines) -> int:
    """Return what a page of the tiny base's adapters takes."""
    world = EngineWorld(lines.base, lines.registry, start=False)
    world.close()
    return world.lora.pool.page_bytes


@dataclass(frozen=True)
class Stream:
    """One request in flight, and what it must say."""

    digest: str
    prompt: int
    num_tokens: int


class Churn:
    """Does one random thing after the other, and checks every stream that has ended."""

    def __init__(self, world: EngineWorld, lines: Lines, solo: dict[Any, list[int]], seed: int):
        self.world, self.lines, self.solo = world, lines, solo
        self.rng = random.Random(seed)
        self.open: dict[str, Stream] = {}
        self.pinned: list[str] = []
        self.did: Counter[str] = Counter()
        # Popular ones stay, the others come and go.
        self.weights = [1 / (k + 1) ** 0.5 for k in range(NUM_LINES)]

    def run(self, seconds: float) -> None:
        """Go on for so long, and on a slow machine until it was churn."""
        end = time.monotonic() + seconds
        last = end + 120
        actions = {"stream": 70, "cancel": 8, "unload": 6, "move": 8, "pin": 2, "unpin": 6}
        while (now := time.monotonic()) < end or (now < last and not self.is_enough):
            (action,) = self.rng.choices(list(actions), list(actions.values()))
            getattr(self, action)()
            self.did[action] += 1
            self.reap(most=24)
        self.reap(most=0)

    @property
    def is_enough(self) -> bool:
        """Much more came than fits, some of it from host memory, and some was cut short."""
        stats = self.world.residency.host_stats()
        return (
            stats.num_misses > 2 * FITTING
            and stats.num_hits > 0
            and self.did["cancelled"] > 0
            and self.did["checked"] > 100
        )

    def line(self) -> str:
        (k,) = self.rng.choices(range(NUM_LINES), self.weights)
        return f"line-{k}"

    def stream(self) -> None:
        ref = "" if self.rng.random() < 0.1 else f"{self.line()}@prod"
        digest = self.lines.registry.resolve(ref).digest if ref else ""
        stream = Stream(digest, self.rng.randrange(len(PROMPTS)), self.rng.randint(1, TOKENS))
        # Only this thread moves aliases: submit resolves to the same digest.
        request = self.world.submit(
            PROMPTS[stream.prompt], ref, max_tokens=stream.num_tokens, ignore_eos=True
        )
        self.open[request] = stream

    def cancel(self) -> None:
        if self.open:
            self.world.engine.cancel(self.rng.choice(list(self.open)))

    def unload(self) -> None:
        digest = self.lines.registry.resolve(self.line()).digest
        residency = self.world.residency
        self.rng.choice([residency.unload, residency.demote])(digest)

    def move(self) -> None:
        self.lines.registry.set_alias(self.line(), "prod", self.rng.randint(1, NUM_VERSIONS))

    def pin(self) -> None:
        if len(self.pinned) < 2:
            resolved = self.lines.registry.resolve(f"{self.line()}@prod")
            assert self.world.residency.load(resolved, pin=True, timeout_s=60).pinned
            self.pinned.append(resolved.digest)

    def unpin(self) -> None:
        if self.pinned:
            self.world.residency.unload(self.pinned.pop())

    def reap(self, *, most: int) -> None:
        """Wait until at most so many are open; check those that ended."""
        ended = [r for r in self.open if (r, 0) in self.world.collector.ended]
        while len(self.open) - len(ended) > most:
            oldest = next(r for r in self.open if r not in ended)
            self.world.collector.wait(oldest)
            ended.append(oldest)
        for request in ended:
            stream = self.open.pop(request)
            tokens, _, error = self.world.collector.wait(request)
            expected = self.solo[stream.digest, stream.prompt][: stream.num_tokens]
            if isinstance(error, Cancelled):
                expected = expected[: len(tokens)]
                self.did["cancelled"] += 1
            else:
                assert error is None, error
            assert tokens == expected, stream
            self.did["checked"] += 1


def test_every_stream_is_its_solo_run(lines: Lines, solo: dict[tuple[str, int], list[int]]) -> None:
    """64 adapters over 8 adapters' worth of pages and 12 of host memory, at random."""
    page = page_bytes(lines)
    pages = RANK // 8
    world = EngineWorld(
        lines.base,
        lines.registry,
        adapter_memory_bytes=FITTING * pages * page,
        host_adapter_memory_bytes=IN_HOST * pages * page,
        **LIMITS,
    )
    churn = Churn(world, lines, solo, seed=5)
    try:
        churn.run(SECONDS)
        assert world.collector.errors == []
        assert churn.is_enough, (churn.did, world.residency.host_stats())
        assert world.collector.steps[-1].num_running == 0 or world.engine.num_running == 0
        assert world.residency.host_stats().num_bytes <= IN_HOST * pages * page
        assert all(r.num_holders == 0 for r in world.residency.snapshot())

        def is_all_free() -> bool:
            # Again, for a load that was under way when its call was cancelled goes on to its end.
            for resident in world.residency.snapshot():
                world.residency.unload(resident.digest)
            return not world.residency.snapshot() and world.lora.pool.used_bytes == 0

        wait_until(is_all_free)
    finally:
        world.close()


def test_one_more_than_fits_is_served_in_turn(
    lines: Lines, solo: dict[tuple[str, int], list[int]]
) -> None:
    """Nine adapters at once over memory for eight, all of the same rank: the ninth waits and is right."""
    page = page_bytes(lines)
    world = EngineWorld(
        lines.base,
        lines.registry,
        adapter_memory_bytes=FITTING * page,
        **{**LIMITS, "max_batch": 16},
    )
    try:
        eights = [r for r in lines.all_versions() if lines.registry.info(r).rank == 8][
            : FITTING + 1
        ]
        requests = [
            world.submit(PROMPTS[1], f"{r.name}@{r.version}", max_tokens=TOKENS, ignore_eos=True)
            for r in eights
        ]
        for request, resolved in zip(requests, eights, strict=True):
            tokens, _, error = world.collector.wait(request)
            assert error is None
            assert tokens == solo[resolved.digest, 1]
        assert max(s.num_distinct_adapters for s in world.collector.steps) <= FITTING
        assert len(world.residency.snapshot()) == FITTING
    finally:
        world.close()


def test_a_new_version_of_a_name_never_reads_the_old_ones_prefix(
    lines: Lines, solo: dict[tuple[str, int], list[int]]
) -> None:
    """The same name, the same prompt, its prefix warm: after the alias moves nothing of it is reused."""
    world = EngineWorld(lines.base, lines.registry, **LIMITS)
    try:
        for version in (1, 2, 1):
            lines.registry.set_alias("line-0", "prod", version)
            digest = lines.registry.resolve("line-0@prod").digest
            cached = []
            for _ in range(2):
                request = world.submit(
                    PROMPTS[0], "line-0@prod", max_tokens=TOKENS, ignore_eos=True
                )
                tokens, finish, _ = world.collector.wait(request)
                assert tokens == solo[digest, 0]
                assert finish is not None
                cached.append(finish.cached_tokens)
            # A digest's own prefix is warm the second time; and again when the name returns to it.
            assert cached[1] > 0
            assert (cached[0] > 0) == (len(world.collector.ended) > 4)
    finally:
        world.close()


def test_unload_lets_a_stream_in_flight_end_right_and_then_frees(
    lines: Lines, solo: dict[tuple[str, int], list[int]]
) -> None:
    world = EngineWorld(lines.base, lines.registry, start=False, **LIMITS)
    try:
        resolved = lines.registry.resolve("line-3@1")
        world.residency.load(resolved, pin=True)
        request = world.submit(PROMPTS[2], "line-3@1", max_tokens=TOKENS, ignore_eos=True)
        described = world.residency.unload(resolved.digest)
        assert described is not None
        assert (described.state, described.pinned) == ("unloading", False)
        world.engine.start()
        tokens, _, error = world.collector.wait(request)
        assert error is None
        assert tokens == solo[resolved.digest, 2]
        wait_until(lambda: world.lora.pool.used_bytes == 0)
    finally:
        world.close()
