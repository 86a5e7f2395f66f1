"""The order of events of ``methods``, and its table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.case_process import STARRED, run_case, step_cell
from benchmarks.harness.machine import head, result_path
from benchmarks.markdown import row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAME = "methods"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-plus": {},
    "lora-fa": {},
    "rslora": {},
    "dora": {},
    "pissa": {},
    "olora": {},
    "eva": {},
    "vera": {"rank": 256},
    "adalora": {"rank": 12, "target_rank": 8},
    "delta-lora": {"delta_start": 5},
    "qlora": {},
    "loftq": {},
    "full": {},
}
"""Each with the keys of its own; ``rank`` is 8 where it is not named."""
RATES = {
    "vera": 5e-3,
    "lora-plus": 1e-4,
    "pissa": 1e-4,
    "olora": 1e-4,
    "adalora": 2e-3,
    "full": 5e-5,
}
"""Learning rates; 5e-4, the recipe's, where none is named."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    num_test: Annotated[int, typer.Option(min=1, help="Held-out examples.")] = 400,
    threads: options.Threads = 0,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Train every method on the same rows."""
    if table:
        options.show(NAME, out, section)
        return
    options.known(only or (), METHODS)
    path = out or result_path(NAME)
    setup = {"steps": steps, "batch_size": batch_size, "num_test": num_test, "threads": threads}
    first = head(NAME, setup)
    for name in only or METHODS:
        case = {
            "name": name,
            "method": METHODS[name],
            "learning_rate": RATES.get(name, 5e-4),
            # The base is measured once for a file.
            "is_first": not path.exists(),
            **setup,
        }
        found = run_case("method_case", json.dumps(case))
        report.append(path, {**first, **found})
        console.print(f"{name}: {found}")
    console.print(f"records: {path}")
    Console().print(table_of(report.read(path)), highlight=False, soft_wrap=True)


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return one row for each method, in the order of the records; of ``full``, what is published follows."""
    heads = [
        *("method", "accuracy", "validation loss", "trained numbers", "peak memory, MB"),
        *("s a step", "adapter, MB", "rank", "conversion error", "rank for 90 %", "stable rank"),
    ]
    lines = [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
    empty = [""] * (len(heads) - 2)
    lines.extend(
        row(["none (the base)", f"{record['base_accuracy']:.3f}", *empty])
        for record in records
        if "base_accuracy" in record
    )
    for record in records:
        lines.extend(row(cells) for cells in _rows_of(record))
    return "\n".join(lines)


def _rows_of(record: dict[str, Any]) -> list[list[str]]:
    """Return the cells of a method: one row, or a second one for what is published of whole weights."""
    cost = [
        f"{record['num_trainable']:,}",
        f"{record['peak_bytes'] / 1e6:,.0f}",
        step_cell(record),
    ]
    kept = [
        f"{record['adapter_bytes'] / 1e6:.2f}",
        str(record["rank"]),
        f"{record['conversion_error']:.1e}",
        *_rank_cells(record.get("ranks")),
    ]
    accuracy, loss = f"{record['accuracy']:.3f}", f"{record['validation_loss']:.3f}"
    uncut = record.get("uncut")
    if uncut is None:
        return [[record["name"], accuracy, loss, *cost, *kept]]
    whole = [f"{uncut['metrics']['accuracy']:.3f}", loss, *cost, *["-"] * 3, *_rank_cells(uncut)]
    published = f"{record['name']}, its SVD at rank {record['rank']}"
    cut = [accuracy, f"{record['cut_validation_loss']:.3f}", *["-"] * len(cost), *kept]
    return [[record["name"], *whole], [published, *cut]]


def _rank_cells(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [f"{found['rank_90']:g}", f"{found['stable_rank']:.1f}"]


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    made = records[0]
    setup = made["setup"]
    busy = any(not record["quiet"] for record in records)
    return "\n".join(
        [
            f"{made['date']}, {made['machine']['cpu']} ({made['machine']['cores']} cores), torch "
            f"{made['versions']['torch']}, peft {made['versions']['peft']}, commit `{made['commit'][:12]}`"
            f"{' with local changes' if made['modified'] else ''}; smollm2-135m, {setup['steps']} steps of "
            f"{setup['batch_size']} rows, {setup['num_test']} held out, one seed.{STARRED if busy else ''} Records: "
            f"`benchmarks/results/{path.name}`.",
            "",
            table_of(records),
            "",
            "Rank for 90 %: the fewest directions that hold 90 % of ‖ΔW‖²; stable rank: ‖ΔW‖² / σ₁²; medians over "
            "modules of what is kept ([definitions](training.md#the-report)). DoRA's ΔW is no product of thin "
            "matrices. Of `full` the first row is the model as it was trained, the second what is published of it.",
        ]
    )
