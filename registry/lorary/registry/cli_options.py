"""Arguments and options that several commands of the registry have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorary.registry import cli_complete

if TYPE_CHECKING:
    from lorary.registry.store import Registry

RegistryOption = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="LORARY_REGISTRY",
        metavar="URL",
        help="file:///path, a path, or hf://owner.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the log.")]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="REQUIREMENT",
        help="accuracy>=0.9, or accuracy>=prod-0.01; may be repeated.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Move a protected alias all the same; needs --reason.")
]
ExpectOption = Annotated[
    str | None,
    typer.Option(
        "--expect", help="Change nothing unless the alias is at this version, or at 'none'."
    ),
]
AllowZeroOption = Annotated[
    bool, typer.Option("--allow-zero", help="Accept an adapter that changes nothing.")
]
MaxRatioOption = Annotated[
    float,
    typer.Option(
        "--max-ratio", min=0, help="Largest change of a module, in norms of the base's weight."
    ),
]
ResidualBaseOption = Annotated[
    bool,
    typer.Option(
        "--residual-base", help="The base is what PiSSA or its kin left: take it as it is."
    ),
]
RefArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF", help="name, name@prod, name@3 …", autocompletion=cli_complete.complete_ref
    ),
]
NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="An adapter's name.", autocompletion=cli_complete.complete_name
    ),
]
AliasArgument = Annotated[
    str,
    typer.Argument(metavar="ALIAS", help="The alias.", autocompletion=cli_complete.complete_alias),
]


def open_registry(address: str, *, create: bool = False) -> Registry:
    """Open the registry at an address."""
    # Imported here: what reads tensors takes longer to import than help takes to print.
    from lorary.registry.store import Registry

    return Registry.open(address, create=create)
