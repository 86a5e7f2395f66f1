"""Arguments and options that several commands of the registry have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

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
RefArgument = Annotated[str, typer.Argument(metavar="REF", help="name, name@prod, name@3 …")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name.")]


def open_registry(address: str, *, create: bool = False) -> Registry:
    """Open the registry at an address."""
    # Imported here: what reads tensors takes longer to import than help takes to print.
    from lorary.registry.store import Registry

    return Registry.open(address, create=create)
