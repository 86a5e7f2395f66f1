"""The order of events of ``training``, and its table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import ROOT, head, result_path
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import most_foreign, row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAME = "training"
CONTENDERS = ("lorary", "plain")
RECIPES = ("sentiment", "translation")
QUIET = 0.2
"""Most cores that others may use on average."""
BAR_RATIO = 1.5
BAR_FIRST_STEP_S = 20.0
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    recipe: Annotated[
        list[str] | None, typer.Option(help=f"Of recipes/; default {', '.join(RECIPES)}.")
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of a run.")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 2,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Train beside the plain loop."""
    if table:
        options.show(NAME, out, section)
        return
    path = out or result_path(NAME)
    first = head(NAME, {"steps": steps, "repeats": repeats})
    kept = Kept(path, first, Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load))
    for name in recipe or RECIPES:
        for repeat in range(repeats):
            for contender in CONTENDERS:
                kept.measure(partial(_run, contender, name, steps, repeat))
    kept.finish(console, table_of)


def _run(contender: str, recipe: str, steps: int, seed: int) -> dict[str, Any]:
    """Train in a new process."""
    command = [sys.executable, "-m", "benchmarks.harness.training_case", contender]
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / f"{recipe}.yaml"), str(steps), str(seed)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    figures = json.loads(done.stdout)
    console.print(f"{recipe} {contender}: {figures}")
    return {
        "kind": "run",
        "recipe": recipe,
        "contender": contender,
        "seed": seed,
        **figures,
    }


def medians_of(
    records: Sequence[dict[str, Any]], recipe: str, contender: str
) -> dict[str, float] | None:
    """Return the medians of the accepted runs of a contender, or None without any."""
    runs = [
        r for r in records if r["accepted"] and (r["recipe"], r["contender"]) == (recipe, contender)
    ]
    if not runs:
        return None
    keys = ("tokens_per_s", "first_step_s", "peak_memory_bytes")
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown, one recipe and contender a line."""
    titles = [
        *("recipe", "loop", "tokens/s", "lorary / plain"),
        *("start to the end of the first step, s", "peak memory, GB"),
    ]
    lines = [row(titles), row(["---", "---", *["---:"] * 4])]
    for recipe in dict.fromkeys(r["recipe"] for r in records):
        found = {name: medians_of(records, recipe, name) for name in CONTENDERS}
        ours, plain = found["lorary"], found["plain"]
        if ours is None or plain is None:
            continue
        ratio = ours["tokens_per_s"] / plain["tokens_per_s"]
        for name, figures in (("lorary", ours), ("plain", plain)):
            lines.append(
                row(
                    [
                        *(recipe, name, f"{figures['tokens_per_s']:.0f}"),
                        f"**{ratio:.2f}x** (bar {BAR_RATIO:g}x)" if name == "lorary" else "",
                        f"{figures['first_step_s']:.1f}"
                        + (f" (bar {BAR_FIRST_STEP_S:g})" if name == "lorary" else ""),
                        f"{figures['peak_memory_bytes'] / 1e9:.2f}",
                    ]
                )
            )
    return "\n".join(lines) if len(lines) > 2 else "nothing was measured on a quiet machine"


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    made = records[0]
    machine = made["machine"]
    return "\n".join(
        [
            f"{made['date']}, {machine['cpu']} ({machine['cores']} cores, "
            f"{', '.join(machine['vector_units'])}), torch {made['versions']['torch']}, peft "
            f"{made['versions']['peft']}, commit `{made['commit'][:12]}`"
            f"{' with local changes' if made['modified'] else ''}; {made['setup']['steps']} steps, the "
            f"first two not counted, medians of {made['setup']['repeats']} runs; other processes took "
            f"at most {most_foreign(records):.2f} cores. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
