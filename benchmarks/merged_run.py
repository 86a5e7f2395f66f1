"""The order of events of ``merged``, and its table."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.threads import pin_threads
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import origin, row
from benchmarks.step_run import PROMPT_TOKENS, QUIET, WARM_UP, stage
from benchmarks.synthetic import RANK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness.stepper import Stepper

NAME = "merged"
WAYS = ("batched", "merged")
MERGE_MEMORY_BYTES = 2 << 30
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of one round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each way in turn.")] = 5,
    rows: Annotated[str, typer.Option(help="Sequences at once.")] = "1,8,32",
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure steps of one adapter's rows beside the base and on merged weights."""
    if table:
        options.show(NAME, out, section)
        return
    counts = [int(part) for part in rows.split(",")]
    setup = {
        "base": base,
        "dtype": "bfloat16",
        "threads": pin_threads(threads),
        "rank": RANK,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": steps,
        "rounds": rounds,
    }
    path = out or result_path(NAME)
    kept = Kept(
        path,
        head(NAME, setup),
        Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load),
    )
    with tempfile.TemporaryDirectory(prefix="lorary-merged-") as scratch:
        stepper, (adapter,), prompts = stage(
            Path(scratch),
            base,
            rows=max(counts),
            num_adapters=1,
            merge_memory_bytes=MERGE_MEMORY_BYTES,
        )
        try:
            build_s = _build(stepper, adapter, prompts[0])
            for count in counts:
                kept.measure(
                    partial(_measure, stepper, adapter, prompts[:count], steps, rounds, build_s)
                )
        finally:
            stepper.close()
    kept.finish(console, table_of)


def _build(stepper: Stepper, adapter: str, prompt: Sequence[int]) -> float:
    """Merge the adapter by asking for it; return the seconds until its first prompt is read."""
    started = time.perf_counter()
    stepper.start_rows([prompt], [adapter], max_tokens=2, execution="merged")
    stepper.read_prompts()
    seconds = time.perf_counter() - started
    stepper.end_rows()
    return seconds


def _measure(
    stepper: Stepper,
    adapter: str,
    prompts: Sequence[Sequence[int]],
    steps: int,
    rounds: int,
    build_s: float,
) -> dict[str, Any]:
    """Decode and read prompts each way, in turn; medians over the rounds."""
    found: dict[str, list[float]] = {
        f"{way}_{what}": [] for way in WAYS for what in ("ms", "prompt_ms")
    }
    for _ in range(rounds):
        for way in WAYS:
            stepper.start_rows(
                prompts,
                [adapter] * len(prompts),
                max_tokens=steps + WARM_UP + 16,
                execution=way,  # type: ignore[arg-type]
            )
            started = time.perf_counter()
            stepper.read_prompts()
            found[f"{way}_prompt_ms"].append(1e3 * (time.perf_counter() - started))
            for _ in range(WARM_UP):
                stepper.step()
            step_s = statistics.median(stepper.time_steps(steps))
            found[f"{way}_ms"].append(1e3 * step_s)
            stepper.end_rows()
    return {
        "kind": "merged",
        "rows": len(prompts),
        "build_s": round(build_s, 3),
        **{name: round(statistics.median(values), 3) for name, values in found.items()},
        "rounds_ms": {way: [round(ms, 3) for ms in found[f"{way}_ms"]] for way in WAYS},
    }


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return tokens per second each way as Markdown, a line per number of rows."""
    accepted = [r for r in records if r["kind"] == "merged" and r["accepted"]]
    if not accepted:
        return "nothing was measured on a quiet machine"
    lines = [
        row(["rows", "batched, tokens/s", "merged, tokens/s", "merged / batched", "prompts: merged / batched"]),
        row(["---:"] * 5),
    ]  # fmt: skip
    for r in accepted:
        speeds = [1e3 * r["rows"] / r[f"{way}_ms"] for way in WAYS]
        lines.append(
            row(
                [
                    str(r["rows"]),
                    *(f"{speed:.1f}" for speed in speeds),
                    f"{speeds[1] / speeds[0]:.2f}",
                    f"{r['batched_prompt_ms'] / r['merged_prompt_ms']:.2f}",
                ]
            )
        )
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup = records[0]["setup"]
    return "\n".join(
        [
            f"{origin(records[0])}; one adapter of rank {setup['rank']} on every linear layer in every row, prompts of "
            f"{setup['prompt_tokens']} tokens; medians of {setup['rounds']} rounds of {setup['steps']} steps, each way in "
            f"turn. From asking for the copy to its first prompt: {records[0]['build_s']:.1f} s. Records: "
            f"`benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
