"""Run one cell of the matrix and say how fast it was, and how quiet the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness.load import CpuMeter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.kept import Quiet
    from benchmarks.workload import Call, Contender, Trace


def measure(
    contender: Contender,
    calls: Sequence[Call],
    *,
    concurrency: int,
    new_tokens: int,
    quiet: Quiet,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield a record per attempt, the last of which is accepted or the best that could be had; ``first`` is its number.

    Raises:
        RuntimeError: an answer does not have exactly ``new_tokens`` tokens.
    """
    for attempt in range(first, first + 1 + quiet.retries):
        meter = CpuMeter()
        traces = contender.run(calls, concurrency=concurrency, new_tokens=new_tokens)
        load = meter.stop()
        wrong = sorted({len(t.token_ids) for t in traces} - {new_tokens})
        if wrong:
            raise RuntimeError(f"{contender.name} answered with {wrong} tokens, not {new_tokens}")
        is_quiet = load.foreign <= quiet.max_foreign
        yield {
            **figures(traces),
            "attempt": attempt,
            "load": {"own_cores": load.own, "foreign_cores": load.foreign},
            "quiet": is_quiet,
            "accepted": is_quiet or quiet.tolerate,
        }
        if is_quiet or quiet.tolerate:
            return


def figures(traces: Sequence[Trace]) -> dict[str, Any]:
    """Return output tokens per second, first to last, and latency percentiles in milliseconds."""
    seconds = max(t.token_s[-1] for t in traces) - min(t.sent_s for t in traces)
    tokens = sum(len(t.token_ids) for t in traces)
    first = [t.token_s[0] - t.sent_s for t in traces]
    between = [gap for t in traces for gap in np.diff(t.token_s)]
    return {
        "seconds": round(seconds, 4),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "ttft_ms": percentiles(first),
        "itl_ms": percentiles(between),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return percentiles of seconds, in milliseconds."""
    values = np.percentile(seconds, (50, 95, 99)) * 1e3
    return {name: round(float(v), 2) for name, v in zip(("p50", "p95", "p99"), values, strict=True)}
