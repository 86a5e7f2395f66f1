"""Commands that compare and find: diff, search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_complete import complete_ref
from lorary.registry.cli_options import JsonOption, RefArgument, RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json, progress_bar, table, warn

if TYPE_CHECKING:
    from rich.table import Table

    from lorary.registry.diff import Changed, VersionDiff
    from lorary.registry.search import Found

_MAX_VALUE = 120


def search(
    terms: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TERM", help="base=… task=… name=… alias=… 'accuracy>0.9' 'rank<=16' words"
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(help="A figure, largest first, or 'name'; by default the first one compared."),
    ] = "",
    latest: Annotated[
        bool, typer.Option("--latest", help="Every adapter's newest version only.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Find versions by what their manifests say: fields, figures, words."""
    # Imported here, as in all commands: what reads tensors takes long to import.
    from lorary.registry.search import search as find

    found = find(open_registry(registry), terms or (), sort=sort, is_latest=latest)
    for figure in found.unknown:
        known = f"there are {', '.join(found.known)}" if found.known else "none has any metric"
        warn(f"no version has a figure '{figure}'; {known}")
    if as_json:
        print_json(
            [
                {"version": info, "figures": found.figures[f"{info.name}@{info.version}"]}
                for info in found.versions
            ]
        )
    else:
        console().print(_found(found))


def diff(
    before: RefArgument,
    after: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="The other one; @7 is of the same adapter.",
            autocompletion=complete_ref,
        ),
    ],
    limit: Annotated[
        int, typer.Option(min=0, help="Show so many of the most changed modules; 0 is all.")
    ] = 20,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Say what changed between two versions: configuration, data, metrics, every module's weights."""
    from lorary.registry.diff import diff_versions

    opened = open_registry(registry)
    with progress_bar("reading", None) as progress:
        found = diff_versions(opened, before, after, progress)
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(found.summary, highlight=False, markup=False, style="bold")
    for part in (_metrics(found), _facts(found), _modules(found, limit)):
        if part.row_count:
            out.print()
            out.print(part)


def _found(found: Found) -> Table:
    keys = list(dict.fromkeys(k for figures in found.figures.values() for k in figures))
    result = table("adapter", "version", "aliases", "base", "task", "rank", *keys, "pushed")
    for info in found.versions:
        figures = found.figures[f"{info.name}@{info.version}"]
        result.add_row(
            info.name,
            f"{info.version} [yellow](deprecated)[/]" if info.deprecated else str(info.version),
            ", ".join(info.aliases),
            escape(info.base_name),
            info.task_kind,
            str(info.rank),
            *(_number(figures.get(key)) for key in keys),
            info.created_at,
        )
    return result


def _metrics(found: VersionDiff) -> Table:
    names = [f"{side.name}@{side.version}" for side in (found.before, found.after)]
    result = table("metric", *names, "change")
    for metric in found.metrics:
        better = "" if not metric.delta else "green" if metric.delta > 0 else "red"
        change = "" if metric.delta is None else f"{metric.delta:+.4g}"
        result.add_row(
            f"[bold]{escape(metric.metric)}[/]" if metric.is_primary else escape(metric.metric),
            _number(metric.before),
            _number(metric.after),
            f"[{better}]{change}[/]" if better else change,
        )
    if found.num_examples[0] != found.num_examples[1]:
        result.add_row("held-out examples", *(str(n or "-") for n in found.num_examples), "")
    return result


def _facts(found: VersionDiff) -> Table:
    result = table("what", "before", "after")
    for part in ("base", "task", "config", "data", "training"):
        changes: tuple[Changed, ...] = getattr(found, part)
        for change in changes:
            result.add_row(
                f"{part}: {escape(change.key)}", _value(change.before), _value(change.after)
            )
    return result


def _modules(found: VersionDiff, limit: int) -> Table:
    result = table("module", "‖ΔBA‖/‖BA‖", "‖BA‖", "", "overlap", "effective rank", "")
    moved = [module for module in found.modules if module.kind != "same"]
    for module in moved[: limit or None]:
        share = "" if module.change is None else f"{module.change:.3g}"
        result.add_row(
            escape(module.module),
            share if module.kind == "changed" else f"{module.kind} {share}".strip(),
            _number(module.norm_before),
            f"→ {_number(module.norm_after)}",
            _number(module.overlap),
            _number(module.effective_rank_before),
            f"→ {_number(module.effective_rank_after)}",
        )
    left = len(moved) - len(moved[: limit or None])
    if left:
        result.add_row(f"[dim]and {left} more: --limit 0[/]")
    return result


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _value(value: object) -> str:
    text = "-" if value is None else str(value)
    return escape(text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 1]}…")
