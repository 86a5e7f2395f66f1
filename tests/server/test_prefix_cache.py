"""Shared beginnings: what is reused, what never is, and that answers do not change by a bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from lorary.server.engine.prefix_cache import (
    LEAST_SHARED,
    WORTH_WAITING,
    Claim,
    PrefixCache,
    common_length,
)
from lorary.server.engine.request import Request, Sampling
from lorary.server.engine.sequence import Sequence
from tests.conftest import peft_greedy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.errors import LoraryError
    from tests.server.conftest import EngineWorld


@dataclass
class FakeLease:
    """A lease of the adapter with this digest."""

    digest: str
    is_ready: bool = True
    error: LoraryError | None = None

    def release(self) -> None:
        """Nothing is held."""


def sequence(
    prompt: list[int], digest: str = "a", *, computed: int = 0, slot: int = -1
) -> Sequence:
    request = Request(
        request_id="r",
        prompt_ids=prompt,
        sampling=Sampling(max_tokens=4),
        lease=FakeLease(digest),
    )
    return Sequence(request=request, token_ids=list(prompt), num_computed=computed, slot=slot)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(0, 20))
def test_common_length(a: list[int], b: list[int], limit: int) -> None:
    expected = 0
    while expected < min(len(a), len(b), limit) and a[expected] == b[expected]:
        expected += 1
    assert common_length(a, b, limit) == expected


LONG = list(range(100))


def test_a_slot_is_taken_over_when_all_it_holds_is_used() -> None:
    cache = PrefixCache()
    cache.keep(3, "a", LONG[:40])
    assert cache.claim(sequence(LONG), [], [0, 3]) == Claim(3, 3, 40)
    assert cache.claim(sequence(LONG), [], [0]) == Claim(0, 0, 0), "a claimed slot is forgotten"


def test_a_longer_content_is_copied_and_stays() -> None:
    cache = PrefixCache()
    cache.keep(3, "a", LONG)
    other = [*LONG[:50], 7, 7, 7]
    assert cache.claim(sequence(other), [], [0, 3]) == Claim(0, 3, 50)
    assert cache.claim(sequence(LONG), [], [1, 3]) == Claim(1, 3, 99), "the last token is read"


def test_the_oldest_content_goes_first_and_the_source_last() -> None:
    cache = PrefixCache()
    for slot, start in ((2, 0), (0, 200), (1, 300)):
        cache.keep(slot, "a", [start, *LONG])
    assert cache.claim(sequence([5, *LONG]), [], [0, 1, 2]) == Claim(2, 2, 0)
    assert cache.claim(sequence([200, *LONG[:30], 1]), [], [0, 1]) == Claim(1, 0, 31)
    assert cache.claim(sequence([200, *LONG[:20], 1]), [], [0]) == Claim(0, 0, 21)


def test_another_adapter_shares_nothing() -> None:
    cache = PrefixCache()
    cache.keep(0, "a", LONG)
    running = [sequence(LONG, "a", computed=100, slot=1)]
    assert cache.claim(sequence(LONG, "b"), running, [2]) == Claim(2, 2, 0)
    assert cache.claim(sequence(LONG, ""), running, [2]) == Claim(2, 2, 0)


def test_short_beginnings_are_read_again() -> None:
    cache = PrefixCache()
    cache.keep(0, "a", LONG)
    prompt = [*LONG[: LEAST_SHARED - 1], 999, 998]
    assert cache.claim(sequence(prompt), [], [1]) == Claim(1, 1, 0)


def test_a_prompt_waits_for_the_same_one_that_is_being_read() -> None:
    cache = PrefixCache()
    reading = sequence(LONG, computed=10, slot=0)
    assert cache.claim(sequence(LONG), [reading], [1]) is None
    reading.num_computed = 100 - WORTH_WAITING + 1
    assert cache.claim(sequence(LONG), [reading], [1]) == Claim(1, 0, 100 - WORTH_WAITING + 1)
    assert cache.claim(sequence(LONG, "b"), [sequence(LONG, slot=0)], [1]) == Claim(1, 1, 0)


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 118) for _ in range(length)]


def test_reused_beginning_changes_no_bit(make_world: Callable[..., EngineWorld]) -> None:
    prompt = prompt_of(60, 1)
    options: dict[str, Any] = {"logprobs": 0, "ignore_eos": True, "max_tokens": 8}
    without = make_world(prefix_cache=False)
    expected = without.collector.logprobs(without.submit(prompt, "alpha", **options))
    world = make_world()
    first = world.submit(prompt[:45] + prompt_of(9, 2), "alpha", **options)
    world.collector.wait(first)
    second = world.submit(prompt, "alpha", **options)
    assert world.collector.logprobs(second) == expected
    finish = world.collector.wait(second)[1]
    assert finish is not None
    assert (finish.prompt_tokens, finish.cached_tokens) == (60, 45)
    # The same words for another adapter, and for the base, are other keys and values.
    for name in ("bravo", ""):
        other = world.submit(prompt, name, **options)
        finish = world.collector.wait(other)[1]
        assert finish is not None
        assert finish.cached_tokens == 0


def test_answers_of_one_call_read_their_prompt_once(
    make_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    world = make_world(start=False)
    world.residency.load(world.registry.resolve("alpha"), pin=True)
    prompt = prompt_of(100, 3)
    for index in range(4):
        world.submit(prompt, "alpha", request_id="n", index=index)
    world.engine.start()
    cached = []
    for index in range(4):
        tokens, finish, error = world.collector.wait("n", index)
        assert error is None
        assert finish is not None
        assert tokens == peft_greedy(tiny_base, tiny_adapters["alpha"], prompt, 12)
        cached.append(finish.cached_tokens)
    assert sorted(cached) == [0, 99, 99, 99]


def test_churn_of_related_prompts_stays_exact(
    make_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Prompts cut from few stems, adapters and base mixed, cancellations, scoring, few slots."""
    world = make_world(max_batch=3, prefill_budget=24)
    source = random.Random(5)
    stems = [prompt_of(60, seed) for seed in range(2)]
    names = ["alpha", "bravo"]
    asked = []
    for i in range(40):
        stem = source.choice(stems)
        prompt = stem[: source.randrange(30, 60)] + prompt_of(source.randrange(1, 6), 100 + i)
        name = source.choice(names)
        labels = ((5, 6, 7), (8, 9)) if i % 7 == 3 else ()
        request_id = world.submit(prompt, name, labels=labels, max_tokens=6)
        asked.append((request_id, prompt, name, labels))
        if i % 9 == 4:
            world.engine.cancel(request_id)
    num_cached = 0
    for request_id, prompt, name, labels in asked:
        tokens, finish, error = world.collector.wait(request_id)
        if error is not None:
            continue
        assert finish is not None
        num_cached += finish.cached_tokens > 0
        if not labels:
            expected = peft_greedy(tiny_base, tiny_adapters.get(name), prompt, 6)
            assert tokens == expected
    assert num_cached >= 10
