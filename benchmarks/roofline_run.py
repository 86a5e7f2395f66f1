"""The order of events of ``roofline``, and its tables."""

from __future__ import annotations

import functools
import operator
import random
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.threads import pin_threads
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import origin, row
from benchmarks.step_run import PROMPT_TOKENS, QUIET, WARM_UP
from benchmarks.synthetic import RANK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.harness.stepper import Stepper
    from benchmarks.peaks import Peaks
    from benchmarks.roofline_model import Machine, Shape, Work
    from lorary.bases import Base
    from lorary.registry import Registry

NAME = "roofline"
MOST = 32
DECODE = ((1, 0), (1, 1), (8, 0), (8, 1), (8, 8), (32, 0), (32, 1), (32, 8), (32, 32))
"""Rows and adapters of the decode steps."""
PROMPTS = ((4, 0), (4, 4))
"""Prompts read in one step, and adapters."""
LOOKS = 8
"""Times that the machine's peaks are measured while one decode step is."""
REPRESENTATIONS = ("bfloat16", "int8")
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps per figure.")] = 48,
    most: Annotated[int, typer.Option(min=1, help="Leave out steps of more rows.")] = MOST,
    representations: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16,int8",
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure steps against the machine's bandwidth and peaks."""
    if table:
        options.show(NAME, out, section)
        return
    chosen = representations.split(",")
    options.known(chosen, REPRESENTATIONS)
    setup = {
        "base": base,
        "threads": pin_threads(threads),
        "rank": RANK,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": steps,
    }
    path = out or result_path(NAME)
    quiet = Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load)
    kept = Kept(path, head(NAME, setup), quiet)
    with tempfile.TemporaryDirectory(prefix="lorary-roofline-") as scratch:
        _run(Path(scratch), base, chosen, most, steps, kept)
    kept.finish(console, tables_of)


def _run(
    scratch: Path, name: str, representations: Sequence[str], most: int, steps: int, kept: Kept
) -> None:
    from benchmarks.harness.stepper import make_library
    from benchmarks.peaks import Peaks
    from benchmarks.setup import TEXT
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer
    from lorary.registry import Registry

    base = find_base(name)
    registry = Registry.open(scratch / "registry", create=True)
    with console.status("making adapters"):
        adapters = make_library(registry, base, scratch / "folder", min(most, MOST), RANK)
    prompts = Prompts(load_tokenizer(base), TEXT).take(
        min(most, MOST), PROMPT_TOKENS, random.Random(0)
    )

    peaks = Peaks()
    for representation in representations:
        stepper, shape = _stepper(base, registry, representation, min(most, MOST))
        stepper.load(adapters)
        cells = _Cells(
            stepper, shape, peaks, prompts, adapters, steps, int8=representation == "int8"
        )
        try:
            for rows, count in DECODE:
                if rows <= most:
                    console.print(f"{representation}: decode, {rows} rows, {count} adapters")
                    kept.measure(functools.partial(cells.decode, rows, count))
            for num, count in PROMPTS:
                if num <= most:
                    console.print(f"{representation}: {num} prompts, {count} adapters")
                    kept.measure(functools.partial(cells.prompts, num, count))
        finally:
            stepper.close()


def _stepper(
    base: Base, registry: Registry, representation: str, max_rows: int
) -> tuple[Stepper, Shape]:
    import torch

    from benchmarks.harness.stepper import Stepper
    from benchmarks.library import adapter_bytes
    from benchmarks.roofline_model import shape_of

    stepper = Stepper(
        base,
        registry,
        dtype=torch.bfloat16,
        int8=representation == "int8",
        max_rows=max_rows,
        adapter_memory_bytes=max_rows * adapter_bytes(base, RANK),
    )
    return stepper, shape_of(stepper.engine._runner.model.config, base.card.modules)


