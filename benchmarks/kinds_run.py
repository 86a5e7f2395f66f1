"""The order of events of ``methods.py kinds``, and its table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.case_process import STARRED, run_case, step_cell
from benchmarks.harness.machine import head, result_path
from benchmarks.kind_cases import CASES, PAIR
from benchmarks.markdown import row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAME = "kinds"
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; may be repeated.")
    ] = None,
    threads: options.Threads = 0,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Train one adapter of every task kind on real rows."""
    if table:
        options.show(NAME, out, section)
        return
    options.known(only or (), CASES)
    path = out or result_path(NAME)
    first = head(NAME, {"threads": threads})
    for name in only or CASES:
        found = run_case("kind_case", name, str(threads))
        report.append(path, {**first, **found})
        console.print(f"{name}: {found}")
    console.print(f"records: {path}")
    Console().print(table_of(report.read(path)), highlight=False, soft_wrap=True)


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return one row for each case that was taken, its newest, in the order of ``CASES``."""
    newest = {record["name"]: record for record in records}
    heads = [
        *("kind", "base", "rows: what is asked", "to learn from / held out", "figure"),
        *("base", "adapter", "difference, 95 %", "steps, of rows", "trained numbers"),
        *("s a step", "adapter, MB"),
    ]
    lines = [row(heads), row([*["---"] * 3, "---:", "---", *["---:"] * 7])]
    for record in (newest[name] for name in CASES if name in newest):
        low, high = record["difference"]
        digits = 1 if record["metric"] == "bleu" else 3
        cells = [
            f"`{record['kind']}`",
            record["base"],
            record["data"],
            f"{record['num_train']:,} / {record['num_test']}",
            record["metric"],
            f"{record['base_value']:.{digits}f}",
            f"{record['adapter_value']:.{digits}f}",
            f"{low:+.{digits}f} to {high:+.{digits}f}",
            f"{record['steps']} of {record['batch_size']}",
            f"{record['num_trainable']:,}",
            step_cell(record),
            f"{record['adapter_bytes'] / 1e6:.2f}",
        ]
        lines.append(row(cells))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    made = records[0]
    busy = any(not record["quiet"] for record in records)
    pair = any(record["base"] == PAIR for record in records)
    return "\n".join(
        [
            f"{made['date']}, {made['machine']['cpu']} ({made['machine']['cores']} cores), torch "
            f"{made['versions']['torch']}, peft {made['versions']['peft']}, commit `{made['commit'][:12]}`"
            f"{' with local changes' if made['modified'] else ''}; LoRA of rank {made['rank']}, one seed."
            f"{STARRED if busy else ''} Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
            *(["", _PAIR_NOTE] if pair else []),
        ]
    )


_PAIR_NOTE = (
    f'"{PAIR}": no package carries a BART, T5 or Marian, so the encoder-decoder is made of that encoder\'s '
    "weights alone, twice (`benchmarks/kind_bases.py`), and has never been trained to answer. "
    "Half of the reviews are positive: 0.5 is the figure of who has learned to answer with one of the two words, and guesses."
)
