"""The nouns that service, scheduler and engine share; no torch.

A call becomes one ``Request`` per answer (``n`` answers: ``n`` requests with the same id and
different ``index``). The service submits it, the engine answers with ``Output`` values, in order,
the last of which has ``finish`` or ``error`` set.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.errors import LoraryError
    from lorary.server.adapters.merged import MergedWeights
    from lorary.server.adapters.segments import PoolEntry

FinishReason = Literal["stop", "length", "scored", "embedded"]
Execution = Literal["auto", "batched", "merged"]
"""How a request's adapter takes part: added behind the base's products, or folded into a copy of its weights."""

Owner = tuple[str, int]
"""Whose keys and values they are: a digest, and the position from which on it is active."""
BASE: Owner = ("", 0)
"""The bare base's."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be: a grammar of one of four kinds, as its caller wrote it.

    ``choice`` holds a JSON list of texts.
    """

    kind: Literal["choice", "json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the service has checked every range (inference.proto)."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    shown_ids: tuple[int, ...] = ()
    """Special tokens that the text shows; it leaves out all others."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, with nothing drawn at random."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return (
            self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a prompt's hidden states, which enter the head, become one vector.

    Attributes:
        kind: the mean over all tokens, or the last one's.
        dimensions: how many components are kept, the first ones; 0 keeps all.
        is_normalized: whether what is kept is made to have length 1.
    """

    kind: Literal["mean", "last"]
    dimensions: int = 0
    is_normalized: bool = False


class Matcher(Protocol):
    """Where one answer stands in its grammar; ``lorary.server.engine.constraints`` has the real one."""

    def apply(self, logits: Any) -> None:
        """Set what may not come next to -inf, in a row of logits float32 [vocab]."""
        ...

    def consume(self, token: int) -> str:
        """Go on by one token; return why that is impossible, "" when it is not."""
        ...

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        """Return what is known to come next, else as many of ``tokens`` as may; at most ``limit``."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end can follow."""
        ...


class Grammar(Protocol):
    """A constraint that was compiled."""

    def matcher(self) -> Matcher:
        """Return a walk through it from its beginning, for one answer."""
        ...


class Lease(Protocol):
    """A hold on one adapter's place on the device, from admission to the end of the request."""

    @property
    def digest(self) -> str:
        """The version's digest; ``""`` for the bare base."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether the adapter is on the device and may be used in a step."""
        ...

    @property
    def error(self) -> LoraryError | None:
        """Why the load failed, if it did."""
        ...

    def release(self) -> None:
        """Give the hold back; idempotent, callable from any thread."""
        ...


class DeviceLease(Lease, Protocol):
    """What the engine needs of a lease beyond what the service sees."""

    @property
    def entry(self) -> PoolEntry | None:
        """The adapter's place in the pool once ready; None for the bare base."""
        ...

    @property
    def load_ns(self) -> int:
        """Nanoseconds from ``acquire`` until it was ready; 0 when it was resident."""
        ...


class MergeableLease(DeviceLease, Protocol):
    """A lease whose answer may run on merged weights."""

    def take(self) -> MergedWeights | None:
        """Return the weights that the answer runs on from now on, held; None for the base's.

        Asked on the engine's thread each time that the answer is about to get a place.
        """
        ...

    def give_up(self) -> None:
        """Let go of merged weights that are to be freed at once; no step reads them for this answer now."""
        ...


@dataclass(slots=True, kw_only=True)
class Request:
    """One answer to be made: text, or with ``labels`` (token ids each) scores, or with ``pooling`` a vector.

    Unless ``execution`` is "batched", the lease is a ``MergeableLease``; ``is_on_merged`` is the engine's to set.

    ``grammar`` is ``sampling.constraint``, compiled. ``arrived_s`` and ``deadline_s`` are values of
    ``time.monotonic()``. A higher ``priority`` gets a place sooner. ``account`` is the digest whose share of
    the server pays for it; empty: the lease's. Without ``keep_prefix`` its keys and values are nobody's
    once it has ended; else they are shared between requests of the same ``salt`` only. The adapter is on
    from position ``active_from`` of the prompt; what is before is the bare base's (aLoRA, ``invocation``).
    """

    request_id: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    lease: Lease
    index: int = 0
    labels: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None
    grammar: Grammar | None = None
    priority: int = 0
    account: str = ""
    keep_prefix: bool = True
    arrived_s: float = 0.0
    deadline_s: float | None = None
    salt: str = ""
    active_from: int = 0
    execution: Execution = "batched"
    is_on_merged: bool = False

    @property
    def scope(self) -> tuple[str, str]:
        """Requests of equal scope may share a beginning: who computes the first position, and the salt."""
        return ("" if self.active_from else self.owner[0], self.salt)

    @property
    def owner(self) -> Owner:
        """Whose keys and values are those from ``active_from`` on.

        Merged weights are rounded as a whole, and the base's are not rounded again with an adapter beside
        them: an answer that asks to be batched must not read what merged weights have written.
        """
        digest = self.lease.digest
        return (f"{digest}/merged" if self.is_on_merged else digest, self.active_from)

    @property
    def is_text(self) -> bool:
        """Whether tokens are to be generated."""
        return not self.labels and self.pooling is None

    @property
    def needs_every_row(self) -> bool:
        """Whether something is wanted of each of its prompt's rows, which keys and values cannot stand for."""
        is_mean = self.pooling is not None and self.pooling.kind == "mean"
        return is_mean or self.sampling.prompt_logprobs is not None

    @property
    def num_base(self) -> int:
        """How many positions, from the first on, the bare base computes; all of a request to it."""
        return self.active_from if self.lease.digest else sys.maxsize

    def same_until(self, other: Request) -> int:
        """Return up to which position equal tokens have equal keys and values, and both may know it."""
        if self.salt != other.salt:
            return 0
        return sys.maxsize if self.owner == other.owner else min(self.num_base, other.num_base)

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it among all running requests."""
        return (self.request_id, self.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """Natural-log probabilities at one position: the token there, then the best ones."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How one answer ended: the reason, the whole text, counts, and durations in nanoseconds.

    ``cached_tokens`` of the prompt were not read again; ``cached_base_tokens`` of them stand before an
    aLoRA's invocation. Of ``cached_below_tokens`` further ones only the layers behind the shared ones were run.
    """

    reason: FinishReason
    text: str
    matched_stop: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_ns: int
    adapter_load_ns: int
    prefill_ns: int
    decode_ns: int
    label_token_logprobs: tuple[tuple[float, ...], ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    embedding: tuple[float, ...] = ()
    cached_base_tokens: int = 0
    cached_below_tokens: int = 0
    is_merged: bool = False
    """Whether its last step ran on merged weights."""

    @property
    def label_logprobs(self) -> tuple[float, ...]:
        """Of each label as a whole."""
        return tuple(sum(tokens) for tokens in self.label_token_logprobs)


# One is made for every token: by position it takes a third of the time.
@dataclass(slots=True)
class Output:
    """What one step made of one request."""

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None
    error: LoraryError | None = None


# Not frozen: that would take four times as long to make, and one is made in every step.
@dataclass(slots=True, kw_only=True)
class StepStats:
    """Figures of one step, for metrics."""

    seconds: float
    num_decode_rows: int
    num_prefill_tokens: int
    num_drafted_tokens: int = 0
    num_kept_tokens: int = 0
    num_distinct_adapters: int
    num_running: int
    num_waiting: int
    num_waiting_for_adapter: int
    num_preempted: int = 0
    num_merged_rows: int = 0
    kv_tokens_used: int
    kv_tokens_total: int
