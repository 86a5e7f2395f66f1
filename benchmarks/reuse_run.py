"""The order of events of ``reuse``, and its table."""

from __future__ import annotations

import itertools
import random
import statistics
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
from benchmarks.markdown import most_foreign, origin, row
from benchmarks.synthetic import RANK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.contenders.lorary_engine import LoraryEngine
    from benchmarks.library import Member

NAME = "reuse"
ALORA, COLD, LORA = "aLoRA", "aLoRA, prefix cache off", "LoRA"
LATE, ALONE = "late LoRA, layers below shared", "late LoRA"
WAYS = (ALORA, COLD, LORA, LATE, ALONE)
SAME = ((ALORA, COLD), (LATE, ALONE))
"""Ways in which the same judges answer, with and without reuse."""
ANSWER_TOKENS, VERDICT_TOKENS = 64, 16
FIRST_TOKEN = 1000
"""Any word; documents begin with it, and a repeated one with another."""
QUIET = 0.1
"""Most cores that others may use on average."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    judges: Annotated[int, typer.Option(min=1, help="Adapters after the base.")] = 4,
    document_tokens: options.PromptTokens = 1000,
    documents: Annotated[int, typer.Option(min=1, help="Pipelines of each way.")] = 5,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Judge documents with several adapters."""
    if table:
        options.show(NAME, out, section)
        return
    setup: dict[str, Any] = {
        "base": base,
        "dtype": "bfloat16",
        "threads": pin_threads(threads),
        "rank": RANK,
        "judges": judges,
        "document_tokens": document_tokens,
        "documents": documents,
    }
    # They import torch, which threads are pinned before.
    from benchmarks.library import num_layers
    from lorary.bases import find_base

    setup["first_layer"] = first_late(num_layers(find_base(base)))
    path = out or result_path(NAME)
    kept = Kept(
        path,
        head(NAME, setup),
        Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load),
    )
    with tempfile.TemporaryDirectory(prefix="lorary-reuse-") as scratch:
        texts, invocations, engines = _stage(Path(scratch), base, setup)
        try:
            for number, text in enumerate(texts):
                for way in WAYS:
                    # Counted, so that nothing of an attempt before is in the cache.
                    firsts = itertools.count(FIRST_TOKEN)
                    engine = engines[way]
                    kept.measure(partial(_pipeline, engine, way, number, text, invocations, firsts))
        finally:
            for engine in engines.values():
                engine.close()
    kept.finish(console, table_of)


def _stage(
    scratch: Path, name: str, setup: dict[str, Any]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], dict[str, LoraryEngine]]:
    """Return documents, the judges' invocations, and an engine for each way with its judges resident."""
    import torch

    from benchmarks.contenders.lorary_engine import LoraryEngine
    from benchmarks.library import adapter_bytes, fill
    from benchmarks.setup import TEXT
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer
    from lorary.registry import Registry
    from lorary.server.engine.assemble import EngineLimits

    base = find_base(name)
    tokenizer = load_tokenizer(base)
    count = setup["judges"]
    invocations = [
        tuple(tokenizer.encode(f"<|im_end|>\n<|im_start|>judge {i}\n")) for i in range(count)
    ]
    registry = Registry.open(scratch / "registry", create=True)
    members = judge_members(invocations, setup["first_layer"], RANK)
    with console.status("making adapters"):
        fill(registry, base, members, scratch / "folder")
    context = setup["document_tokens"] + ANSWER_TOKENS + VERDICT_TOKENS + 64
    engines = {}
    for way in WAYS:
        engine = LoraryEngine(
            base,
            registry,
            dtype=torch.bfloat16,
            limits=EngineLimits(
                max_batch=4,
                max_context=context,
                adapter_memory_bytes=count * adapter_bytes(base, RANK),
                prefix_cache=way != COLD,
                shared_layers=setup["first_layer"] if way == LATE else 0,
                draft_rows=0,
            ),
        )
        engine.prepare([judge_name(way, i) for i in range(count)])
        engines[way] = engine
    texts = Prompts(tokenizer, TEXT).take(
        setup["documents"], setup["document_tokens"], random.Random(0)
    )
    return texts, invocations, engines


def first_late(num_layers: int) -> int:
    """Return the first layer that late judges change: two thirds are below it."""
    return num_layers * 2 // 3


def judge_members(
    invocations: Sequence[tuple[int, ...]], first_layer: int, rank: int
) -> list[Member]:
    """Return the judges of all kinds."""
    from benchmarks.library import Member

    return [
        Member(
            judge_name(way, i),
            rank,
            i,
            invocation=invocation if way == ALORA else (),
            first_layer=first_layer if way == LATE else 0,
        )
        for way in (ALORA, LORA, LATE)
        for i, invocation in enumerate(invocations)
    ]


