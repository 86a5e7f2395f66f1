"""The order of events of ``mixes``, and its table."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.threads import pin_threads, unbind
from benchmarks.kept import Quiet
from benchmarks.markdown import origin, row
from benchmarks.mix_cases import (
    KNOWN,
    MIXED_RANKS,
    NUM_FITTING,
    NUM_KNOWN,
    ONE_RANK,
    RESIDENT,
    Case,
    calls,
    cases,
    members,
)
from benchmarks.synthetic import RANK
from benchmarks.workload import Contender

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.contenders.lorary_engine import LoraryEngine
    from benchmarks.workload import Call, Trace
    from lorary.errors import LoraryError
    from lorary.registry import Registry

NAME = "mixes"
COMPARED = ((KNOWN, RESIDENT), (MIXED_RANKS, ONE_RANK))
console = Console(stderr=True, highlight=False, soft_wrap=True)


class Comings:
    """Counts loads and evictions; told from worker threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.loads = self.evictions = 0

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """A load ended."""
        with self._lock:
            self.loads += error is None

    def on_evict(self, cause: str) -> None:
        """A version left."""
        with self._lock:
            self.evictions += 1


class PreparedRun(Contender):
    """A case as a contender: every run, a repeated one, too, begins with the same adapters resident."""

    name = ""

    def __init__(
        self, case: Case, engine: LoraryEngine, registry: Registry, folder: Path, comings: Comings
    ) -> None:
        self.name = case.name
        self.case = case
        self._engine = engine
        self._registry = registry
        self._folder = folder
        self._comings = comings
        self.counted: dict[str, int] = {}

    def prepare(self, adapters: Sequence[str]) -> None:
        """Hold each adapter for a moment, the most popular last, so that they are the newest."""
        for name in reversed(adapters):
            self._engine.touch(name)

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Prepare, and answer the calls; what is resident and loaded goes to ``counted``."""
        from benchmarks.library import forget_files

        self.prepare(self.case.adapters[: self.case.num_preloaded])
        if self.case.is_cold:
            forget_files(self._folder)
        there = self._engine.resident
        loads, evictions = self._comings.loads, self._comings.evictions
        traces = self._engine.run(calls, concurrency=concurrency, new_tokens=new_tokens)
        self.counted = {
            "asked_adapters": len({call.adapter for call in calls}),
            "calls_without_load": sum(call.adapter in there for call in calls),
            "resident_at_first": len(there),
            "loads": self._comings.loads - loads,
            "evictions": self._comings.evictions - evictions,
        }
        return traces

    def close(self) -> None:
        """Do nothing: the engine is shared."""


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 96,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    prompt_tokens: options.PromptTokens = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure 1,000 known adapters against 32 resident ones, and mixed ranks against one rank."""
    if table:
        options.show(NAME, out, section)
        return
    setup = {
        "base": base,
        "dtype": "bfloat16",
        "threads": pin_threads(threads),
        "repeats": repeats,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "known": NUM_KNOWN,
        "fitting": NUM_FITTING,
        "rank": RANK,
    }
    unbind()
    path = out or result_path(NAME)
    with tempfile.TemporaryDirectory(prefix="lorary-mixes-") as scratch:
        is_complete = _run(Path(scratch), path, setup, concurrency, tolerate_load, retries)
    console.print(f"\nrecords: {path}")
    Console().print(table_of(report.read(path)), highlight=False, soft_wrap=True)
    if not is_complete:
        console.print("some cases have no run on a quiet machine; wait, or pass --tolerate-load")
        raise typer.Exit(1)


