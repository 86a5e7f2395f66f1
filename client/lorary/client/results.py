"""What a server answers, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


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
class Receipt:
    """What really answered. ``name``, ``version`` and ``digest`` are empty for the bare base."""

    ref: str
    name: str
    version: int
    digest: str
    base_fingerprint: str
    quantization: str
    request_id: str
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """Natural-log probabilities at one position: (token id, logprob), the best ones in ``top``."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New text and tokens of answer ``index``; tokens may run ahead of the text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """One whole answer. ``matched_stop`` is the stop string or end token that ended it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str
    usage: Usage
    receipt: Receipt
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Labels with their probabilities (they sum to 1) and log probabilities, most likely first."""

    label: str
    probabilities: dict[str, float]
    logprobs: dict[str, float]
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
