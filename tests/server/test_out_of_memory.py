"""Steps for which there is no memory: who goes on with less, who is refused, and when the engine gives up.

The real forward, behind a device that refuses some steps as torch's allocators do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import EngineFailed, Overloaded, outcome
from lorary.server.engine import answering
from lorary.server.engine.blocks import BLOCK
from lorary.server.engine.places import LAST_STRAW
from lorary.server.engine.sampler import token_logprobs
from tests.conftest import wait_until
from tests.server.test_blocks import prompt_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.server.conftest import EngineWorld

SHORTAGES: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"),
    MemoryError,
]
LONG = 7
"""The token that prompts begin with whose steps have no memory."""


def refuse(
    world: EngineWorld,
    is_too_large: Callable[[Any], bool],
    shortage: Callable[[], BaseException] = SHORTAGES[0],
) -> list[Any]:
    """Let steps fail that are too large; return those, in order."""
    runner = world.engine._runner
    forward = runner.forward
    refused = []

    def limited(batch: Any) -> torch.Tensor | list[int]:
        if is_too_large(batch):
            refused.append(batch)
            raise shortage()
        return forward(batch)

    runner.forward = limited  # type: ignore[method-assign]
    return refused


def has_long(batch: Any) -> bool:
    return any(sequence.token_ids[0] == LONG for sequence, _ in batch.advanced)


def rows_of(batch: Any) -> int:
    return int(batch.token_ids.numel())


def assert_nothing_is_held(world: EngineWorld) -> None:
    """Every block, slot and hold on an adapter has been given back."""
    engine = world.engine
    assert engine._places.blocks.num_free == engine._cache.num_blocks
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert all(r.num_holders == 0 for r in world.residency._residents.values())


def limits_of(world: EngineWorld) -> tuple[int, int]:
    scheduler = world.engine._scheduler
    return scheduler.max_batch, scheduler.prefill_budget


def test_a_step_without_memory_shrinks_the_batch(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world(start=False)
    prompts = [prompt_of(30, i) for i in range(6)]
    expected = make_world()
    answers = [expected.collector.wait(expected.submit(p, ""))[0] for p in prompts]
    refuse(world, lambda batch: batch.num_decode > 3)
    asked = [world.submit(prompt, "") for prompt in prompts]
    world.engine.start()
    assert [world.collector.wait(request_id)[0] for request_id in asked] == answers
    assert world.engine._scheduler.max_batch <= 3
    assert world.engine.is_alive


def test_a_long_prompt_goes_on_in_smaller_chunks(make_world: Callable[..., EngineWorld]) -> None:
    """Alone, it costs nobody a place; what it says is what it says in one piece."""
    prompt = prompt_of(200, 3)
    roomy, world = make_world(), make_world()
    expected = roomy.collector.wait(roomy.submit(prompt, "alpha"))[0]
    refused = refuse(world, lambda batch: batch.num_prefill_tokens > 60)
    tokens, _, error = world.collector.wait(world.submit(prompt, "alpha"))
    assert error is None
    assert tokens == expected
    assert [rows_of(batch) for batch in refused] == [200, 100]
    assert limits_of(world) == (8, 50)


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_one_that_has_no_memory_alone_is_refused_and_others_go_on(
    make_world: Callable[..., EngineWorld], shortage: Callable[[], BaseException]
) -> None:
    """It comes with others, as long as it may be; all that was lowered for it is as before when it has gone."""
    prompts = [prompt_of(40 + i, i) for i in range(5)]
    names = ["alpha", "bravo", "", "alpha", "bravo"]
    roomy, world = make_world(), make_world(start=False)
    expected = [
        roomy.collector.wait(roomy.submit(p, name))[0]
        for p, name in zip(prompts, names, strict=True)
    ]
    limits = limits_of(world)
    refused = refuse(world, has_long, shortage)
    asked = [world.submit(p, name) for p, name in zip(prompts[:4], names, strict=False)]
    long = world.submit([LONG, *prompt_of(199, 9)], "bravo")
    world.engine.start()
    _, finish, error = world.collector.wait(long)
    assert finish is None
    assert isinstance(error, Overloaded)
    assert outcome(error).grpc_status == "RESOURCE_EXHAUSTED"
    assert error.retry_after_s == 60
    assert "no memory for a step of" in str(error)
    assert "Send a shorter prompt" in str(error)
    assert rows_of(refused[-1]) <= BLOCK
    assert [world.collector.wait(request_id)[0] for request_id in asked] == expected[:4]
    assert limits_of(world) == limits
    last, _, error = world.collector.wait(world.submit(prompts[4], names[4]))
    assert error is None
    assert last == expected[4]
    assert_nothing_is_held(world)
    assert not world.collector.errors
    assert sum(step.num_preempted for step in world.collector.steps) > 0
    stats = world.collector.steps[-1]
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_decode_rows == 1
    assert stats.kv_tokens_used <= stats.kv_tokens_total


def test_too_many_labels_can_be_sent_as_often_as_one_likes(
    make_world: Callable[..., EngineWorld],
) -> None:
    """They are one step whatever the budget: no chunk helps, and it says nothing about others."""
    world = make_world()
    refused = refuse(world, lambda batch: rows_of(batch) > 60)
    labels = tuple(tuple(prompt_of(10, i)) for i in range(8))
    for i in range(2 * LAST_STRAW):
        asked = world.submit(prompt_of(12, i), "alpha", labels=labels)
        _, _, error = world.collector.wait(asked)
        assert isinstance(error, Overloaded)
        assert "a step of 84 tokens behind 0 others" in str(error)
    assert len(refused) == 2 * LAST_STRAW
    tokens, _, error = world.collector.wait(world.submit(prompt_of(12, 0), "alpha"))
    assert error is None
    assert len(tokens) == 12
    assert_nothing_is_held(world)


def test_an_answer_that_runs_out_of_memory_keeps_what_was_sent(
    make_world: Callable[..., EngineWorld],
) -> None:
    """In the middle of an answer: its tokens are its caller's, and the status ends it."""
    world = make_world()
    refuse(world, lambda batch: batch.num_decode > 0 and batch.plan.positions[0] >= 45)
    prompt = prompt_of(40, 1)
    for _ in range(2 * LAST_STRAW):
        asked = world.submit(prompt, "alpha", max_tokens=50, ignore_eos=True)
        tokens, _, error = world.collector.wait(asked)
        assert isinstance(error, Overloaded)
        assert "a step of 1 tokens behind 45 others" in str(error)
        assert len(tokens) == 6
    assert_nothing_is_held(world)
    assert world.engine.is_alive


