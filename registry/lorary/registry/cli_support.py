"""What every command line of Lorary shares: errors to exit codes, JSON, tables, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer

from lorary.errors import LoraryError, outcome
from lorary.registry.cli_bash import whole_refs

# rich is imported where it is used: help and completion need little of it.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
_PIPED_WIDTH: Final = 200
# Newer typers carry their own copy of click, older ones import it; this is the class either way.
_ClickException: Final[Any] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)


def run(app: typer.Typer, *, prog_name: str | None = None) -> NoReturn:
    """Run a typer app and leave the process with the exit code of ``lorary.errors``.

    A ``LoraryError`` becomes one line on stderr. Anything unexpected keeps its traceback.
    """
    with whole_refs(prog_name or ""):
        code = exit_code_of(lambda: app(prog_name=prog_name, standalone_mode=False))
    sys.exit(code)


def exit_code_of(call: Callable[[], Any]) -> int:
    """Run ``call``, report what it raises on stderr, and return the exit code."""
    try:
        result = call()
    except LoraryError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        return outcome(error).exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("error: interrupted", err=True)
        return EXIT_INTERRUPTED
    except typer.Exit as error:
        return error.exit_code
    except _ClickException as error:
        error.show()
        return EXIT_USAGE
    except Exception as error:  # noqa: BLE001 - the top of a process: report, and keep the traceback
        traceback.print_exception(error)
        typer.echo(
            f"error: unexpected {type(error).__name__}; this is a bug of Lorary: report it with the "
            "traceback above",
            err=True,
        )
        return outcome(error).exit_code
    return result if type(result) is int else 0


def print_json(value: Any) -> None:
    """Write ``value`` to stdout as JSON; dataclasses become objects."""
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def console() -> Console:
    """Return a console on stdout; wide when it is a pipe, so that tables are not cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_PIPED_WIDTH)


def warn(text: str) -> None:
    """Say something on stderr that the user should know."""
    typer.echo(f"warning: {text}", err=True)


def table(*columns: str, title: str | None = None) -> Table:
    """Return a plain rich table."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    return result


@contextlib.contextmanager
def progress_bar(what: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Show bytes done, speed and time left on stderr while it is a terminal.

    Args:
        what: what is being done.
        total_bytes: how many bytes there are, ``None`` if that is not known.

    Yields:
        A function to be called with the number of bytes just done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    with bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
