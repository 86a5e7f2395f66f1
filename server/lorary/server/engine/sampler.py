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
from lorary.server.engine.upload import upload
from lorary.server.native import library as native

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from lorary.server.engine.request import Sampling
    from lorary.server.engine.sequence import Sequence


COLDEST = 2.0**-126
"""Least temperature that is divided by; devices may take what is smaller, a denormal, for 0."""
_LARGEST = torch.finfo(torch.float32).max


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
    sampled = [sequences[row] for row in drawn]
    parameters = [s.request.sampling for s in sampled]
    uniform = [_number(s) for s in sampled]
    kernels = native.load() if logits.device.type == "cpu" else None
    if isinstance(kernels, native.NativeKernels):
        return _by_kernels(kernels, logits, drawn, parameters, uniform)
    best = logits.argmax(dim=-1)
    if drawn:
        rows, chosen = _draw_by_torch(logits, drawn, parameters, uniform)
        best.index_copy_(0, rows, chosen)
    # The one time that the host waits for the device.
    tokens: list[int] = best.tolist()
    return tokens


def _by_kernels(
    kernels: native.NativeKernels,
    logits: torch.Tensor,
    drawn: Rows[int],
    sampling: Rows[Sampling],
    uniform: Rows[float],
) -> list[int]:
    """Choose by the native kernels: the most likely, and for the rows ``drawn`` what is drawn."""
    tokens = kernels.argmax(logits)
    if drawn:
        draws = [
            native.Draw(row, p.top_k, u, p.temperature, p.top_p, p.min_p)
            for row, p, u in zip(drawn, sampling, uniform, strict=True)
        ]
        for row, token in zip(drawn, kernels.draw(logits, draws), strict=True):
            tokens[row] = token
    return tokens


def _penalize(row: torch.Tensor, sequence: Sequence) -> None:
    """Apply repetition (prompt and answer), presence and frequency (answer) penalties, in place."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        factor = sampling.repetition_penalty
        # A factor next to 0 makes infinity, and the difference of two is no number.
        row[seen] = torch.where(values > 0, values / factor, values * factor).clamp_(max=_LARGEST)
    if sequence.counts:
        ids = torch.tensor(list(sequence.counts), device=row.device)
        counts = torch.tensor(list(sequence.counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _number(sequence: Sequence) -> float:
    assert sequence.generator is not None, "a sampled row without a generator"
    return sequence.generator.random()


def _draw_by_torch(
    logits: torch.Tensor, drawn: Rows[int], sampling: Rows[Sampling], uniform: Rows[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each of the rows ``drawn`` after temperature, top-k, top-p and min-p.

    Args:
        logits: float32 [R, vocab], on any device.
        drawn: D rows of it.
        sampling: of each.
        uniform: D numbers in [0, 1).

    Returns:
        The rows and the tokens, int64 [D] on the logits' device.
    """
    vocab = logits.shape[1]
    there = upload(
        [
            torch.tensor(drawn),
            torch.tensor([[p.temperature, p.top_p, p.min_p] for p in sampling]),
            torch.tensor([p.top_k or vocab for p in sampling]),
            torch.tensor(uniform, dtype=torch.float64),
        ],
        logits.device,
    )
    rows, shares, top_k, share = there
    temperature, top_p, min_p = shares[:, :1], shares[:, 1:2], shares[:, 2:]
    # From the best down, so that next to 0 what is left is the best, and not infinity less infinity.
    best = logits.amax(dim=-1, keepdim=True)
    scaled = (logits - best)[rows] / temperature.clamp(min=COLDEST)
    if any(p.top_k or p.top_p < 1.0 for p in sampling):
        scaled = _filter_top(scaled, top_k[:, None], top_p)
    probabilities = torch.softmax(scaled, dim=-1)
    if any(p.min_p for p in sampling):
        likely = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * likely, 0.0)
    # In float64, so that the many small ones count.
    reached = probabilities.double().cumsum(dim=-1)
    places = torch.searchsorted(reached, (share * reached[:, -1])[:, None], right=True)
    return rows, places[:, 0].clamp_(max=vocab - 1)


def _filter_top(scaled: torch.Tensor, keep: torch.Tensor, nucleus: torch.Tensor) -> torch.Tensor:
    """Set logits outside a row's top-k or its nucleus to -inf; the best token always stays.

    Shapes: scaled [D, vocab]; keep [D, 1], how many stay, and nucleus [D, 1], the share that they reach.
    """
    ordered, order = scaled.sort(dim=-1, descending=True)
    dropped = torch.arange(scaled.shape[-1], device=scaled.device) >= keep
    ordered = ordered.masked_fill(dropped, float("-inf"))
    mass = torch.softmax(ordered, dim=-1).cumsum(dim=-1)
    # A token is outside once the tokens before it already reach top_p.
    before = mass - torch.softmax(ordered, dim=-1)
    ordered = ordered.masked_fill((before >= nucleus) & (nucleus < 1.0), float("-inf"))
    return torch.empty_like(scaled).scatter_(-1, order, ordered)


def token_logprobs(
    logits: torch.Tensor, tokens: Rows[int], tops: Rows[int]
) -> list[PositionLogprobs]:
    """Return log probabilities of tokens, and of the likeliest beside them, in one copy to the host.

    Args:
        logits: float32 [R, vocab].
        tokens: R tokens that were chosen, or given.
        tops: how many of the likeliest each row wants.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, upload([torch.tensor(tokens)], logits.device)[0][:, None])
    most = max(tops)
    values, ids = logprobs.topk(most)
    # As float32 an id is exact up to 2^24.
    rows = torch.cat([chosen, values, ids.to(values.dtype)], dim=1).tolist()
    return [
        PositionLogprobs(
            chosen=(token, row[0]),
            top=tuple(zip(map(int, row[1 + most : 1 + most + top]), row[1 : 1 + top], strict=True)),
        )
        for token, top, row in zip(tokens, tops, rows, strict=True)
    ]


def score_labels(logits: torch.Tensor, labels: Rows[Rows[int]]) -> tuple[tuple[float, ...], ...]:
    """Return the log probability of each token of each label, as a continuation of the prompt.

    Args:
        logits: float32 [1 + sum(len(label) - 1), vocab]: the prompt's end, then the branches.
        labels: token ids of every label.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    rows: list[int] = []
    row = 1
    for label in labels:
        rows += (0, *range(row, row + len(label) - 1))
        row += len(label) - 1
    where = upload(
        [torch.tensor(rows), torch.tensor([t for label in labels for t in label])], logits.device
    )
    found = iter(logprobs[where[0], where[1]].tolist())
    return tuple(tuple(next(found) for _ in label) for label in labels)