def _run(
    scratch: Path, path: Path, setup: dict[str, Any], concurrency: int, tolerate: bool, retries: int
) -> bool:
    import torch

    from benchmarks.contenders.lorary_engine import LoraryEngine
    from benchmarks.library import adapter_bytes, bytes_on_disk, fill
    from benchmarks.measure import measure
    from benchmarks.setup import MAX_CONTEXT, TEXT
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer
    from lorary.registry import Registry
    from lorary.server.engine.assemble import EngineLimits

    base = find_base(setup["base"])
    started_s = time.monotonic()
    count, repeats = setup["requests"], setup["repeats"]
    chosen = cases()
    made = members(chosen, repeats=repeats, num_calls=count)
    registry = Registry.open(scratch / "registry", create=True)
    with console.status("making adapters") as status:
        fill(
            registry,
            base,
            made,
            scratch / "folder",
            said=lambda done: status.update(f"making adapters: {done} of {len(made)}"),
        )
    full = sum(m.rank == RANK and not m.targets for m in made)
    facts = {
        "setup_s": round(time.monotonic() - started_s),
        "registry_bytes": bytes_on_disk(scratch / "registry"),
        "asked_of_known": full,
        "concurrency": concurrency,
    }
    record_head = head(NAME, setup | facts)
    console.print(
        f"{len(made)} adapters, {facts['registry_bytes'] / 1e9:.2f} GB, made in {facts['setup_s']} s; the runs ask for {full} of the "
        f"{NUM_KNOWN} known"
    )
    comings = Comings()
    engine = LoraryEngine(
        base,
        registry,
        dtype=torch.bfloat16,
        limits=EngineLimits(
            max_batch=concurrency,
            max_context=MAX_CONTEXT,
            adapter_memory_bytes=NUM_FITTING * adapter_bytes(base, RANK),
            # As in the serving benchmark.
            prefix_cache=False,
            draft_rows=0,
        ),
        residency_observer=comings,
    )
    prompts = Prompts(load_tokenizer(base), TEXT)
    quiet = Quiet(tolerate=tolerate, retries=retries)
    runs = [PreparedRun(case, engine, registry, scratch / "registry", comings) for case in chosen]
    is_complete = True
    try:
        for repeat in range(repeats):
            for run in runs if repeat % 2 == 0 else reversed(runs):
                asked = calls(
                    run.case,
                    prompts,
                    repeat=repeat,
                    count=count,
                    prompt_tokens=setup["prompt_tokens"],
                )
                if repeat == 0 and not run.case.is_cold:
                    run.run(asked[:concurrency], concurrency=concurrency, new_tokens=4)
                record: dict[str, Any] = {}
                for record in measure(
                    run,
                    asked,
                    concurrency=concurrency,
                    new_tokens=setup["new_tokens"],
                    quiet=quiet,
                ):
                    kept = {"kind": "run", "case": run.name, "repeat": repeat, **run.counted}
                    report.append(path, {**record_head, **kept, **record})
                    console.print(
                        f"{run.name}: {record['output_tokens_per_s']:.0f} tokens/s, "
                        f"{run.counted['loads']} loads, others took "
                        f"{record['load']['foreign_cores']:.2f} cores"
                    )
                is_complete &= bool(record["accepted"])
    finally:
        engine.close()
    return is_complete


def speeds(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the median of the accepted runs' output tokens per second, by case."""
    by_case: dict[str, list[float]] = {}
    for record in records:
        if record["kind"] == "run" and record["accepted"]:
            by_case.setdefault(record["case"], []).append(record["output_tokens_per_s"])
    return {case: statistics.median(values) for case, values in by_case.items()}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the cases as Markdown, each beside what it is compared with."""
    found = speeds(records)
    compared = dict(COMPARED)
    lines = [
        row(["case", "tokens/s", "of", "share", "first token, ms", "loads", "asked adapters"]),
        row(["---", "---:", "---", "---:", "---:", "---:", "---:"]),
    ]
    for case, speed in found.items():
        runs = [r for r in records if r["kind"] == "run" and r["accepted"] and r["case"] == case]
        beside = compared.get(case, "")
        share = f"{speed / found[beside]:.0%}" if beside in found else "-"
        first = statistics.median(r["ttft_ms"]["p50"] for r in runs)
        loads = statistics.median(r["loads"] for r in runs)
        asked = statistics.median(r["asked_adapters"] for r in runs)
        lines.append(
            row(
                [
                    case,
                    f"{speed:.0f}",
                    beside or "-",
                    share,
                    f"{first:.0f}",
                    f"{loads:.0f}",
                    f"{asked:.0f}",
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
            f"{origin(records[0])}; {setup['requests']} requests a run, {setup['concurrency']} at "
            f"once, {setup['prompt_tokens']} prompt + {setup['new_tokens']} new tokens; medians of "
            f"{setup['repeats']} runs. {setup['known']} adapters known ({setup['asked_of_known']} of them "
            f"asked for in all runs, of rank {setup['rank']}), memory for {setup['fitting']}; the registry "
            f"takes {setup['registry_bytes'] / 1e9:.1f} GB. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
