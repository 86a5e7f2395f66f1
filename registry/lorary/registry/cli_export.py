"""The command that gives a version to others: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lorary.errors import InvalidRequest
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_base import base_folder_and_card
from lorary.registry.cli_options import JsonOption, RefArgument, RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json

T = TypeVar("T", bound=str)


def export(
    ref: RefArgument,
    dest: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    to: Annotated[str, typer.Option(help="peft, gguf (for llama.cpp) or merged (a whole model).")],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or name of its base; by default the one its manifest names."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of a merged model: bfloat16 or float16.")
    ] = "bfloat16",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Write a version in the form that another program loads."""
    from lorary.registry.export import DTYPES, FORMS, ExportReport, export_gguf, export_merged

    form = _one_of("to", to, FORMS)
    weights = _one_of("dtype", dtype, DTYPES)
    opened = open_registry(registry)
    resolved = opened.resolve(ref)
    if form == "peft":
        path = opened.pull(f"{resolved.name}@{resolved.version}", dest)
        version = f"{resolved.name}@{resolved.version}"
        report = ExportReport(path=str(path), form=form, version=version, digest=resolved.digest)
    else:
        folder, card = base_folder_and_card(base or opened.manifest(resolved).base.name)
        if form == "gguf":
            report = export_gguf(opened, resolved, folder, card, dest)
        else:
            report = export_merged(opened, resolved, folder, card, dest, dtype=weights)
    if as_json:
        print_json(report)
        return
    console().print(f"{report.version} {report.digest} → {report.path}", highlight=False)
    if report.deviation is not None:
        typer.echo(_deviation(report.deviation))


def _one_of(option: str, value: str, known: tuple[T, ...]) -> T:
    for choice in known:
        if value == choice:
            return choice
    raise InvalidRequest(
        f"--{option} is '{value}'; it must be one of {', '.join(known)}", field=option
    )


def _deviation(found: Any) -> str:
    return (
        f"merged against unmerged: largest logit deviation {found.max_logit:.3g}, where the adapter's "
        f"effect is {found.adapter_effect:.3g}; {100 * found.top_1:.4g} % of {found.num_positions} "
        "positions have the same most likely token"
    )
