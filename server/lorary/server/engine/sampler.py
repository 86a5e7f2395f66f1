"""Logits to tokens, one batched call per step, every row with its own parameters.

A row's draw depends on its own seed and on how many tokens it has drawn, never on its company: each
sampled row has its own generator, which gives one number per token. The token is where the distribution
function, tokens in ascending order, passes that number; so a seed means the same on every device, but
for sums that round differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorary.server.engine.request import PositionLogprobs
from lorary.server.native import library as native

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from lorary.server.engine.request import Sampling
    from lorary.server.engine.sequence import Sequence


def sample(logits: torch.Tensor, sequences: Rows[Sequence], eos_ids: frozenset[int]) -> list[int]:
    """Choose one token per row.

    Args:
        logits: float32 [R, vocab]; changed in place where a row has biases or penalties.
        sequences: R sequences, in row order; their generators advance.
        eos_ids: tokens that a row may not choose before its ``min_tokens``.

    Returns:
        R token ids.
    """
    drawn: list[int] = []
    for row, sequence in enumerate(sequences):
        if sequence.is_plain:
            continue
        sampling = sequence.request.sampling
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            logits[row, list(ids)] += torch.tensor(values, device=logits.device)
        if sampling.has_penalties:
            _penalize(logits[row], sequence)
        if sequence.num_generated < sampling.min_tokens:
            banned = [*eos_ids, *sampling.stop_token_ids]
            logits[row, banned] = float("-inf")
        if not sampling.is_greedy:
            drawn.append(row)
    tokens = most_likely(logits)
    if drawn:
        chosen = _draw(logits, drawn, [sequences[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def most_likely(logits: torch.Tensor) -> list[int]:
    """Return where each row of logits float32 [R, vocab] is largest."""
    kernels = native.load() if logits.device.type == "cpu" else None
    if isinstance(kernels, native.NativeKernels):
        return kernels.argmax(logits)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _penalize(row: torch.Tensor, sequence: Sequence) -> None:
    """Apply repetition (prompt and answer), presence and frequency (answer) penalties, in place."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        factor = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    if sequence.counts:
        ids = torch.tensor(list(sequence.counts), device=row.device)
        counts = torch.tensor(list(sequence.counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(logits: torch.Tensor, rows: list[int], sequences: Rows[Sequence]) -> list[int]:
    """Draw one token for each of ``rows`` after temperature, top-k, top-p and min-p."""
    sampling = [s.request.sampling for s in sequences]
    uniform = [_number(s) for s in sequences]
    kernels = native.load() if logits.device.type == "cpu" else None
    if isinstance(kernels, native.NativeKernels):
        return kernels.draw(
            logits,
            [
                native.Draw(row, p.top_k, u, p.temperature, p.top_p, p.min_p)
                for row, p, u in zip(rows, sampling, uniform, strict=True)
            ],
        )
    return _draw_by_torch(logits[rows], sampling, uniform)


def _number(sequence: Sequence) -> float:
    assert sequence.generator is not None, "a sampled row without a generator"
    return sequence.generator.random()


def _draw_by_torch(
    logits: torch.Tensor, sampling: Rows[Sampling], uniform: Rows[float]
) -> list[int]:
    """Draw one token per row, on any device; logits [R, vocab], R numbers in [0, 1)."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in sampling], device=device)
    scaled = logits / temperature[:, None]
    if any(p.top_k or p.top_p < 1.0 for p in sampling):
        scaled = _filter_top(scaled, [p.top_k for p in sampling], [p.top_p for p in sampling])
    probabilities = torch.softmax(scaled, dim=-1)
    if any(p.min_p for p in sampling):
        floor = torch.tensor([p.min_p for p in sampling], device=device)[:, None]
        best = probabilities.max(dim=-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < floor * best, 0.0)
    # In float64, so that the many small ones count.
    reached = probabilities.double().cumsum(dim=-1)
    share = torch.tensor(uniform, dtype=torch.float64, device=device)
    places = torch.searchsorted(reached, (share * reached[:, -1])[:, None], right=True)
    chosen: list[int] = places[:, 0].clamp_(max=logits.shape[1] - 1).tolist()
    return chosen


def _filter_top(scaled: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Set logits outside a row's top-k or its nucleus to -inf; the best token always stays."""
    ordered, order = scaled.sort(dim=-1, descending=True)
    vocab = scaled.shape[-1]
    keep = torch.tensor([k or vocab for k in top_k], device=scaled.device)[:, None]
    dropped = torch.arange(vocab, device=scaled.device) >= keep
    ordered = ordered.masked_fill(dropped, float("-inf"))
    mass = torch.softmax(ordered, dim=-1).cumsum(dim=-1)
    nucleus = torch.tensor(top_p, device=scaled.device)[:, None]
    # A token is outside once the tokens before it already reach top_p.
    before = mass - torch.softmax(ordered, dim=-1)
    ordered = ordered.masked_fill((before >= nucleus) & (nucleus < 1.0), float("-inf"))
    return torch.empty_like(scaled).scatter_(-1, order, ordered)


def position_logprobs(logits: torch.Tensor, token: int, top: int) -> PositionLogprobs:
    """Return log probabilities at one position; logits float32 [vocab]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = logprobs.topk(top)
        best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return PositionLogprobs(chosen=(token, float(logprobs[token])), top=best)


def prompt_logprobs(logits: torch.Tensor, tokens: Rows[int], top: int) -> list[PositionLogprobs]:
    """Return log probabilities of tokens that are given; logits float32 [R, vocab], R tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(top)
    return [
        PositionLogprobs(
            chosen=(token, logprob), top=tuple(zip(best_ids, best_values, strict=True))
        )
        for token, logprob, best_ids, best_values in zip(
            tokens, chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]


def score_labels(logits: torch.Tensor, labels: Rows[Rows[int]]) -> tuple[tuple[float, ...], ...]:
    """Return the log probability of each token of each label, as a continuation of the prompt.

    Args:
        logits: float32 [1 + sum(len(label) - 1), vocab]: the prompt's end, then the branches.
        labels: token ids of every label.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    scores: list[tuple[float, ...]] = []
    row = 1
    for label in labels:
        rows = (0, *range(row, row + len(label) - 1))
        scores.append(tuple(float(logprobs[r, t]) for r, t in zip(rows, label, strict=True)))
        row += len(label) - 1
    return tuple(scores)
