"""One step as flat tensors: tokens, positions, where keys go, who attends to what, whose adapter.

Built once per step on the host and read by every layer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lorary.server.adapters.segments import PoolEntry, Segments
from lorary.server.engine.attention import AttentionPlan, Chunk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.server.adapters.merged import MergedWeights
    from lorary.server.engine.kv_cache import KVCache
    from lorary.server.engine.scheduler import Scheduled
    from lorary.server.engine.sequence import Sequence
    from lorary.server.native.decoder import NativeStep


@dataclass(slots=True, eq=False)
class Batch:
    """One step; most steps are the one before, ``advance``d. Its tensors are on the host, but for hidden ones.

    Attributes:
        token_ids: int64 [1, T].
        position_ids: int64 [1, T].
        plan: what attention needs.
        segments: rows by adapter; None when no row has one.
        logits_rows: int64 [L], rows whose logits are wanted: samplers' rows first, in the order of
            ``samplers``, then every drafted sequence's, then every scorer's, prompt end first, then its
            branches in order; last the rows of prompts whose log probabilities are wanted.
        hidden_rows: int64 [H], rows whose hidden states are wanted, in the order of ``embedders``.
        samplers: sequences that get a token from this step.
        drafted: sequences that get one or more, with their drafts: a row for the last token and one
            for each drafted one.
        scorers: scoring sequences whose labels are answered by this step.
        prompts: sequences whose prompts' rows are among the logits, and how many each has.
        embedders: sequences with rows among the hidden states, and how many each has.
        advanced: tokens computed per sequence, drafted ones apart.
        num_decode: sequences that decode, drafted ones included.
        num_prefill_tokens: prompt tokens, branches included.
        num_distinct_adapters: adapters in the step, the bare base not counted.
        merged: the weights that all of it runs on, with an adapter in them; None for the base's.
        first_layer: where its rows begin: 0, or behind the shared layers, with what the cache keeps of these.
        hidden: float32 [H, width], the hidden states of ``hidden_rows``, which the runner has found; None where
            there are no such rows.
        is_greedy: whether all that is wanted of it are the most likely tokens.
        native: what the native layers have laid out for it, by addresses that ``advance`` keeps.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    plan: AttentionPlan
    segments: Segments | None
    logits_rows: torch.Tensor
    hidden_rows: torch.Tensor
    samplers: tuple[Sequence, ...]
    drafted: tuple[tuple[Sequence, list[int]], ...]
    scorers: tuple[Sequence, ...]
    prompts: tuple[tuple[Sequence, int], ...]
    embedders: tuple[tuple[Sequence, int], ...]
    advanced: tuple[tuple[Sequence, int], ...]
    num_decode: int
    num_prefill_tokens: int
    num_distinct_adapters: int
    merged: MergedWeights | None = None
    first_layer: int = 0
    is_greedy: bool = field(init=False)
    hidden: torch.Tensor | None = field(default=None, init=False)
    native: NativeStep | None = field(default=None, init=False)
    _moving: _Moving | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Note once what a step that is advanced asks again and again."""
        is_more = self.drafted or self.scorers or self.prompts
        self.is_greedy = not is_more and all(s.is_plain for s in self.samplers)

    @property
    def num_drafted_tokens(self) -> int:
        """Tokens of all drafts."""
        return sum(len(draft) for _, draft in self.drafted)

    @property
    def readers(self) -> tuple[Sequence, ...]:
        """Every sequence that something is made for of what the step finds, once each."""
        more = (*self.drafted, *self.prompts, *self.embedders)
        return tuple(dict.fromkeys((*self.samplers, *self.scorers, *(s for s, _ in more))))

    def can_be_followed_by(self, scheduled: Scheduled) -> bool:
        """Whether ``scheduled`` is the same sequences again, one token each, as in this step.

        Who has lost its place meanwhile comes back with something to read, so equal sequences have
        the slots and adapters that they had.
        """
        return not scheduled.prefill and not self.plan.chunks and scheduled.decode == self.samplers

    def advance(self) -> None:
        """Become the step after this one, which it can be followed by: a token and a position on.

        In place, and without a torch operator where the model runs on the host: an operator whose code
        the layers have driven out of the caches costs 30 to 100 microseconds (docs/log.md).
        """
        if self._moving is None:
            self._moving = _Moving(self)
        self._moving.follow(self.samplers)
        plan = self.plan
        # A new one, for what was worked out of the old one's tensors is no longer true.
        self.plan = AttentionPlan(
            plan.cache, plan.slots, plan.positions, plan.num_decode, plan.chunks, plan.lengths
        )

    @property
    def first_score_row(self) -> int:
        """Where the scorers' rows begin among the logits."""
        return len(self.samplers) + len(self.drafted) + self.num_drafted_tokens

    @property
    def first_prompt_row(self) -> int:
        """Where the prompts' rows begin among the logits."""
        return self.first_score_row + sum(1 + s.num_branch_tokens for s in self.scorers)


