"""Options that every benchmark's command line has, and what ``--table`` does in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks import report
from benchmarks.harness.machine import DOCUMENT, newest_results

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

Base = Annotated[str, typer.Option(help="Base model.")]
Threads = Annotated[int, typer.Option(help="Threads; 0 takes every core.")]
PromptTokens = Annotated[int, typer.Option(min=1)]
TolerateLoad = Annotated[
    bool, typer.Option("--tolerate-load", help="Accept figures of a busy machine; recorded.")
]
Retries = Annotated[int, typer.Option(min=0, help="Repeats of what was disturbed.")]
Out = Annotated[Path | None, typer.Option(help="Result file.")]
Table = Annotated[
    bool, typer.Option("--table", help="Only render results into docs/benchmarks.md.")
]
BASE = "smollm2-135m"
RETRIES = 3


def known(asked: Sequence[str], names: Collection[str]) -> None:
    """Check what was asked for by name.

    Raises:
        typer.BadParameter: there is none of a name; with those that there are.
    """
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise typer.BadParameter(f"'{unknown[0]}' is unknown; there are {', '.join(names)}")


def show(name: str, out: Path | None, section: Callable[[Path], str]) -> Path:
    """Put ``section`` of ``out``, or of the newest records, into docs/benchmarks.md; return the records.

    Raises:
        typer.BadParameter: there are no records.
    """
    try:
        path = out or newest_results(name)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    report.write_section(DOCUMENT, name, section(path))
    typer.echo(f"{DOCUMENT} shows {path}", err=True)
    return path
