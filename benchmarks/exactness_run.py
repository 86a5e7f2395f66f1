"""The order of events of ``exactness``, what counts as a tie, and its table."""

from __future__ import annotations

import gc
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.threads import pin_threads
from benchmarks.markdown import origin, row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.workload import Call

NAME = "exactness"
MODES = ("bfloat16", "int8", "float32")
TIE = 1e-4
"""Logits of the oracle that are nearer than this may fall either way."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    modes: Annotated[str, typer.Option(help="Of bfloat16, int8, float32.")] = ",".join(MODES),
    sequences: Annotated[int, typer.Option(min=1, help="Answers.")] = 66,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters, beside the bare base.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    prompt_tokens: options.PromptTokens = 128,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Compare the engine's greedy answers with PEFT's in float32."""
    if table:
        options.show(NAME, out, section)
        return
    chosen = modes.split(",")
    options.known(chosen, MODES)
    setup = {
        "base": base,
        "threads": pin_threads(threads),
        "sequences": sequences,
        "adapters": adapters,
        "concurrency": concurrency,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
    path = out or result_path(NAME)
    first = head(NAME, setup)
    with tempfile.TemporaryDirectory(prefix="lorary-exactness-") as scratch:
        _run(Path(scratch), setup, chosen, lambda r: report.append(path, {**first, **r}))
    console.print(f"records: {path}")
    Console().print(table_of(report.read(path)), highlight=False, soft_wrap=True)


def _run(
    scratch: Path,
    setup: dict[str, Any],
    modes: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    import torch

    from benchmarks.contenders.lorary_engine import LoraryEngine
    from benchmarks.contenders.peft_mixed import PeftMixed
    from benchmarks.setup import TEXT
    from benchmarks.synthetic import make_adapters, push_adapters
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer
    from lorary.registry import Registry
    from lorary.server.engine.assemble import EngineLimits

    base = find_base(setup["base"])
    tokenizer = load_tokenizer(base)
    prompts = Prompts(tokenizer, TEXT)
    with console.status("making adapters"):
        folders = make_adapters(base, scratch / "adapters", setup["adapters"])
        registry = Registry.open(scratch / "registry", create=True)
        push_adapters(registry, base, folders)
    calls = plan(prompts, list(folders), setup["sequences"], setup["prompt_tokens"])
    oracle = PeftMixed(base, folders, pad_id=int(tokenizer.pad_token_id), dtype=torch.float32)
    oracle.prepare(list(folders))
    with console.status("PEFT float32, one at a time"):
        traces = oracle.run(calls, concurrency=1, new_tokens=setup["new_tokens"])
    wanted = [trace.token_ids for trace in traces]
    for mode in modes:
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        limits = EngineLimits(max_batch=setup["concurrency"], max_context=1024)
        engine = LoraryEngine(base, registry, dtype=dtype, limits=limits, int8=mode == "int8")
        try:
            with console.status(mode):
                answers = engine.run(
                    calls, concurrency=setup["concurrency"], new_tokens=setup["new_tokens"]
                )
        finally:
            engine.close()
        del engine
        gc.collect()
        found = compare(
            calls,
            wanted,
            [trace.token_ids for trace in answers],
            lambda call, answer: oracle.logits(call, answer).tolist(),
        )
        keep({"kind": "exactness", "mode": mode, **found})
        console.print(
            f"{mode}: {found['share']:.1%} of positions before the first difference, "
            f"{found['whole_answers']} of {len(calls)} answers whole, {found['num_ties']} ties"
        )


def plan(prompts: Any, names: Sequence[str], count: int, length: int) -> list[Call]:
    """Return ``count`` calls: every adapter and the bare base in turn, each with its own prompt."""
    from benchmarks.workload import Call

    cycle: list[str | None] = [*names, None]
    texts = prompts.take(count, length, random.Random(1))
    return [Call(prompt_ids=p, adapter=cycle[i % len(cycle)]) for i, p in enumerate(texts)]


def compare(
    calls: Sequence[Call],
    wanted: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    logits: Callable[[Call, Sequence[int]], Sequence[Sequence[float]]],
) -> dict[str, Any]:
    """Return how far answers equal the oracle's, and every first difference.

    Args:
        calls: what was asked.
        wanted: the oracle's answers.
        found: the engine's, in the same order and of the same lengths.
        logits: the oracle's at each position of an answer; asked only where answers differ.
    """
    differences = []
    num_equal = 0
    for index, (call, right, given) in enumerate(zip(calls, wanted, found, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(right, given, strict=True)) if a != b), None)
        num_equal += len(right) if at is None else at
        if at is None:
            continue
        row = logits(call, right)[at]
        gap = float(row[right[at]] - row[given[at]])
        differences.append(
            {
                "answer": index,
                "adapter": call.adapter,
                "position": at,
                "wanted": right[at],
                "found": given[at],
                "gap": round(gap, 7),
                "is_tie": gap < TIE,
            }
        )
    return {
        "num_answers": len(calls),
        "num_positions": sum(map(len, wanted)),
        "share": round(num_equal / sum(map(len, wanted)), 4),
        "whole_answers": len(calls) - len(differences),
        "num_ties": sum(d["is_tie"] for d in differences),
        "differences": differences,
    }


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the modes as Markdown."""
    lines = [
        row(["engine in", "positions before the first difference", "whole answers",
                    "first differences that are ties", "largest gap at a difference"]),
        row(["---", "---:", "---:", "---:", "---:"]),
    ]  # fmt: skip
    for r in records:
        if r["kind"] != "exactness":
            continue
        gaps = [d["gap"] for d in r["differences"]]
        lines.append(
            row(
                [
                    r["mode"],
                    f"{r['share']:.1%}",
                    f"{r['whole_answers']} of {r['num_answers']}",
                    f"{r['num_ties']} of {len(gaps)}",
                    f"{max(gaps):.2g}" if gaps else "-",
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
            f"{origin(records[0])}; {setup['sequences']} answers of {setup['new_tokens']} tokens "
            f"to prompts of {setup['prompt_tokens']}, {setup['concurrency']} at once, over "
            f"{setup['adapters']} adapters and the bare base. Records: "
            f"`benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
