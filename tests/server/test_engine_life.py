"""An answer's life: stop conditions, seeds, cancel, deadline, failure, shutdown; nothing leaks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    IncompatibleAdapter,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from lorary.server.engine import answering
from lorary.server.engine import engine as engine_module
from lorary.server.engine.detokenizer import TextStream
from lorary.server.engine.runner import Runner
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.server.conftest import EngineWorld

PROMPT = [5, 6, 7, 8]
# An answer that does not end by itself while a test looks at it, however slow the machine.
LONG = 8000
CONTEXT = 8192


def assert_idle(world: EngineWorld) -> None:
    """Every slot and every hold is back."""
    wait_until(lambda: not world.engine.num_running and not world.engine.num_waiting)
    assert world.engine._cache.num_free_slots == world.engine._cache.num_slots
    assert world.engine._places.blocks.num_free == world.engine._cache.num_blocks
    assert all(r.num_holders == 0 for r in world.residency.snapshot())


def test_stop_token_max_tokens_and_text(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world()
    tokens, finish, _ = world.collector.wait(world.submit(PROMPT, ignore_eos=True))
    assert finish is not None
    assert (len(tokens), finish.reason, finish.completion_tokens) == (12, "length", 12)
    assert finish.text == world.tokenizer.decode(tokens, skip_special_tokens=True)
    at = tokens[4]
    first = tokens.index(at)
    stopped, finish, _ = world.collector.wait(
        world.submit(PROMPT, ignore_eos=True, stop_token_ids=(at,))
    )
    assert finish is not None
    assert stopped == tokens[: first + 1]
    assert finish.reason == "stop"
    assert finish.text == world.tokenizer.decode(tokens[:first], skip_special_tokens=True)


def test_stop_string_ends_the_answer(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world()
    _, finish, _ = world.collector.wait(world.submit(PROMPT, ignore_eos=True))
    assert finish is not None
    stop = finish.text[3:6]
    _, cut, _ = world.collector.wait(world.submit(PROMPT, ignore_eos=True, stop=(stop,)))
    assert cut is not None
    assert cut.text == finish.text[: finish.text.index(stop)]
    assert (cut.reason, cut.matched_stop) == ("stop", stop)


def test_seed_gives_the_same_tokens_in_any_company(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world()
    alone, _, _ = world.collector.wait(world.submit(PROMPT, "alpha", temperature=1.5, seed=11))
    others = [world.submit([9, 9, i + 3], temperature=1.0, ignore_eos=True) for i in range(5)]
    again, _, _ = world.collector.wait(world.submit(PROMPT, "alpha", temperature=1.5, seed=11))
    different, _, _ = world.collector.wait(world.submit(PROMPT, "alpha", temperature=1.5, seed=12))
    assert alone == again
    assert alone != different
    for request_id in others:
        world.collector.wait(request_id)


def test_answers_of_one_call_differ(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world()
    for index in range(3):
        world.submit(PROMPT, index=index, request_id="n", temperature=2.0, seed=1, ignore_eos=True)
    answers = {tuple(world.collector.wait("n", index)[0]) for index in range(3)}
    assert len(answers) == 3


def test_cancel_frees_everything(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world(max_batch=1, max_context=CONTEXT)
    for name in ("alpha", "bravo"):
        # Nothing slow, such as a busy disk, may lie between the first answer's start and its end.
        world.residency.load(world.registry.resolve(name))
    running = world.submit(PROMPT, "alpha", max_tokens=LONG, ignore_eos=True)
    queued = world.submit(PROMPT, "bravo", max_tokens=LONG, ignore_eos=True)
    world.collector.wait_started(running)
    world.engine.cancel(queued)
    world.engine.cancel(running)
    world.engine.cancel("nobody")
    for request_id in (running, queued):
        assert isinstance(world.collector.wait(request_id)[2], Cancelled)
    assert_idle(world)


def test_deadline_ends_the_answer_wherever_it_is(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world(max_batch=1, max_context=CONTEXT)
    soon = time.monotonic() + 0.05
    running = world.submit(PROMPT, max_tokens=LONG, ignore_eos=True, deadline_s=soon)
    queued = world.submit(PROMPT, "alpha", deadline_s=time.monotonic() - 1)
    for request_id in (running, queued):
        assert isinstance(world.collector.wait(request_id)[2], DeadlineExceeded)
    assert_idle(world)


def test_full_queue_refuses_and_takes_nothing(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world(max_batch=1, max_waiting=1, max_context=CONTEXT)
    running = world.submit(PROMPT, max_tokens=LONG, ignore_eos=True)
    world.collector.wait_started(running)
    world.submit(PROMPT)
    with pytest.raises(Overloaded, match="--max-waiting"):
        world.submit(PROMPT)
    world.engine.cancel(running)


def test_adapter_that_cannot_be_loaded_fails_its_own_request_only(
    make_world: Callable[..., EngineWorld],
) -> None:
    world = make_world(max_rank=16)
    bad = world.submit(PROMPT, "echo")
    good = world.submit(PROMPT, "bravo")
    assert isinstance(world.collector.wait(bad)[2], IncompatibleAdapter)
    assert world.collector.wait(good)[2] is None
    assert_idle(world)


@pytest.mark.parametrize(
    ("place", "name", "temperature"),
    [
        (engine_module, "build_batch", 0.0),
        (Runner, "forward", 0.0),
        (answering, "sample", 1.0),
        (TextStream, "push", 0.0),
    ],
)
def test_step_that_raises_fails_everyone_and_says_so(
    make_world: Callable[..., EngineWorld],
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    temperature: float,
) -> None:
    """Wherever it raises: who runs, who waits for a place and who waits for a load all hear of it."""
    world = make_world(max_context=CONTEXT, max_batch=1)
    running = world.submit(
        PROMPT, "bravo", max_tokens=LONG, ignore_eos=True, temperature=temperature
    )
    world.collector.wait_started(running)
    others = [world.submit(PROMPT), world.submit(PROMPT, "alpha")]

    def explode(*_arguments: object, **_options: object) -> torch.Tensor:
        raise RuntimeError("device on fire")

    monkeypatch.setattr(place, name, explode)
    for request_id in (running, *others):
        error = world.collector.wait(request_id)[2]
        assert isinstance(error, EngineFailed)
        assert "fire" not in str(error)
    assert_idle(world)
    assert not world.engine.is_alive
    # The last to be told, after everybody's answers.
    wait_until(lambda: bool(world.collector.errors))
    assert [str(e) for e in world.collector.errors] == ["device on fire"]
    with pytest.raises(Unavailable):
        world.submit(PROMPT)


def test_adapter_over_the_memory_fails_its_own_request_only(
    make_world: Callable[..., EngineWorld],
) -> None:
    page = make_world(start=False).lora.pool.page_bytes
    world = make_world(adapter_memory_bytes=2 * page)
    bad = world.submit(PROMPT, "echo")  # rank 33: five pages
    good = world.submit(PROMPT, "bravo")
    error = world.collector.wait(bad)[2]
    assert isinstance(error, IncompatibleAdapter)
    assert "--adapter-memory" in str(error)
    assert world.collector.wait(good)[2] is None
    assert_idle(world)


def test_shutdown_ends_what_is_in_flight(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world(max_context=CONTEXT)
    running = world.submit(PROMPT, max_tokens=LONG, ignore_eos=True)
    world.collector.wait_started(running)
    world.engine.shutdown()
    assert isinstance(world.collector.wait(running)[2], Unavailable)
    assert not world.engine.is_alive
    assert_idle(world)


def test_timings_and_counts_are_told(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world()
    _, finish, _ = world.collector.wait(world.submit(PROMPT, "foxtrot", ignore_eos=True))
    assert finish is not None
    assert (finish.prompt_tokens, finish.completion_tokens) == (4, 12)
    assert finish.prefill_ns > 0
    assert finish.decode_ns > 0
    assert finish.adapter_load_ns > 0


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ([], ()),
        ([5] * 16, ()),
        ([5] * 17, ((1,), (2,))),
        # Each label would fit alone; side by side they would be written into the next slot.
        ([5] * 10, ((1, 2, 3, 4, 5), (6, 7, 8, 9))),
    ],
)
def test_what_does_not_fit_its_slot_is_refused(
    make_world: Callable[..., EngineWorld],
    prompt: list[int],
    labels: tuple[tuple[int, ...], ...],
) -> None:
    world = make_world(max_context=16)
    with pytest.raises(InvalidRequest, match="context of 16"):
        world.submit(prompt, labels=labels)
    fits = world.submit([5] * 10, labels=((1, 2, 3, 4), (6, 7, 8, 9)))
    assert world.collector.wait(fits)[2] is None


def test_penalties_and_least_lengths_change_answers(make_world: Callable[..., EngineWorld]) -> None:
    """Logits are changed in place, in a real step: what a sampler alone cannot show."""
    world = make_world()
    prompt = [5, 6, 7, 8, 9]
    options: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    plain = world.collector.wait(world.submit(prompt, **options))[0]
    penalties: list[dict[str, Any]] = [
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
    ]
    for penalty in penalties:
        tokens, _, error = world.collector.wait(world.submit(prompt, **options, **penalty))
        assert error is None
        assert len(set(tokens)) > len(set(plain)), penalty
    first = plain[0]
    tokens, finish, error = world.collector.wait(
        world.submit(prompt, max_tokens=30, min_tokens=4, stop_token_ids=(first,), ignore_eos=True)
    )
    assert error is None
    assert finish is not None
    assert len(tokens) >= 4
    assert first not in tokens[:4]