def judge_name(way: str, index: int) -> str:
    """Return what the registry calls a judge; with and without reuse it is the same one."""
    kinds = {ALORA: "alora", COLD: "alora", LORA: "lora", LATE: "late", ALONE: "late"}
    return f"{kinds[way]}-{index}"


def _pipeline(
    engine: LoraryEngine,
    way: str,
    number: int,
    document: tuple[int, ...],
    invocations: Sequence[tuple[int, ...]],
    firsts: Iterator[int],
) -> dict[str, Any]:
    """Ask the base over a document behind the next of ``firsts``, then every judge, one after the other."""
    from benchmarks.workload import Call

    text = (next(firsts), *document)
    (answer,) = engine.run(
        [Call(prompt_ids=text, adapter=None)], concurrency=1, new_tokens=ANSWER_TOKENS
    )
    judged = (*text, *answer.token_ids)
    ttft_ms, num_read, num_above, tokens = [], [], [], []
    for i, invocation in enumerate(invocations):
        call = Call(prompt_ids=(*judged, *invocation), adapter=judge_name(way, i))
        (verdict,) = engine.run([call], concurrency=1, new_tokens=VERDICT_TOKENS)
        ttft_ms.append(round(1e3 * (verdict.token_s[0] - verdict.sent_s), 2))
        num_read.append(len(call.prompt_ids) - verdict.num_cached)
        num_above.append(verdict.num_above)
        tokens.append(verdict.token_ids)
    return {
        "kind": "pipeline",
        "way": way,
        "document": number,
        "answer_ttft_ms": round(1e3 * (answer.token_s[0] - answer.sent_s), 2),
        "ttft_ms": ttft_ms,
        "seconds": round(verdict.token_s[-1] - answer.sent_s, 4),
        "num_read": num_read,
        "num_above": num_above,
        "answer": answer.token_ids,
        "verdicts": tokens,
    }


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return a row for each way as Markdown."""
    found = [r for r in records if r["kind"] == "pipeline" and r["accepted"]]
    lines = [
        row(
            [
                "judges",
                "tokens a judge reads",
                "of them in the upper layers only",
                "first token of a judge, ms",
                "whole pipeline, ms",
            ]
        ),
        row(["---", "---:", "---:", "---:", "---:"]),
    ]
    for way in WAYS:
        own = [r for r in found if r["way"] == way]
        if own:
            read = statistics.median(n for r in own for n in r["num_read"])
            # Records of before there were shared layers have none.
            above = statistics.median(n for r in own for n in r.get("num_above", [0]))
            ttft = statistics.median(ms for r in own for ms in r["ttft_ms"])
            whole = 1e3 * statistics.median(r["seconds"] for r in own)
            lines.append(row([way, f"{read:.0f}", f"{above:.0f}", f"{ttft:.0f}", f"{whole:.0f}"]))
    same, compared = same_verdicts(found)
    return "\n".join(
        [*lines, "", f"Equal verdict tokens with and without reuse: {same} of {compared}."]
    )


def same_verdicts(records: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return how many tokens of verdicts are the same with and without reuse, and of how many.

    Of documents over which the base answered the same, for verdicts over different answers differ.
    """
    by_way = {(r["way"], r["document"]): r for r in records}
    same = compared = 0
    without = dict(SAME)
    for (way, document), warm in by_way.items():
        cold = by_way.get((without.get(way, ""), document))
        if cold is None or warm["answer"] != cold["answer"]:
            continue
        for ours, theirs in zip(warm["verdicts"], cold["verdicts"], strict=True):
            compared += len(theirs)
            same += sum(a == b for a, b in zip(ours, theirs, strict=True))
    return same, compared


def _late(setup: dict[str, Any]) -> str:
    first = setup.get("first_layer")
    return "" if first is None else f" (late ones from layer {first} on)"


def _warning(records: Sequence[dict[str, Any]]) -> str:
    if all(r["quiet"] for r in records if r["accepted"]):
        return ""
    return " The machine was busy: trust the tokens and the ratios, not the milliseconds."


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup = records[0]["setup"]
    return "\n".join(
        [
            f"{origin(records[0])}; documents of {setup['document_tokens']} tokens, an answer of "
            f"{ANSWER_TOKENS} by the base, {setup['judges']} judges of rank {setup['rank']} on every linear "
            f"layer with verdicts of {VERDICT_TOKENS}{_late(setup)}, all in {setup['dtype']}; medians over "
            f"{setup['documents']} documents; others took at most {most_foreign(records):.2f} cores. Records: "
            f"`benchmarks/results/{path.name}`.{_warning(records)}",
            "",
            table_of(records),
        ]
    )