class _Moving:
    """The arrays of a step of decode rows that are different in the step after it, written in place."""

    def __init__(self, batch: Batch) -> None:
        plan = batch.plan
        # Held for as long as their addresses are written to.
        self._held = (batch.token_ids, batch.position_ids, plan.positions, plan.lengths)
        (self._tokens, self._positions, self._cache_positions, self._lengths) = map(
            _array, self._held
        )

    def follow(self, sequences: tuple[Sequence, ...]) -> None:
        """Write where these sequences stand, one token each."""
        self._tokens[:] = [sequence.token_ids[-1] for sequence in sequences]
        positions = [sequence.num_computed for sequence in sequences]
        self._positions[:] = positions
        self._cache_positions[:] = positions
        self._lengths[:] = [position + 1 for position in positions]


_KINDS = {torch.int64: ctypes.c_int64, torch.int32: ctypes.c_int32}


def _array(tensor: torch.Tensor) -> Any:
    """Return the elements of a contiguous tensor of integers on the host as an array, not a copy."""
    return (_KINDS[tensor.dtype] * tensor.numel()).from_address(tensor.data_ptr())


class _Rows:
    """The flat row while it grows."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.cache_positions: list[int] = []
        self.slots: list[int] = []
        self.entries: list[PoolEntry | None] = []

    def extend(
        self, sequence: Sequence, tokens: list[int], positions: list[int], first_cache: int
    ) -> None:
        """Add tokens whose keys go to the cache from ``first_cache`` on."""
        self.tokens += tokens
        self.positions += positions
        self.cache_positions += range(first_cache, first_cache + len(tokens))
        self.slots += [sequence.slot] * len(tokens)
        # Positions ascend, or all lie behind the prompt.
        num_base = 0
        if positions and positions[0] < sequence.request.active_from:
            num_base = min(sequence.request.active_from - positions[0], len(tokens))
        self.entries += [None] * num_base + [sequence.entry] * (len(tokens) - num_base)


def build_batch(
    scheduled: Scheduled,
    cache: KVCache,
    *,
    device: torch.device,
    long_from: int,
    drafts: Mapping[Sequence, list[int]] | None = None,
    last: Batch | None = None,
) -> Batch:
    """Lay out a step: decode rows, then drafts and prompts in chunks.

    Most steps are the one before, ``last``, a token on: then nothing is laid out anew, and ``last`` is
    what is returned.
    """
    if last is not None and not drafts and last.can_be_followed_by(scheduled):
        last.advance()
        return last
    rows = _Rows()
    drafts = drafts or {}
    decode = [s for s in scheduled.decode if s not in drafts]
    for sequence in decode:
        position = sequence.num_computed
        rows.extend(sequence, [sequence.token_ids[position]], [position], position)
    samplers = list(decode)
    scorers: list[Sequence] = []
    scorer_rows: list[int] = []
    prompts: list[tuple[Sequence, int]] = []
    prompt_rows: list[int] = []
    embedders: list[tuple[Sequence, int]] = []
    hidden_rows: list[int] = []
    sampler_rows = list(range(len(decode)))
    chunks: list[Chunk] = []
    advanced = [(sequence, 1) for sequence in decode]
    draft_rows: list[int] = []
    for sequence, draft in drafts.items():
        start = sequence.num_computed
        tokens = [sequence.token_ids[start], *draft]
        first_row = len(rows.tokens)
        rows.extend(sequence, tokens, list(range(start, start + len(tokens))), start)
        draft_rows += range(first_row, len(rows.tokens))
        chunks.append(Chunk(first_row, len(tokens), sequence.slot, start))
    num_decode_rows = len(rows.tokens)
    for sequence, count in scheduled.prefill:
        first_row, start = len(rows.tokens), sequence.num_computed
        stop = start + count
        rows.extend(sequence, sequence.token_ids[start:stop], list(range(start, stop)), start)
        if sequence.request.sampling.prompt_logprobs is not None:
            # Each row says what its next token's probability was; who was preempted has some already.
            first = max(start, len(sequence.prompt_logprobs))
            wanted = range(first, min(stop, sequence.num_prompt - 1))
            prompts.append((sequence, len(wanted)))
            prompt_rows += [first_row + position - start for position in wanted]
        if sequence.pool is not None:
            pooled = sequence.pool.wanted(sequence, start, stop)
            embedders.append((sequence, len(pooled)))
            hidden_rows += [first_row + position - start for position in pooled]
        is_last = stop == len(sequence.token_ids)
        tree = None
        if is_last and sequence.request.labels:
            scorers.append(sequence)
            scorer_rows.append(len(rows.tokens) - 1)
            first_branch = len(rows.tokens)
            tree = _add_branches(rows, sequence, start, count, device)
            scorer_rows += range(first_branch, len(rows.tokens))
        elif is_last and sequence.request.is_text:
            samplers.append(sequence)
            sampler_rows.append(len(rows.tokens) - 1)
        length = len(rows.tokens) - first_row
        chunks.append(Chunk(first_row, length, sequence.slot, start, tree))
        advanced.append((sequence, count))
    return Batch(
        token_ids=torch.tensor([rows.tokens]),
        position_ids=torch.tensor([rows.positions]),
        plan=AttentionPlan(
            cache,
            torch.tensor(rows.slots, dtype=torch.int32),
            torch.tensor(rows.cache_positions, dtype=torch.int32),
            len(decode),
            chunks,
        ),
        segments=Segments.build(rows.entries, device=device, long_from=long_from),
        logits_rows=torch.tensor(
            sampler_rows + draft_rows + scorer_rows + prompt_rows, dtype=torch.long
        ),
        hidden_rows=torch.tensor(hidden_rows, dtype=torch.long, device=device),
        samplers=tuple(samplers),
        drafted=tuple(drafts.items()),
        scorers=tuple(scorers),
        prompts=tuple(prompts),
        embedders=tuple(embedders),
        advanced=tuple(advanced),
        num_decode=len(scheduled.decode),
        num_prefill_tokens=len(rows.tokens) - num_decode_rows,
        num_distinct_adapters=len({id(e) for e in rows.entries if e is not None})
        + (scheduled.merged is not None),
        merged=scheduled.merged,
        first_layer=cache.shape.shared_layers if scheduled.is_above else 0,
    )


def _add_branches(
    rows: _Rows, sequence: Sequence, start: int, count: int, device: torch.device
) -> torch.Tensor | None:
    """Append every label but its last token behind the prompt's last chunk, side by side.

    Each branch continues the prompt on its own: its positions begin at the prompt's end, and it
    sees the prompt and itself. One prefill so scores all labels.

    Returns:
        The mask bool [chunk, start + chunk], or None when every label is a single token.
    """
    prompt = sequence.num_prompt
    cache_position = prompt
    spans: list[tuple[int, int]] = []
    for label in sequence.request.labels:
        branch = list(label[:-1])
        rows.extend(sequence, branch, list(range(prompt, prompt + len(branch))), cache_position)
        spans.append((cache_position, len(branch)))
        cache_position += len(branch)
    if cache_position == prompt:
        return None
    total = cache_position
    position = torch.arange(total, device=device)
    mask = position <= torch.arange(start, total, device=device)[:, None]
    for first, length in spans:
        # A branch row sees no other branch.
        mask[first - start : first - start + length, prompt:first] = False
    return mask
