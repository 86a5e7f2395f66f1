"""``lorary serve``: the flags are the fields of ``ServerConfig``. Imports no torch until it runs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Annotated, Any

import typer

from lorary.server.config import ServerConfig, flag, format_size, parse_size


def serve(*, as_json: bool, **options: Any) -> None:
    """Serve one resident base with a different adapter for every call.

    Prints one line to stdout when it is ready, logs to stderr, and drains on SIGTERM or Ctrl-C.
    """
    config = ServerConfig(**options)
    from lorary.server.run import run

    raise typer.Exit(run(config, as_json=as_json))


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """Return the command line's parameter for one field of the configuration."""
    meta = field.metadata
    kwargs: dict[str, Any] = {"help": meta["help"], "envvar": meta["env"]}
    default: Any = field.default
    if meta["is_size"]:
        # Sizes are texts on the command line; the parser turns them into bytes.
        kwargs |= {"parser": _size, "metavar": "SIZE"}
        default = None if default is None else format_size(default)
    elif meta["choices"]:
        kwargs["metavar"] = "|".join(meta["choices"])
        hint = str
    elif meta["low"] is not None:
        kwargs |= {"min": meta["low"], "max": meta["high"]}
    name = flag(field.name)
    is_switch = hint == bool | None or default is True
    declared = f"{name}/--no-{name[2:]}" if is_switch else name
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, typer.Option(declared, **kwargs)],
    )


def _size(text: str) -> int:
    from lorary.errors import ConfigError

    try:
        return parse_size(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _parameters() -> list[inspect.Parameter]:
    hints = typing.get_type_hints(ServerConfig)
    fields = [_parameter(f, hints[f.name]) for f in dataclasses.fields(ServerConfig)]
    as_json = inspect.Parameter(
        "as_json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")],
    )
    return [*fields, as_json]


# typer reads a function's signature; this one's is the configuration.
serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
serve.__annotations__ = {p.name: p.annotation for p in _parameters()}

app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(
    name="serve",
    epilog="Example: lorary serve --base smollm2-135m --merge-memory 512MiB --verify enforce",
)(serve)
