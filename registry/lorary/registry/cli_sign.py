"""``registry sign`` and ``registry verify-signature``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import JsonOption, RefArgument, RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json


def sign(
    ref: RefArgument,
    key: Annotated[Path, typer.Option(help="Elliptic private key (PEM, not encrypted).")],
    cert: Annotated[Path | None, typer.Option(help="The key's certificate (PEM).")] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(help="Certificate between that and a root (PEM); may be repeated."),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Sign a version: its files, its name, its number, its digest and its base."""
    opened = open_registry(registry)
    signed = opened.sign(ref, key, certificate=cert, chain=chain or ())
    if as_json:
        print_json(signed)
    else:
        console().print(f"signed {signed.name}@{signed.version} {signed.digest}", highlight=False)


def verify_signature(
    ref: RefArgument,
    trusted_keys: Annotated[
        list[Path] | None,
        typer.Option(
            help="Public key or root certificate (PEM); may be repeated. By default those of "
            "LORARY_TRUSTED_KEYS."
        ),
    ] = None,
    accept_older: Annotated[
        bool,
        typer.Option(
            "--accept-older",
            help="Accept that REF points at an older version than it did here before.",
        ),
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Check that a trusted key signed a version under this name; exit code 5 if not."""
    # Imported here: reading signatures takes longer to import than help takes to print.
    from lorary.registry.trust import trusting

    opened = open_registry(registry)
    resolved, by = opened.verify_signature(
        ref, trusting(trusted_keys or ()), accept_older=accept_older
    )
    if as_json:
        print_json({"version": resolved, "key": by})
    else:
        console().print(f"{resolved.name}@{resolved.version} is signed by {by}", highlight=False)
