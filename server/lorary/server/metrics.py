"""Every metric of the server, declared once, children bound once.

``ServerMetrics`` is what the engine and the residency report to (``ports.Observer``), from their
own threads; prometheus_client's metrics are safe for that. What every step or token tells has one writer: the
engine's thread, or the event loop. Gauges that mirror a state (what is resident, what runs now) are read when
Prometheus asks, by ``StateCollector``.

Names are ``lorary_*``; docs/operations.md lists them, and a test compares.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from lorary.server.histogram import OneWriterHistogram
from lorary.server.state_metrics import StateCollector
from lorary.server.top_adapters import TopAdapters

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.errors import LoraryError
    from lorary.server.adapters.probe_runs import Verdict
    from lorary.server.answers import ServerFacts
    from lorary.server.engine.request import Finish, Output, StepStats
    from lorary.server.ports import EngineLike, MergingLike, ResidencyLike

DIVERGENCE_NATS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# vLLM's and SGLang's bounds joined at their low ends, so that small models show, too.
TTFT_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    20,
    40,
    80,
)
ITL_S = (
    0.001,
    0.002,
    0.004,
    0.006,
    0.008,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.2,
    0.4,
    0.8,
    2,
    8,
)
CALL_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4)
LOAD_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
PREFILL_TOKENS = (0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Bucket bounds, in seconds or counts."""

BARE_BASE = "_base"


