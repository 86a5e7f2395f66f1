"""Blocks of the cache: what is shared, what never is, preemption, and that answers stay the same."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import ConfigError
from lorary.server.adapters.segments import PoolEntry
from lorary.server.engine.blocks import (
    BLOCK,
    LEAST_SHARED,
    WORTH_WAITING,
    Blocks,
    Node,
    Shared,
    blocks_for,
    common_length,
)
from lorary.server.engine.kv_cache import KVShape
from lorary.server.engine.memory import available_bytes, plan_blocks
from lorary.server.engine.request import Request, Sampling
from lorary.server.engine.sequence import Sequence
from tests.conftest import peft_greedy
from tests.server.on_paper import FakeLease

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld


def sequence(prompt: list[int], digest: str = "a", active_from: int = 0) -> Sequence:
    request = Request(
        request_id="r",
        prompt_ids=prompt,
        sampling=Sampling(max_tokens=4),
        lease=FakeLease(digest=digest),
        active_from=active_from,
    )
    return Sequence(request=request, token_ids=list(prompt))


def start(
    blocks: Blocks, prompt: list[int], digest: str = "a", active_from: int = 0
) -> tuple[Sequence, Shared]:
    """Give a new sequence its blocks, and read its prompt."""
    new = sequence(prompt, digest, active_from)
    shared = blocks.look_up(new, [])
    assert shared is not None
    assert blocks.take(new, shared, len(prompt) + 1)
    new.num_computed = len(prompt)
    blocks.publish(new)
    return new, shared


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(0, 20))
def test_common_length(a: list[int], b: list[int], limit: int) -> None:
    expected = 0
    while expected < min(len(a), len(b), limit) and a[expected] == b[expected]:
        expected += 1
    assert common_length(a, b, limit) == expected


LONG = list(range(100))


def test_running_sequences_share_full_blocks() -> None:
    blocks = Blocks(20)
    first, _ = start(blocks, LONG)
    second, shared = start(blocks, [*LONG[:70], 7, 7, 7])
    assert shared.length == 64, "two blocks; the third one's owner still writes into it"
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(second.blocks[2:]) & set(first.blocks)
    assert blocks.num_free == 20 - 4 - 1
    blocks.release(first)
    blocks.release(second)
    assert blocks.num_free == 20


def test_a_block_that_agrees_in_part_is_copied() -> None:
    blocks = Blocks(20)
    first, _ = start(blocks, LONG)
    own = list(first.blocks)
    blocks.release(first)
    other = sequence([*LONG[:50], 7, 7, 7])
    assert blocks.look_up(other, []) == Shared(
        blocks._walk(other.request, LONG, 99).path[:1], own[1], 18
    )
    again = blocks.look_up(sequence(LONG), [])
    assert again is not None
    assert (again.length, again.tail) == (96, 0), "three tokens are not worth a search"
    once_more = blocks.look_up(sequence(LONG[:64]), [])
    assert once_more is not None
    assert (once_more.length, once_more.source) == (63, own[1]), "the last token is read again"


def test_another_adapter_shares_nothing() -> None:
    blocks = Blocks(20)
    running, _ = start(blocks, LONG)
    for digest in ("b", ""):
        assert blocks.look_up(sequence(LONG, digest), [running]) == Shared()


def test_an_invocation_parts_what_is_the_bases_from_what_is_the_adapters() -> None:
    """The base and two aLoRAs over one document, their invocations in its third block."""

    def length(digest: str, active_from: int, running: list[Sequence]) -> int:
        found = blocks.look_up(sequence(LONG, digest, active_from), running)
        assert found is not None
        return found.length

    blocks = Blocks(20)
    judge, _ = start(blocks, LONG, "judge", 80)
    for running in ([judge], []):
        assert length("judge", 80, running) == 99 if running else 96
        assert length("judge", 81, running) == 80, (
            "on later: the same tokens, other keys and values"
        )
        assert length("judge", 60, running) == 60
        assert length("other", 90, running) == 80
        assert length("other", 70, running) == 70
        assert length("", 0, running) == 80
        assert length("plain", 0, running) == 0
        assert length("other", LEAST_SHARED - 1, running) == 0
        if running:
            blocks.release(judge)
    base, _ = start(blocks, LONG, "")
    blocks.release(base)
    assert length("other", 90, []) == 90
    assert length("judge", 96, []) == 96
    assert length("judge", 80, []) == 96


def test_nothing_is_shared_when_told_so() -> None:
    blocks = Blocks(20, share=False)
    first, _ = start(blocks, LONG)
    assert blocks.look_up(sequence(LONG), [first]) == Shared()
    blocks.release(first)
    assert (blocks.num_free, blocks.num_idle) == (20, 0)


def test_short_beginnings_are_read_again() -> None:
    blocks = Blocks(20)
    first, _ = start(blocks, LONG)
    blocks.release(first)
    assert blocks.look_up(sequence([*LONG[: LEAST_SHARED - 1], 999, 998]), []) == Shared()
    shared = blocks.look_up(sequence([*LONG[:LEAST_SHARED], 999, 998]), [])
    assert shared is not None
    assert shared.length == LEAST_SHARED


def test_the_longest_unused_goes_first_and_leaves_before_what_they_stand_on() -> None:
    blocks = Blocks(4)
    for first_token in (200, 300):
        one, _ = start(blocks, [first_token, *LONG[:62]])
        blocks.release(one)
    # All four blocks are remembered; using the older prompt again makes the other one the oldest.
    used, shared = start(blocks, [200, *LONG[:62]])
    assert shared.length == 62
    blocks.release(used)
    assert (blocks.num_free, len(blocks._free)) == (4, 0)
    new, _ = start(blocks, [1, 2, 3])
    found = blocks.look_up(sequence([300, *LONG[:62]]), [])
    assert found is not None
    assert found.length == BLOCK, "its second block is gone, its first one is not"
    kept = blocks.look_up(sequence([200, *LONG[:62]]), [])
    assert kept is not None
    assert kept.length == 62
    blocks.release(new)


def test_a_prompt_waits_for_the_same_one_that_is_being_read() -> None:
    blocks = Blocks(20)
    reading = sequence(LONG)
    assert blocks.take(reading, Shared(), 101)
    reading.num_computed = 10
    assert blocks.look_up(sequence(LONG), [reading]) is None
    reading.num_computed = 100 - WORTH_WAITING + 1
    blocks.publish(reading)
    shared = blocks.look_up(sequence(LONG), [reading])
    assert shared is not None
    assert shared.length == 100 - WORTH_WAITING + 1
    assert shared.source == reading.blocks[1]
    assert blocks.look_up(sequence(LONG, "b"), [reading]) == Shared()
    salted = sequence(LONG)
    salted.request.salt = "another tenant"
    assert blocks.look_up(salted, [reading]) == Shared()


def test_too_few_blocks_change_nothing() -> None:
    blocks = Blocks(4)
    running, _ = start(blocks, LONG[:63])
    new = sequence(LONG)
    shared = blocks.look_up(new, [])
    assert shared is not None
    assert not blocks.take(new, shared, 101, spare=2)
    assert not blocks.grow(running, 5 * BLOCK)
    assert (blocks.num_free, new.blocks, len(running.blocks)) == (2, [], 2)
    assert blocks.grow(running, 4 * BLOCK)
    assert blocks.num_free == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_are_never_lost_nor_written_by_two(data: st.DataObject) -> None:
    """Random lives of sequences against a model of what every position of the cache holds."""
    shared_layers = data.draw(st.sampled_from((0, 2)))
    blocks = Blocks(data.draw(st.integers(4, 12), label="blocks"), shared_layers=shared_layers)
    # Late enough, and too early.
    entries = {
        name: PoolEntry((0,), (1.0,), first_layer=layer) for name, layer in (("a", 2), ("b", 1))
    }
    stems = [[s] * 70 for s in (1, 2)]
    holds: dict[int, list[object]] = {b: [None] * BLOCK for b in range(blocks.num_blocks)}
    below: dict[int, list[object]] = {b: [None] * BLOCK for b in range(blocks.num_blocks)}
    running: list[Sequence] = []

    def content(one: Sequence, position: int) -> tuple[object, object, object]:
        """What keys and values depend on: the tokens up to there, and which of them were adapted by whom."""
        begin, digest = one.request.active_from, one.request.lease.digest
        adapted = (digest, begin) if digest and position >= begin else None
        return (one.request.salt, adapted, tuple(one.token_ids[: position + 1]))

    def content_below(one: Sequence, position: int) -> object:
        """What keys and values of the shared layers depend on."""
        salt, adapted, tokens = content(one, position)
        return (salt, None if one.request.lease.digest == "a" else adapted, tokens)

    def compute(one: Sequence, stop: int) -> None:
        for position in range(one.num_computed, stop):
            block = one.blocks[position // BLOCK]
            others = [o for o in running if o is not one and block in o.blocks]
            assert not others, "a block that others read is written"
            holds[block][position % BLOCK] = content(one, position)
            below[block][position % BLOCK] = content_below(one, position)
        one.num_computed = stop
        blocks.publish(one)

    def check(one: Sequence) -> None:
        for position in range(one.num_computed):
            held = holds[one.blocks[position // BLOCK]][position % BLOCK]
            assert held == content(one, position)
        for position in range(max(one.num_computed, one.num_below)):
            held = below[one.blocks[position // BLOCK]][position % BLOCK]
            assert held == content_below(one, position)

    for _ in range(data.draw(st.integers(1, 25), label="events")):
        event = data.draw(st.sampled_from(("start", "start", "advance", "advance", "end")))
        if event == "start":
            stem = data.draw(st.sampled_from(stems))
            length = data.draw(st.integers(1, 70))
            prompt = [*stem[:length], data.draw(st.integers(3, 5))]
            digest = data.draw(st.sampled_from(("a", "b", "")))
            begin = data.draw(st.sampled_from((0, 0, 20, 32, 33, length))) if digest else 0
            new = sequence(prompt, digest, min(begin, length))
            new.request.salt = data.draw(st.sampled_from(("", "acme")))
            new.entry = entries.get(digest)
            new.request.keep_prefix = data.draw(st.sampled_from((True, True, False)))
            shared = blocks.look_up(new, running)
            if shared is None or not blocks.take(new, shared, len(prompt) + 1):
                continue
            if shared.tail:
                target = new.blocks[len(shared.path)]
                for held in (holds, below):
                    held[target][: shared.tail] = held[shared.source][: shared.tail]
            found = [list(below[source]) for source in shared.below]
            below.update(zip(new.blocks[len(shared.path) :], found, strict=False))
            new.num_computed, new.num_below = shared.length, shared.num_below
            check(new)
            running.append(new)
        elif running:
            one = data.draw(st.sampled_from(running))
            if event == "end":
                running.remove(one)
                blocks.release(one)
            elif one.is_prefilling:
                rest = len(one.token_ids) - one.num_computed
                compute(one, one.num_computed + data.draw(st.integers(1, rest)))
            elif blocks.grow(one, len(one.token_ids) + 1):
                one.token_ids.append(data.draw(st.integers(3, 5)))
                compute(one, len(one.token_ids))
        for one in running:
            check(one)
        owned = {block for one in running for block in one.blocks}
        path = {node.block for one in running for node in one.path}
        assert blocks.num_free == blocks.num_blocks - len(owned | path)
        check_no_other_is_known(blocks)
    for one in running:
        blocks.release(one)
    assert blocks.num_free == blocks.num_blocks


def check_no_other_is_known(blocks: Blocks) -> None:
    """The tree of shared layers names the blocks that are in a tree of their own, and no other."""
    known: set[Node] = set()
    named: set[Node] = set()
    trees = list(blocks._roots.values())
    while trees:
        node = trees.pop()
        trees += node.children.values()
        if node.below is not None:
            known.add(node)
    levels = list(blocks._below.values())
    while levels:
        level = levels.pop()
        levels += level.children.values()
        assert level.nodes or level.parent is None
        named |= level.nodes.keys()
    assert named == known
    assert all(blocks._below[salt].children for salt in blocks._below)


SHAPE = KVShape(num_layers=2, num_kv_heads=2, context=256, head_dim=16)


def test_the_number_of_blocks() -> None:
    size = SHAPE.block_bytes(torch.float32)
    assert size == 2 * 2 * 2 * BLOCK * 16 * 4

    def plan(memory: int = 0, fraction: float = 0.5, available: int = 1000 * size) -> int:
        return plan_blocks(
            SHAPE,
            torch.float32,
            max_batch=4,
            kv_memory_bytes=memory,
            memory_fraction=fraction,
            available_bytes=available,
        )

    assert plan() == 4 * blocks_for(256), "never more than could be used at once"
    assert plan(available=40 * size) == 20
    assert plan(memory=64 * size + 1) == 64, "who asks for more remembers more"
    with pytest.raises(ConfigError, match=r"--kv-memory of .* single answer may have 256"):
        plan(memory=7 * size)
    with pytest.raises(ConfigError, match=r"--memory-fraction 0.005 of the .* Lower --max-context"):
        plan(fraction=0.005)


def test_memory_that_is_left() -> None:
    free = available_bytes(torch.device("cpu"))
    assert 2**24 < free < 2**50
    assert available_bytes(torch.device("cpu"), promised=2**60) == 0


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


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_answers_are_the_same(
    prefix_cache: bool,
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
) -> None:
    """Eight answers that need 32 blocks in the end, and 10 of them: greedy, seeded, with penalties."""
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    ]
    names = ["alpha", "bravo", ""]
    prompts = [prompt_of(20 + i, 10 + i) for i in range(8)]

    def ask(world: EngineWorld) -> list[tuple[list[int], list[float]]]:
        # All at once: one after the other they would find room.
        for name in names[:2]:
            world.residency.load(world.registry.resolve(name))
        asked = [
            world.submit(
                prompt, names[i % 3], max_tokens=90, ignore_eos=True, logprobs=0, **options[i % 3]
            )
            for i, prompt in enumerate(prompts)
        ]
        world.engine.start()
        answers = []
        for request_id in asked:
            tokens, finish, error = world.collector.wait(request_id)
            assert error is None
            assert finish is not None
            assert finish.completion_tokens == 90
            answers.append((tokens, world.collector.logprobs(request_id)))
        return answers

    roomy = make_world(prefix_cache=prefix_cache, start=False)
    expected = ask(roomy)
    assert sum(step.num_preempted for step in roomy.collector.steps) == 0
    shape = roomy.engine._cache.shape
    memory = 10 * shape.block_bytes(torch.float32)
    tight = make_world(kv_memory_bytes=memory, prefix_cache=prefix_cache, start=False)
    actual = ask(tight)
    assert sum(step.num_preempted for step in tight.collector.steps) > 0
    assert max(step.kv_tokens_used for step in tight.collector.steps) <= 10 * BLOCK
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(
        actual, expected, strict=True
    ):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    oracle = peft_greedy(tiny_base, tiny_adapters["alpha"], prompts[0], 12)
    assert actual[0][0][:12] == oracle
    assert tight.engine._places.blocks.num_free == tight.engine._cache.num_blocks


def test_a_small_prompt_does_not_overtake_a_large_one_for_ever(
    make_world: Callable[..., EngineWorld],
) -> None:
    """The large one needs most of the cache; a stream of small ones would always find a gap."""
    probe = make_world()
    memory = 9 * probe.engine._cache.shape.block_bytes(torch.float32)
    world = make_world(kv_memory_bytes=memory, max_batch=4, start=False)
    small = [world.submit(prompt_of(8, i), "", max_tokens=20, ignore_eos=True) for i in range(4)]
    large = world.submit(prompt_of(200, 99), "", max_tokens=4, ignore_eos=True)
    later = [world.submit(prompt_of(8, 50 + i), "", max_tokens=20) for i in range(12)]
    world.engine.start()
    for request_id in [*small, large, *later]:
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
    ended = world.collector.ended
    assert ended[large, 0] < min(ended[request_id, 0] for request_id in later)
