"""What a server answers, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["mean", "last"]
"""How the hidden states of an input's tokens become one vector."""
FinishReason = Literal["stop", "length", "tool_calls"]
Execution = Literal["auto", "batched", "merged"]
"""How an adapter takes part: beside the base's products, folded into a copy of them, or as the server sees fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one answer; ``cached_tokens`` of the prompt were not read again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the server's time went, in seconds."""

    queue_s: float
    adapter_load_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedAdapter:
    """One adapter of a composition, and what its change of the base was multiplied by."""

    ref: str
    name: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What really answered. ``name``, ``version`` and ``digest`` are empty for the bare base.

    A composition's ``digest`` is ``mix:sha256:…``, computed from those of its ``parts`` and their weights.
    ``canary`` says that the alias's canary answered, and not the version that it points at; ``is_merged``
    that the answer ended on merged weights.
    """

    ref: str
    name: str
    version: int
    digest: str
    base_fingerprint: str
    quantization: str
    request_id: str
    timings: Timings
    parts: tuple[ComposedAdapter, ...] = ()
    canary: bool = False
    is_merged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """Natural-log probabilities at one position: (token id, logprob), the best ones in ``top``."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the model asked for; ``arguments`` is an object as JSON."""

    id: str
    name: str
    arguments: str

    def to_message(self) -> dict[str, object]:
        """Return it as an assistant's message holds it: an item of ``tool_calls``."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallPiece:
    """New parts of the answer's call number ``index``; ``id`` and ``name`` are in its first piece only."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New text, tokens and parts of tool calls of answer ``index``; tokens may run ahead of the text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    tool_calls: tuple[ToolCallPiece, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """One whole answer. ``matched_stop`` is the stop string or end token that ended it.

    ``tool_calls`` are the functions that the model asked for; the text leaves them out. The last one is cut off
    in its arguments if ``finish_reason`` is ``length``.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str
    usage: Usage
    receipt: Receipt
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    index: int = 0
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Labels with their probabilities (they sum to 1) and log probabilities, most likely first."""

    label: str
    probabilities: dict[str, float]
    logprobs: dict[str, float]
    usage: Usage
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """How likely a text is behind a prompt: ``logprob`` is the sum of its tokens' ``logprobs`` (natural logarithm)."""

    text: str
    logprob: float
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The continuations of one prompt, in the order they were sent."""

    texts: tuple[ScoredText, ...]
    usage: Usage
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The vector of one input: float32 numbers, as many as the base's hidden size unless fewer were asked for."""

    values: tuple[float, ...]
    usage: Usage
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids of a prompt, and the text of each."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """The server's base, limits and load.

    ``steps_by_distinct_adapters[k]`` is how many steps held k different adapters.
    """

    version: str
    base: str
    base_fingerprint: str
    quantization: str
    device: str
    dtype: str
    max_context: int
    max_batch: int
    max_rank: int
    adapter_memory_bytes: int
    adapter_memory_used_bytes: int
    steps_by_distinct_adapters: tuple[int, ...]
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A version and its state on the server."""

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    residency: Literal["registry", "loading", "resident", "unloading"]
    pinned: bool
    rank: int
    device_bytes: int
    num_running: int
    task: str
    verified: str = ""
    """``passed``, ``failed`` or ``no probes``; empty while its golden probes have not run."""
    verified_divergence: float = 0.0
    """Mean divergence of its probes in nats; ``verified_limit`` is the most that is allowed."""
    verified_limit: float = 0.0
    quarantined: bool = False
    """Refused until ``load_adapter`` names it: it failed its checks."""
    num_served: int = 0
    """Calls that it answered since the server started."""
    last_used_s: float = 0.0
    """When it last answered one, in seconds since 1970; 0: never."""
    canaries: tuple[tuple[str, float, float], ...] = ()
    """Aliases whose canary it is: alias, percent of calls, percent of copies."""
    num_pages: int = 0
    """Pages it takes on the device."""
    merged: str = ""
    """``building``, ``ready`` or ``leaving``: its merged copy; empty where there is none."""
    merged_bytes: int = 0
    merged_running: int = 0
    """Answers that run on the merged copy, or wait for it."""
    merged_divergence: float = 0.0
    """Mean divergence of its probes on the merged copy, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutInfo:
    """A canary on the server: what the alias log says of it, and what was measured.

    ``state`` is ``loading``, ``running``, ``failed`` or ``passed``; running or passed, it gets calls.
    """

    name: str
    alias: str
    holder_version: int
    canary_version: int
    percent: float
    shadow: float
    state: str
    problem: str
    holder_calls: int
    holder_errors: int
    holder_p95_s: float
    canary_calls: int
    canary_errors: int
    canary_p95_s: float
    num_compared: int
    num_same: int
    divergence: float
    since: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Adapters and rollouts on the server.

    ``behind`` says why refs in use do not get what they mean by now; ``registry_trouble`` why the registry
    is away, empty while it is not.
    """

    adapters: tuple[AdapterInfo, ...]
    rollouts: tuple[RolloutInfo, ...]
    behind: dict[str, str]
    registry_trouble: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEvent:
    """Something that happened; ``kind`` is ``resident``, ``evicted``, ``alias_moved`` or another."""

    kind: str
    name: str
    version: int
    digest: str
    alias: str
    detail: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost:
    """So many events were lost, because they were read too slowly; a snapshot follows."""

    num_lost: int
