"""The sampler: exact filters, rows that do not know each other, honest log probabilities."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch

from lorary.server.adapters.residency import BaseLease
from lorary.server.engine.request import Request, Sampling
from lorary.server.engine.sampler import (
    _draw_by_torch,
    sample,
    score_labels,
    token_logprobs,
)
from lorary.server.engine.sequence import Sequence
from lorary.server.native import library as native

NO_EOS: frozenset[int] = frozenset()


def row(seed: int | None = None, generated: list[int] | None = None, **sampling: Any) -> Sequence:
    request = Request(
        request_id="r",
        prompt_ids=[0, 1],
        sampling=Sampling(max_tokens=9, seed=seed, **sampling),
        lease=BaseLease(),
    )
    answer = generated or []
    sequence = Sequence(request=request, token_ids=[0, 1, *answer])
    for token in answer:
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
    if not request.sampling.is_greedy:
        sequence.generator = Random(seed)
    return sequence


def frequencies(draws: int, logits: list[float], **sampling: Any) -> dict[int, float]:
    sequence = row(seed=7, **sampling)
    counts: dict[int, float] = {}
    for _ in range(draws):
        (token,) = sample(torch.tensor([logits]), [sequence], NO_EOS)
        counts[token] = counts.get(token, 0) + 1 / draws
    return counts


def test_greedy_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [row(), row()], NO_EOS) == [1, 0]


def test_draws_follow_the_distribution() -> None:
    """4,000 draws: 4 standard errors of a share of 0.5 are 0.032."""
    p = [0.5, 0.3, 0.2]
    found = frequencies(4000, [math.log(v) for v in p], temperature=1.0)
    for token, share in enumerate(p):
        assert found[token] == pytest.approx(share, abs=0.032)


def test_temperature_sharpens() -> None:
    found = frequencies(3000, [math.log(0.6), math.log(0.4)], temperature=0.5)
    assert found[0] == pytest.approx(0.36 / 0.52, abs=0.035)


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "min_p": 0.55}, {0, 1}),
    ],
)
def test_filters_keep_exactly_their_set(limits: dict[str, float], allowed: set[int]) -> None:
    logits = [math.log(v) for v in (0.5, 0.3, 0.15, 0.05)]
    assert set(frequencies(400, logits, temperature=1.0, **limits)) == allowed


@pytest.mark.parametrize("vocab", [1, 7, 16, 50, 1031, 4096, 49152])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": 100_000},
        {"top_p": 0.9},
        {"top_p": 0.999999, "temperature": 2.0},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
    ],
)
def test_both_implementations_draw_the_same(vocab: int, limits: dict[str, Any]) -> None:
    """The native kernel and the operators, but where a number falls within rounding of a border."""
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    torch.manual_seed(vocab)
    logits = torch.randn(64, vocab) * 4
    if vocab > 40:
        logits[:, 5:9] = float("-inf")
    sampling = Sampling(max_tokens=1, **{"temperature": 1.0, **limits})
    uniform = [(i + 0.37) / 64 for i in range(64)]
    draws = [
        native.Draw(i, sampling.top_k, u, sampling.temperature, sampling.top_p, sampling.min_p)
        for i, u in enumerate(uniform)
    ]
    actual = kernels.draw(logits, draws)
    _, drawn = _draw_by_torch(logits.clone(), range(64), [sampling] * 64, uniform)
    expected = drawn.tolist()
    assert sum(a != b for a, b in zip(actual, expected, strict=True)) <= 1
    assert not set(actual) & ({5, 6, 7, 8} if vocab > 40 else set())


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", [2.0**-149, 1e-39, 1e-30])
def test_next_to_zero_the_best_is_drawn(temperature: float, limits: dict[str, Any]) -> None:
    """One over a denormal is infinite, and infinity times nothing is no number."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    best = [int(logits.argmax())]
    assert sample(logits, [row(seed=1, temperature=temperature, **limits)], NO_EOS) == best
    sampling = Sampling(max_tokens=1, temperature=temperature, **limits)
    assert _draw_by_torch(logits, [0], [sampling], [0.9])[1].tolist() == best


def test_a_penalty_next_to_zero_leaves_numbers() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0]])
    sequence = row(repetition_penalty=2.0**-149)  # of tokens 0 and 1
    assert sample(logits, [sequence], NO_EOS) == [0]
    assert not torch.log_softmax(logits, dim=-1).isnan().any()


def test_ties_at_the_border_keep_the_lowest_tokens() -> None:
    found = frequencies(400, [1.0, 2.0, 1.0, 1.0], temperature=1.0, top_k=2)
    assert set(found) == {0, 1}


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1000, 49152])
def test_the_most_likely_token_is_the_first_of_the_largest(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(9, vocab + 3)[:, :vocab]
    expected = logits.argmax(dim=-1).tolist()

    def most_likely(logits: torch.Tensor) -> list[int]:
        return sample(logits, [row()] * len(logits), NO_EOS)

    assert most_likely(logits) == expected
    tied = torch.zeros(2, vocab)
    tied[1, vocab // 2 :] = 1.0
    assert most_likely(tied) == [0, vocab // 2]
    assert most_likely(torch.full((1, vocab), float("-inf"))) == [0]


def test_seeded_row_draws_the_same_in_any_company() -> None:
    logits = torch.randn(1, 50)
    alone = [
        sample(logits.clone(), [sequence], NO_EOS)[0]
        for sequence in [row(3, temperature=1.0)]
        for _ in range(1)
    ]
    crowd = torch.cat([torch.randn(1, 50), logits, torch.randn(1, 50)])
    company = [row(1, temperature=2.0, top_k=5), row(3, temperature=1.0), row()]
    assert sample(crowd, company, NO_EOS)[1] == alone[0]


def test_penalties_equal_their_formulas() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
    sequence = row(
        generated=[2, 2, 3],
        repetition_penalty=2.0,
        presence_penalty=0.1,
        frequency_penalty=0.25,
    )
    sample(logits, [sequence], NO_EOS)
    expected = [2.0 / 2, -1.0 * 2, 1.0 / 2 - 0.1 - 0.5, 0.5 / 2 - 0.1 - 0.25]
    assert logits[0].tolist() == pytest.approx(expected)


def test_min_tokens_forbids_the_end() -> None:
    logits = torch.tensor([[9.0, 1.0, 8.0]])
    sequence = row(min_tokens=1, stop_token_ids=(2,))
    assert sample(logits.clone(), [sequence], frozenset({0})) == [1]
    sequence.token_ids.append(1)
    assert sample(logits.clone(), [sequence], frozenset({0})) == [0]


def test_logprobs_are_a_log_softmax() -> None:
    """Two rows that want two others and none."""
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    found, second = token_logprobs(logits, [1, 0], [2, 0])
    assert found.chosen[0] == 1
    assert found.chosen[1] == pytest.approx(math.log(0.2), abs=1e-5)
    assert [token for token, _ in found.top] == [0, 1]
    assert (second.chosen[0], second.top) == (0, ())
    assert second.chosen[1] == pytest.approx(math.log(0.1), abs=1e-5)


def test_labels_are_scored_token_by_token() -> None:
    """Labels (5,) and (1, 2): the second one's second token is read from the branch's row."""
    logits = torch.randn(2, 6)
    logprobs = torch.log_softmax(logits, -1)
    scores = score_labels(logits, [(5,), (1, 2)])
    assert scores[0] == pytest.approx([float(logprobs[0, 5])])
    assert scores[1] == pytest.approx([float(logprobs[0, 1]), float(logprobs[1, 2])])
