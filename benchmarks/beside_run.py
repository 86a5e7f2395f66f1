"""The order of events of ``beside``, and its table."""

from __future__ import annotations

import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.contenders.lorary_engine import LoraryEngine
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.threads import pin_threads
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import most_foreign, origin, row
from benchmarks.measure import figures
from benchmarks.setup import TEXT
from benchmarks.synthetic import RANK, make_adapters, push_adapters
from benchmarks.workload import Call, Prompts, choose
from lorary.bases import find_base
from lorary.bases.load import load_tokenizer
from lorary.registry import Registry
from lorary.server.engine.assemble import EngineLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "beside"
ADAPTERS = 32
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 64, 2
QUIET = 0.1
"""Most cores that others may use on average."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    budgets: Annotated[
        str, typer.Option(help="Prompt tokens in a step in which answers go on.")
    ] = "512,256,128,64",
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "8,32",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Answer the same requests with different numbers of prompt tokens beside answers."""
    if table:
        options.show(NAME, out, section)
        return
    counts = [int(part) for part in concurrency.split(",")]
    setup = {
        "base": base,
        "threads": pin_threads(threads),
        "rank": RANK,
        "adapters": ADAPTERS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "repeats": repeats,
    }
    path = out or result_path(NAME)
    quiet = Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load)
    kept = Kept(path, head(NAME, setup), quiet)
    with tempfile.TemporaryDirectory(prefix="lorary-beside-") as scratch:
        found = find_base(base)
        folders = make_adapters(found, Path(scratch) / "adapters", ADAPTERS)
        registry = Registry.open(Path(scratch) / "registry", create=True)
        push_adapters(registry, found, folders)
        names = list(folders)
        prompts = Prompts(load_tokenizer(found), TEXT)
        engines = {
            int(budget): LoraryEngine(
                found,
                registry,
                dtype=torch.bfloat16,
                limits=EngineLimits(
                    max_batch=max(counts),
                    max_context=1024,
                    prefill_beside=int(budget),
                    prefix_cache=False,
                    draft_rows=0,
                ),
            )
            for budget in budgets.split(",")
        }
        try:
            for engine in engines.values():
                engine.prepare(names)
            for at_once in counts:
                for repeat in range(repeats):
                    rng = random.Random(f"{at_once}/{repeat}")
                    drawn = choose(names, ROUNDS * at_once, "uniform", rng)
                    texts = prompts.take(len(drawn), PROMPT_TOKENS, rng)
                    calls = [
                        Call(prompt_ids=p, adapter=a) for p, a in zip(texts, drawn, strict=True)
                    ]
                    for budget in list(engines)[:: 1 if repeat % 2 else -1]:
                        kept.measure(partial(_run, engines[budget], budget, calls, at_once))
        finally:
            for engine in engines.values():
                engine.close()
    kept.finish(console, table_of)


def _run(engine: LoraryEngine, budget: int, calls: Sequence[Call], at_once: int) -> dict[str, Any]:
    traces = engine.run(calls, concurrency=at_once, new_tokens=NEW_TOKENS)
    return {"kind": "beside", "budget": budget, "concurrency": at_once, **figures(traces)}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return speed and latencies of each budget as Markdown, medians over the runs."""
    accepted = [r for r in records if r["kind"] == "beside" and r["accepted"]]
    cells = sorted({(r["concurrency"], -r["budget"]) for r in accepted})
    if not cells:
        return "nothing was measured on a quiet machine"
    lines = [
        row(["requests at once", "prompt tokens beside answers", "output tokens/s", "first token, ms: p50 / p95",
             "next token, ms: p50 / p95 / p99"]),
        row(["---:"] * 5),
    ]  # fmt: skip
    for at_once, negative in cells:
        found = [r for r in accepted if (r["concurrency"], -r["budget"]) == (at_once, negative)]
        speed = statistics.median(r["output_tokens_per_s"] for r in found)
        first, following = (
            " / ".join(f"{statistics.median(r[key][p] for r in found):.0f}" for p in percentiles)
            for key, percentiles in (("ttft_ms", ("p50", "p95")), ("itl_ms", ("p50", "p95", "p99")))
        )
        lines.append(row([str(at_once), str(-negative), f"{speed:.0f}", first, following]))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup = records[0]["setup"]
    return "\n".join(
        [
            f"{origin(records[0])}; {setup['adapters']} adapters of rank {setup['rank']}, {setup['prompt_tokens']} "
            f"prompt + {setup['new_tokens']} new tokens, two requests for each place; medians of "
            f"{setup['repeats']} runs, each budget in turn; others took at most {most_foreign(records):.2f} cores. Records: "
            f"`benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
