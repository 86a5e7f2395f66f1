"""Prompt lookup: drafts are what the text says, and answers are those without them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.server.engine import speculation
from lorary.server.engine.speculation import GRAM, MOST, PATIENCE, PAUSE, Drafter
from tests.conftest import peft_greedy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 8))
def test_draft_is_what_followed_the_last_time(tokens: list[int], limit: int) -> None:
    expected: list[int] = []
    for end in range(len(tokens) - 1, GRAM - 1, -1):
        if tokens[end - GRAM : end] == tokens[-GRAM:]:
            expected = tokens[end : end + min(limit, MOST // 2)]
            break
    drafter = Drafter()
    # Indexed as the sequence grows, a piece at a time.
    drafter.draft(tokens[: len(tokens) // 2], limit)
    assert drafter.draft(tokens, limit) == expected


def test_drafts_grow_while_right_and_pause_when_wrong() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    drafter = Drafter()
    for _ in range(MOST):
        draft = drafter.draft(tokens, 99)
        drafter.learn(len(draft), len(draft), len(tokens))
    assert drafter.draft(tokens, 99) == [4, 5, 6, 7, 8, 9]
    for _ in range(PATIENCE):
        drafter.learn(3, 0, len(tokens))
    assert drafter.draft(tokens, 99) == []
    later = [*tokens, *[0] * (PAUSE - 3), 1, 2, 3]
    assert drafter.draft(later, 99)


def repeating(seed: int) -> list[int]:
    """A prompt of few phrases, so that much of it has been there before."""
    source = random.Random(seed)
    phrases = [[source.randrange(3, 118) for _ in range(6)] for _ in range(3)]
    return [t for _ in range(8) for t in source.choice(phrases)]


@pytest.fixture
def single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one equal token be enough: a random model never says three of its prompt's in a row."""
    monkeypatch.setattr(speculation, "GRAM", 1)


@pytest.mark.usefixtures("single_tokens")
@pytest.mark.parametrize("max_tokens", [1, 2, 40])
def test_greedy_answers_are_the_same(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    max_tokens: int,
) -> None:
    world = make_world(draft_rows=12)
    names = ["alpha", "", "bravo", "echo"]
    asked = [repeating(i) for i in range(len(names))]
    ids = [
        world.submit(p, n, max_tokens=max_tokens, ignore_eos=True)
        for p, n in zip(asked, names, strict=True)
    ]
    for request_id, name, prompt in zip(ids, names, asked, strict=True):
        tokens, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert finish.completion_tokens == len(tokens) == max_tokens
        expected = peft_greedy(
            tiny_base, tiny_adapters.get(name), prompt, max_tokens, ignore_eos=True
        )
        assert tokens == expected
    if max_tokens == 40:
        assert sum(s.num_drafted_tokens for s in world.collector.steps) > 0


@pytest.mark.parametrize("wrong_every", [0, 5])
def test_what_was_guessed_right_takes_no_step(
    make_world: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch, wrong_every: int
) -> None:
    """Guesses are the answer itself, all right or every fifth wrong: the same answer in fewer steps."""
    prompt = repeating(1)
    options: dict[str, Any] = {"max_tokens": 41, "ignore_eos": True}
    plain = make_world(draft_rows=0)
    answer, _, _ = plain.collector.wait(plain.submit(prompt, "alpha", **options))
    guesses = [t + 1 if wrong_every and i % wrong_every == 0 else t for i, t in enumerate(answer)]

    def draft(_self: Drafter, tokens: list[int], limit: int) -> list[int]:
        at = len(tokens) - len(prompt)
        return guesses[at : at + min(limit, 3)]

    monkeypatch.setattr(Drafter, "draft", draft)
    world = make_world(draft_rows=8)
    tokens, finish, _ = world.collector.wait(world.submit(prompt, "alpha", **options))
    assert tokens == answer
    assert finish is not None
    assert finish.completion_tokens == 41
    steps = world.collector.steps
    num_kept = sum(s.num_kept_tokens for s in steps)
    # The prompt's step gives the first token, each other step one and what it kept.
    assert len(steps) == 41 - num_kept
    assert num_kept == 30 if not wrong_every else 15 <= num_kept < 30


@pytest.mark.usefixtures("single_tokens")
def test_seeded_answers_penalties_and_logprobs_are_the_same(
    make_world: Callable[..., EngineWorld],
) -> None:
    options: dict[str, Any] = {
        "max_tokens": 80,
        "temperature": 1.0,
        "seed": 7,
        "presence_penalty": 0.01,
        "repetition_penalty": 1.001,
        "min_tokens": 5,
        "logprobs": 1,
        "ignore_eos": True,
    }

    def run(draft_rows: int) -> tuple[list[list[int]], list[float], int]:
        world = make_world(draft_rows=draft_rows)
        ids = [world.submit(repeating(i), "alpha", **options) for i in range(3)]
        answers = [world.collector.wait(i) for i in ids]
        assert [error for _, _, error in answers] == [None] * 3
        tokens = [t for t, _, _ in answers]
        logprobs = [p for i in ids for p in world.collector.logprobs(i)]
        return tokens, logprobs, sum(s.num_drafted_tokens for s in world.collector.steps)

    plain, plain_logprobs, none = run(0)
    drafted, logprobs, some = run(12)
    assert none == 0 < some
    assert drafted == plain
    assert logprobs == pytest.approx(plain_logprobs, abs=1e-4)


@pytest.mark.usefixtures("single_tokens")
def test_an_answer_ends_inside_a_draft(make_world: Callable[..., EngineWorld]) -> None:
    """Stop at the context's end and at a stop token: nothing is answered beyond."""
    prompt = repeating(1)
    free = make_world(draft_rows=12)
    tokens, _, _ = free.collector.wait(free.submit(prompt, max_tokens=30, ignore_eos=True))
    world = make_world(draft_rows=12, max_context=len(prompt) + 17)
    short, finish, _ = world.collector.wait(world.submit(prompt, max_tokens=99, ignore_eos=True))
    assert finish is not None
    assert (short, finish.reason) == (tokens[:17], "length")
    stop = tokens[20]
    first = tokens.index(stop)
    stopped, finish, _ = free.collector.wait(
        free.submit(prompt, max_tokens=99, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert finish is not None
    assert (stopped, finish.reason) == (tokens[: first + 1], "stop")