class _Cells:
    """Times steps of one representation, and looks at the machine's peaks between them.

    Other tenants make a processor slower by the minute; a step's bound is what was possible meanwhile, at best.
    """

    def __init__(
        self,
        stepper: Stepper,
        shape: Shape,
        peaks: Peaks,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str],
        steps: int,
        *,
        int8: bool,
    ) -> None:
        self._stepper = stepper
        self._shape = shape
        self._peaks = peaks
        self._prompts = prompts
        self._adapters = adapters
        self._steps = steps
        self._int8 = int8

    def decode(self, rows: int, adapters: int) -> dict[str, Any]:
        """Time decode steps; contexts grow by one a step, and their mean counts."""
        from benchmarks.roofline_model import work

        self._start(rows, adapters, max_tokens=self._steps + WARM_UP + 16)
        self._stepper.read_prompts()
        for _ in range(WARM_UP):
            self._stepper.step()
        self._peaks.forget()
        seconds: list[float] = []
        some = -(-self._steps // LOOKS)
        for begin in range(0, self._steps, some):
            self._peaks.look()
            seconds += self._stepper.time_steps(min(some, self._steps - begin))
        self._stepper.end_rows()
        context = PROMPT_TOKENS + 1 + WARM_UP + self._steps / 2
        todo = work(
            self._shape,
            rows=rows,
            logits_rows=rows,
            context=context,
            adapters=adapters,
            rank=RANK,
            int8=self._int8,
        )
        found = self._record(statistics.median(seconds), todo)
        return {"kind": "decode", "rows": rows, "adapters": adapters, **found}

    def prompts(self, count: int, adapters: int) -> dict[str, Any]:
        """Time steps that read ``count`` whole prompts each."""
        from benchmarks.roofline_model import work

        self._peaks.forget()
        seconds = []
        for _ in range(max(3, self._steps // 8)):
            self._peaks.look()
            self._start(count, adapters, max_tokens=2)
            seconds.append(self._stepper.step())
            if not self._stepper.is_decoding:
                raise RuntimeError(
                    f"one step did not read {count} prompts of {PROMPT_TOKENS} tokens; its time is "
                    "not theirs. Raise the engine's prefill budget, or ask for fewer."
                )
            self._stepper.end_rows()
        todo = work(
            self._shape,
            rows=count * PROMPT_TOKENS,
            logits_rows=count,
            context=(PROMPT_TOKENS + 1) / 2,
            read_context=count * PROMPT_TOKENS,
            adapters=adapters,
            rank=RANK,
            int8=self._int8,
        )
        found = self._record(statistics.median(seconds), todo)
        return {"kind": "prompts", "rows": count * PROMPT_TOKENS, "adapters": adapters, **found}

    def _start(self, rows: int, adapters: int, *, max_tokens: int) -> None:
        names = [self._adapters[i % adapters] if adapters else None for i in range(rows)]
        self._stepper.start_rows(self._prompts[:rows], names, max_tokens=max_tokens)

    def _record(self, seconds: float, todo: Work) -> dict[str, Any]:
        from benchmarks.roofline_model import bound_s, compute_s, memory_s

        peaks = self._peaks.best()
        machine = machine_of(peaks)
        memory, compute = memory_s(todo, machine), compute_s(todo, machine)
        bound = bound_s(todo, machine)
        return {
            "weights": "int8" if self._int8 else "bfloat16",
            "ms": round(1e3 * seconds, 3),
            "bytes": round(todo.bytes_read),
            "operations": round(todo.bf16_operations + todo.int8_operations),
            "memory_ms": round(1e3 * memory, 3),
            "compute_ms": round(1e3 * compute, 3),
            "bound_ms": round(1e3 * bound, 3),
            "of_bandwidth": round(memory / seconds, 4),
            "of_peak": round(compute / seconds, 4),
            "of_bound": round(bound / seconds, 4),
            "peaks": peaks,
        }


def machine_of(peaks: Mapping[str, Mapping[str, float]]) -> Machine:
    """Return the best way of each kind."""
    from benchmarks.roofline_model import Machine

    return Machine(**{kind: max(ways.values()) for kind, ways in peaks.items()})


def accepted(records: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the accepted records of a kind, in order."""
    return [r for r in records if r["kind"] == kind and r["accepted"]]


def tables_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the machine's and the steps' figures as Markdown."""
    steps = [*accepted(records, "decode"), *accepted(records, "prompts")]
    if not steps:
        return "the machine was never quiet enough to measure a step"
    lines = [
        row(["machine", "at its best", "while it was slowest", "by"]),
        row(["---", "---:", "---:", "---"]),
    ]
    for key, what, unit, name in (
        ("bandwidth", "reads", 1e9, "GB/s"),
        ("bf16_peak", "multiplies bfloat16", 1e9, "GFLOP/s"),
        ("int8_peak", "multiplies 8-bit weights", 1e9, "GOP/s"),
    ):
        bests = [max(r["peaks"][key].items(), key=operator.itemgetter(1)) for r in steps]
        way, best = max(bests, key=operator.itemgetter(1))
        lowest = min(figure for _, figure in bests)
        lines.append(row([what, f"{best / unit:.0f} {name}", f"{lowest / unit:.0f} {name}", way]))
    head_line = ["step", "weights", "rows", "adapters", "MB read", "G operations", "bound, ms",
                 "measured, ms", "of bandwidth", "of peak", "of the bound"]  # fmt: skip
    lines += ["", row(head_line), row(["---"] * 2 + ["---:"] * 9)]
    for r in steps:
        lines.append(
            row(
                [
                    r["kind"],
                    r["weights"],
                    str(r["rows"]),
                    str(r["adapters"]),
                    f"{r['bytes'] / 1e6:.0f}",
                    f"{r['operations'] / 1e9:.1f}",
                    f"{r['bound_ms']:.1f}",
                    f"{r['ms']:.1f}",
                    f"{r['of_bandwidth']:.0%}",
                    f"{r['of_peak']:.0%}",
                    f"{r['of_bound']:.0%}",
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
            f"{origin(records[0])}; adapters of rank {setup['rank']}, contexts from "
            f"{setup['prompt_tokens']} tokens on; medians of {setup['steps']} whole steps. Records: "
            f"`benchmarks/results/{path.name}`.",
            "",
            tables_of(records),
        ]
    )