def test_guesses_are_given_up_before_an_answer(make_world: Callable[..., EngineWorld]) -> None:
    prompt = prompt_of(6, 1) * 8
    roomy, world = make_world(), make_world(draft_rows=8)
    expected = roomy.collector.wait(roomy.submit(prompt, "", max_tokens=60, ignore_eos=True))[0]
    refused = refuse(world, lambda batch: bool(batch.drafted))
    asked = world.submit(prompt, "", max_tokens=60, ignore_eos=True)
    tokens, _, error = world.collector.wait(asked)
    assert error is None
    assert tokens == expected
    assert len(refused) == 1
    assert limits_of(world) == limits_of(roomy)


def test_when_nothing_fits_any_more_the_engine_ends(make_world: Callable[..., EngineWorld]) -> None:
    """Whoever comes has no memory for the smallest of steps: better a new process than refusals for ever."""
    world = make_world()
    refuse(world, lambda batch: True, MemoryError)
    errors = []
    for i in range(LAST_STRAW):
        assert world.engine.is_alive
        asked = world.submit(prompt_of(30, i), "alpha")
        errors.append(world.collector.wait(asked)[2])
    *first, last = errors
    assert all(isinstance(error, Overloaded) for error in first)
    assert isinstance(last, EngineFailed)
    # Told after the answer's end.
    wait_until(lambda: bool(world.collector.errors))
    assert isinstance(world.collector.errors[0], MemoryError)
    assert not world.engine.is_alive
    assert_nothing_is_held(world)