class ServerMetrics:
    """The server's metrics, in a registry of their own.

    Args:
        num_tracked_adapters: adapters that have series of their own; the others share ``_other``.
        on_failure: called once, on the engine's thread, when the engine breaks.
    """

    def __init__(
        self,
        *,
        num_tracked_adapters: int = 100,
        on_failure: Callable[[BaseException], object] | None = None,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.on_failure = on_failure
        self._last: StepStats | None = None
        self._steps_by_distinct: list[int] = []
        self._declare_calls()
        self._declare_steps()
        self._declare_adapters(num_tracked_adapters)
        ProcessCollector(registry=self.registry)

    def _declare_calls(self) -> None:
        r = self.registry
        self._requests = Counter(
            "lorary_requests",
            "Calls that ended, by method and status.",
            ["method", "code"],
            registry=r,
        )
        self._request_seconds = Histogram(
            "lorary_request_seconds",
            "Whole calls, from arrival to end.",
            ["method"],
            buckets=CALL_S,
            registry=r,
        )
        tokens = Counter("lorary_tokens", "Tokens read and generated.", ["kind"], registry=r)
        self.prompt_tokens = tokens.labels("prompt")
        self.generated_tokens = tokens.labels("generation")
        self.cached_tokens = Counter(
            "lorary_cached_tokens",
            "Prompt tokens that another answer had computed already.",
            registry=r,
        )
        self.cached_base_tokens = Counter(
            "lorary_cached_base_tokens",
            "Those of them before an aLoRA's invocation: the base or another aLoRA had computed them.",
            registry=r,
        )
        self.cached_below_tokens = Counter(
            "lorary_cached_below_tokens",
            "Further ones of which another answer had computed the shared layers (--shared-layers).",
            registry=r,
        )
        self.time_to_first_token = Histogram(
            "lorary_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=TTFT_S,
            registry=r,
        )
        self.inter_token = OneWriterHistogram(
            "lorary_inter_token_seconds",
            "Between two tokens of an answer.",
            buckets=ITL_S,
            registry=r,
        )
        self.queue_seconds = Histogram(
            "lorary_queue_seconds",
            "From arrival to the first step, adapter load included.",
            buckets=TTFT_S,
            registry=r,
        )

    def _declare_steps(self) -> None:
        r = self.registry
        self._step_seconds = OneWriterHistogram(
            "lorary_step_seconds",
            "One forward pass over the running batch.",
            buckets=STEP_S,
            registry=r,
        )
        self._step_rows = OneWriterHistogram(
            "lorary_step_decode_rows",
            "Answers that decoded a token in one step.",
            buckets=ROWS,
            registry=r,
        )
        self._step_prefill = OneWriterHistogram(
            "lorary_step_prefill_tokens",
            "Prompt tokens read in one step.",
            buckets=PREFILL_TOKENS,
            registry=r,
        )
        self._step_distinct = OneWriterHistogram(
            "lorary_step_distinct_adapters",
            "Adapters that shared one step.",
            buckets=ROWS,
            registry=r,
        )
        drafted = Counter(
            "lorary_drafted_tokens",
            "Tokens guessed from the text so far.",
            ["result"],
            registry=r,
        )
        self._preemptions = Counter(
            "lorary_preemptions",
            "Answers that lost their place for want of KV memory and went on later.",
            registry=r,
        )
        self._kept, self._dropped = drafted.labels("kept"), drafted.labels("dropped")
        self._engine_up = Gauge("lorary_engine_up", "1 while the engine can step.", registry=r)
        self._engine_up.set(1)

    def _declare_adapters(self, num_tracked: int) -> None:
        r = self.registry
        loads = Counter("lorary_adapter_loads", "Adapter loads that ended.", ["result"], registry=r)
        self._loads_ok, self._loads_failed = loads.labels("ok"), loads.labels("error")
        self._load_seconds = Histogram(
            "lorary_adapter_load_seconds",
            "Loads from registry to device.",
            buckets=LOAD_S,
            registry=r,
        )
        self._evictions = Counter(
            "lorary_adapter_evictions", "Adapters that left the device.", ["cause"], registry=r
        )
        for cause in ("memory", "unload"):
            self._evictions.labels(cause)  # a rate needs the zero before the first one
        self._verifications = Counter(
            "lorary_adapter_verifications",
            "Versions whose golden probes were replayed, or that have none.",
            ["result"],
            registry=r,
        )
        for result in ("passed", "failed", "no_probes"):
            self._verifications.labels(result)
        self._divergence = Histogram(
            "lorary_adapter_divergence_nats",
            "Mean divergence of a version's golden probes from what was recorded.",
            buckets=DIVERGENCE_NATS,
            registry=r,
        )
        merges = Counter(
            "lorary_merges", "Merged copies that were asked for.", ["result"], registry=r
        )
        self._merges_ok, self._merges_refused = merges.labels("ok"), merges.labels("refused")
        self._merge_seconds = Histogram(
            "lorary_merge_seconds",
            "From the start of a merge to its first use, probes included.",
            buckets=LOAD_S,
            registry=r,
        )
        self._unmerges = Counter(
            "lorary_unmerges", "Merged copies that were let go of.", ["cause"], registry=r
        )
        for cause in ("idle", "memory", "replaced", "share", "unload"):
            self._unmerges.labels(cause)
        self._merged_tokens = Counter(
            "lorary_merged_tokens", "Tokens generated on merged weights.", registry=r
        )
        self.adapters = TopAdapters(num_tracked, registry=r)

    def describe(self, facts: ServerFacts) -> None:
        """Publish what the server is, as ``lorary_build_info``."""
        info = Info("lorary_build", "What runs here.", registry=self.registry)
        info.info(
            {
                "version": facts.version,
                "base": facts.base,
                "base_fingerprint": facts.base_fingerprint,
                "quantization": facts.quantization,
                "device": facts.device,
                "dtype": facts.dtype,
            }
        )

    def watch(
        self, engine: EngineLike, residency: ResidencyLike, merging: MergingLike | None = None
    ) -> None:
        """Read these when Prometheus asks; once, when they exist."""
        self.registry.register(StateCollector(self, engine, residency, merging))

    def watch_process(self, pid: int) -> None:
        """Read the engine's process as this one is read, under names of its own."""
        ProcessCollector("lorary_engine", lambda: pid, registry=self.registry)

    @property
    def last_step(self) -> StepStats | None:
        """Figures of the last step; ``None`` before the first."""
        return self._last

    @property
    def steps_by_distinct_adapters(self) -> list[int]:
        """Entry k is how many steps held k distinct adapters."""
        return list(self._steps_by_distinct)

    def answer(self, adapter: str, arrived_s: float) -> AnswerMeter:
        """Return what measures one answer of ``adapter`` (``""``: the bare base)."""
        return AnswerMeter(self, adapter or BARE_BASE, arrived_s)

    def on_call(self, method: str, code: str, seconds: float) -> None:
        """Count one finished call; ``method`` is a registered one, so the labels are bounded."""
        name = method.rsplit("/", 1)[-1]
        self._requests.labels(name, code).inc()
        self._request_seconds.labels(name).observe(seconds)

    def on_step(self, stats: StepStats) -> None:
        """One step has ended; called on the engine's thread."""
        self._last = stats
        self._step_seconds.observe(stats.seconds)
        self._step_rows.observe(stats.num_decode_rows)
        self._step_prefill.observe(stats.num_prefill_tokens)
        self._step_distinct.observe(stats.num_distinct_adapters)
        if stats.num_preempted:
            self._preemptions.inc(stats.num_preempted)
        if stats.num_merged_rows:
            self._merged_tokens.inc(stats.num_merged_rows)
        if stats.num_drafted_tokens:
            self._kept.inc(stats.num_kept_tokens)
            self._dropped.inc(stats.num_drafted_tokens - stats.num_kept_tokens)
        counts = self._steps_by_distinct
        while len(counts) <= stats.num_distinct_adapters:
            counts.append(0)
        counts[stats.num_distinct_adapters] += 1

    def on_error(self, error: BaseException) -> None:
        """The engine broke; called on its thread."""
        self._engine_up.set(0)
        if self.on_failure is not None:
            self.on_failure(error)

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """One load has ended; ``name`` is a real adapter's."""
        if error is not None:
            self._loads_failed.inc()
            return
        self._loads_ok.inc()
        self._load_seconds.observe(seconds)

    def on_verify(self, name: str, verdict: Verdict) -> None:
        """One version's golden probes have run; ``name`` is a real adapter's."""
        self._verifications.labels(verdict.state.replace(" ", "_")).inc()
        if verdict.num_probes:
            self._divergence.observe(verdict.divergence)

    def on_evict(self, cause: str) -> None:
        """One adapter left the device."""
        self._evictions.labels(cause).inc()

    def on_merge(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """One adapter is merged, or could not be."""
        if error is not None:
            self._merges_refused.inc()
            return
        self._merges_ok.inc()
        self._merge_seconds.observe(seconds)

    def on_unmerge(self, cause: str) -> None:
        """One merged copy is let go of."""
        self._unmerges.labels(cause).inc()


class AnswerMeter:
    """Measures one answer, output by output; on the event loop.

    Tokens count as they come, so that cancelled answers count, too.
    """

    def __init__(self, metrics: ServerMetrics, adapter: str, arrived_s: float) -> None:
        self._metrics = metrics
        self._adapter = adapter
        self._arrived_s = arrived_s
        self._last_token_s = 0.0

    def on_output(self, output: Output) -> None:
        """Count what one step made of the answer."""
        if output.token_ids:
            self._on_tokens(len(output.token_ids))
        if output.finish is not None:
            self._on_finish(output.finish)

    def _on_tokens(self, count: int) -> None:
        now, metrics = time.monotonic(), self._metrics
        metrics.generated_tokens.inc(count)
        if self._last_token_s:
            metrics.inter_token.observe((now - self._last_token_s) / count)
        else:
            metrics.time_to_first_token.observe(now - self._arrived_s)
        self._last_token_s = now

    def _on_finish(self, finish: Finish) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.inc(finish.prompt_tokens)
        metrics.cached_tokens.inc(finish.cached_tokens)
        metrics.cached_base_tokens.inc(finish.cached_base_tokens)
        metrics.cached_below_tokens.inc(finish.cached_below_tokens)
        metrics.queue_seconds.observe(finish.queue_ns / 1e9)
        metrics.adapters.add(
            self._adapter,
            prompt_tokens=finish.prompt_tokens,
            generated_tokens=finish.completion_tokens,
        )
