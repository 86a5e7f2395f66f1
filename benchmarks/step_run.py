"""The order of events of ``step``, and its table."""

from __future__ import annotations

import random
import tempfile
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
from benchmarks.synthetic import RANK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness.stepper import Stepper

NAME = "step"
ROWS = (1, 8, 32)
PROMPT_TOKENS = 128
WARM_UP = 4
QUIET = 0.1
"""Most cores that others may use on average."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps per figure.")] = 48,
    rows: Annotated[str, typer.Option(help="Sequences at once.")] = "1,8,32",
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Take decode steps apart."""
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
    }
    path = out or result_path(NAME)
    first = head(NAME, setup)
    kept = Kept(path, first, Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load))
    with tempfile.TemporaryDirectory(prefix="lorary-step-") as scratch:
        stepper, adapters, prompts = stage(
            Path(scratch), base, rows=max(counts), num_adapters=max(counts)
        )
        try:
            for count in counts:
                kept.measure(partial(_measure, stepper, prompts[:count], adapters[:count], steps))
        finally:
            stepper.close()
    kept.finish(console, table_of)


def stage(
    scratch: Path, name: str, *, rows: int, num_adapters: int, merge_memory_bytes: int = 0
) -> tuple[Stepper, list[str], list[tuple[int, ...]]]:
    """Return an engine in steps, its resident adapters of rank ``RANK``, and a prompt for every row."""
    import torch

    from benchmarks.harness.stepper import Stepper, make_library
    from benchmarks.library import adapter_bytes
    from benchmarks.setup import TEXT
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer
    from lorary.registry import Registry

    base = find_base(name)
    registry = Registry.open(scratch / "registry", create=True)
    with console.status("making adapters"):
        adapters = make_library(registry, base, scratch / "folder", num_adapters, RANK)
    stepper = Stepper(
        base,
        registry,
        dtype=torch.bfloat16,
        int8=False,
        max_rows=rows,
        adapter_memory_bytes=num_adapters * adapter_bytes(base, RANK),
        merge_memory_bytes=merge_memory_bytes,
    )
    stepper.load(adapters)
    prompts = Prompts(load_tokenizer(base), TEXT).take(rows, PROMPT_TOKENS, random.Random(0))
    return stepper, adapters, prompts


def _measure(
    stepper: Stepper, prompts: Sequence[Sequence[int]], adapters: Sequence[str], steps: int
) -> dict[str, Any]:
    import statistics

    stepper.start_rows(prompts, adapters, max_tokens=3 * steps + WARM_UP + 8)
    stepper.read_prompts()
    for _ in range(WARM_UP):
        stepper.step()
    whole_ms = 1e3 * statistics.median(stepper.time_steps(steps))
    times = stepper.profile(steps)
    stepper.end_rows()
    return {
        "kind": "step",
        "rows": len(prompts),
        "adapters": len(set(adapters)),
        "step_ms": round(whole_ms, 3),
        "parts_ms": {part: round(ms, 4) for part, ms in times.parts_ms.items()},
        "overhead_ms": round(times.overhead_ms, 3),
    }


def accepted_steps(records: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the accepted record of each number of rows."""
    return {r["rows"]: r for r in records if r["kind"] == "step" and r["accepted"]}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the parts of a step as Markdown, a column per number of rows."""
    found = accepted_steps(records)
    if not found:
        return "no step was measured on a quiet machine"
    names = next(iter(found.values()))["parts_ms"]
    lines = [
        row(["milliseconds", *(f"{n} row{'s' if n > 1 else ''}" for n in found)]),
        row(["---", *["---:"] * len(found)]),
        *(row([part, *(f"{r['parts_ms'][part]:.2f}" for r in found.values())]) for part in names),
        row(["**overhead**: all but what is native", *(f"**{r['overhead_ms']:.2f}**" for r in found.values())]),
        row(["the whole step, without the stopwatch", *(f"{r['step_ms']:.2f}" for r in found.values())]),
    ]  # fmt: skip
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup = records[0]["setup"]
    return "\n".join(
        [
            f"{origin(records[0])}; a different adapter of rank {setup['rank']} in every row, "
            f"contexts from {setup['prompt_tokens']} tokens on; medians of {setup['steps']} steps. "
            f"Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
