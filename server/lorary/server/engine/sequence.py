"""One running answer: the engine's mutable side of a ``Request``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

    from lorary.server.adapters.merged import MergedWeights
    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.engine.blocks import Node
    from lorary.server.engine.detokenizer import TextStream
    from lorary.server.engine.fair_queue import Account
    from lorary.server.engine.pooling import Pool
    from lorary.server.engine.request import Matcher, PositionLogprobs, Request
    from lorary.server.engine.speculation import Drafter


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request's state between steps; touched by the engine thread only.

    Attributes:
        request: what was asked.
        token_ids: prompt and answer so far.
        num_computed: tokens whose keys and values are in the cache.
        num_below: positions, from the first on, whose keys and values in the shared layers are in its blocks, with
            what the next layer reads of them; says nothing where it is not more than ``num_computed``.
        num_cached: tokens of the prompt that another sequence had computed.
        num_cached_below: tokens of the prompt behind these of which another had computed the shared layers.
        slot: its row of the cache's table of blocks, -1 while it waits.
        blocks: blocks of the cache that hold its positions, in order.
        path: nodes of the tree that spell its beginning, one for each of the first blocks.
        entry: its adapter's place in the pool, None for the bare base and on merged weights.
        merged: the weights with its adapter in them that it runs on, None for the base's.
        text: turns ids into text, None where none are generated.
        drafter: guesses its next tokens, None where nobody does.
        matcher: where it stands in the grammar of its answer, None where it is free.
        prompt_logprobs: those of its prompt's tokens from the second on, as far as it has been read and
            they were asked for.
        pool: what the hidden states of its prompt have come to, where they are wanted.
        generator: its own stream of random numbers, None when greedy.
        account: what pays for it, while it runs; the queue's.
        num_prompt: tokens of the prompt.
        is_plain: whether its tokens are simply the most likely ones of all, with nothing reported of others.
    """

    request: Request
    token_ids: list[int]
    num_computed: int = 0
    num_below: int = 0
    num_cached: int = 0
    num_cached_below: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    entry: PoolEntry | None = None
    merged: MergedWeights | None = None
    text: TextStream | None = None
    generator: Random | None = None
    matcher: Matcher | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    pool: Pool | None = None
    drafter: Drafter | None = None
    started_ns: int = 0
    first_token_ns: int = 0
    arrived_ns: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    account: Account | None = None
    num_prompt: int = field(init=False)
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        """Note once what every step asks."""
        self.num_prompt = len(self.request.prompt_ids)
        sampling = self.request.sampling
        self.is_plain = (
            sampling.is_greedy
            and not sampling.has_penalties
            and not sampling.logit_bias
            and not sampling.min_tokens
            and sampling.logprobs is None
            and self.request.grammar is None
        )

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model has not read yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Whether it has more to read than its next token: its prompt, or all of it once preempted."""
        computed = self.num_computed
        return computed < self.num_prompt or len(self.token_ids) - computed > 1

    @property
    def num_branch_tokens(self) -> int:
        """Label tokens that the last prefill chunk reads beside the prompt (scoring requests)."""
        return sum(len(label) - 1 for label in self.request.labels)