CHOICES: dict[str, dict[str, Any]] = {
    "sample": {"temperature": 0.7, "seed": 1},
    "token_logprobs": {"logprobs": 2},
    "score_labels": {"labels": ((11, 12), (13,))},
}
"""What makes answers of a step, by name, and what to ask for so that it is called."""


@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("name", CHOICES)
def test_tokens_that_cannot_be_chosen_end_their_answers_and_no_others(
    make_world: Callable[..., EngineWorld],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shortage: Callable[[], BaseException],
) -> None:
    """The model has run, and some of the step's answers may have gone on: all of them end, one as its last step."""
    world = make_world(start=False)
    choose, calls = getattr(answering, name), []

    def short(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise shortage()
        return choose(*args)

    monkeypatch.setattr(answering, name, short)
    # At its end with the step's token, so that it has left its place when labels are scored.
    ended = world.submit(prompt_of(9, 1), "", max_tokens=1)
    asked = world.submit(prompt_of(12, 2), "", **CHOICES[name])
    reading = world.submit(prompt_of(200, 3), "")
    world.engine._scheduler.prefill_budget = 64
    world.engine.start()
    for request_id in (ended, asked):
        _, finish, error = world.collector.wait(request_id)
        assert finish is None
        assert isinstance(error, Overloaded)
        assert outcome(error).grpc_status == "RESOURCE_EXHAUSTED"
        assert "probabilities for 2 answers, this one among them" in str(error)
    assert world.engine._scheduler.max_batch == 1
    for request_id in (reading, world.submit(prompt_of(12, 2), "alpha", **CHOICES[name])):
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
    assert_nothing_is_held(world)
    assert not world.collector.errors


def test_when_no_token_can_be_chosen_any_more_the_engine_ends(
    make_world: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()

    def short(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(answering, "sample", short)
    errors = []
    for i in range(LAST_STRAW):
        assert world.engine.is_alive
        errors.append(world.collector.wait(world.submit(prompt_of(30, i), "", temperature=1.0))[2])
    *first, last = errors
    assert all(isinstance(error, Overloaded) for error in first)
    assert isinstance(last, EngineFailed)
    wait_until(lambda: bool(world.collector.errors))
    assert_nothing_is_held(world)


def test_a_prompt_whose_log_probabilities_have_no_memory_can_be_sent_as_often_as_one_likes(
    make_world: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()

    def short(logits: torch.Tensor, *args: Any) -> Any:
        if len(logits) > BLOCK:
            raise MemoryError
        return token_logprobs(logits, *args)

    monkeypatch.setattr(answering, "token_logprobs", short)
    limits = limits_of(world)
    for i in range(2 * LAST_STRAW):
        asked = world.submit(prompt_of(60, i), "", prompt_logprobs=1)
        _, _, error = world.collector.wait(asked)
        assert isinstance(error, Overloaded)
        assert "60 rows" in str(error)
    assert world.engine.is_alive
    assert limits_of(world) == limits
    _, _, error = world.collector.wait(world.submit(prompt_of(30, 1), "", prompt_logprobs=1))
    assert error is None
    assert_nothing_is_held(world)


def test_a_step_between_that_has_memory_starts_the_count_again(
    make_world: Callable[..., EngineWorld],
) -> None:
    """Refused ones are in a row only when nobody else was served, and answers of one call are one request."""
    world = make_world()
    refuse(world, has_long)
    for i in range(2 * LAST_STRAW):
        _, _, error = world.collector.wait(world.submit([LONG, *prompt_of(20, i)], "alpha"))
        assert isinstance(error, Overloaded)
        if i % (LAST_STRAW - 1):
            _, _, error = world.collector.wait(world.submit(prompt_of(20, i), "alpha"))
            assert error is None
    for index in range(LAST_STRAW):
        world.submit([LONG, *prompt_of(20, 1)], request_id="n", index=index)
    for index in range(LAST_STRAW):
        assert isinstance(world.collector.wait("n", index)[2], Overloaded)
    assert world.engine.is_alive
    assert_nothing_is_held(world)
