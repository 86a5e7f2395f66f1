"""``registry fsck`` and ``registry audit``: is everything as it was left, and who left it so?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from lorary.errors import CorruptArtifact, InvalidRequest
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import JsonOption, NameArgument, RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json, progress_bar, table
from lorary.registry.cli_tables import size

if TYPE_CHECKING:
    from lorary.registry.fsck import FsckReport

_AGE: Final = re.compile(r"([0-9]+)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def fsck(
    repair: Annotated[
        bool, typer.Option("--repair", help="Put right what can be, and look again.")
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="URL",
            help="Restore damaged files from this registry; may be repeated.",
        ),
    ] = None,
    grace: Annotated[
        str, typer.Option(help="Age of work in progress that counts as left over: 90s, 2h, 1d.")
    ] = "1d",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Look for damage and left-overs; exit code 5 if damage stays."""
    match = _AGE.fullmatch(grace)
    if match is None:
        raise InvalidRequest(f"--grace is {grace!r}; write a number and s, m, h or d: 90s, 2h, 1d")
    grace_s = int(match[1]) * _SECONDS[match[2]]
    opened = open_registry(registry)
    sources = [open_registry(address) for address in source or ()]
    with progress_bar("checking", None) as progress:
        report = opened.fsck(repair=repair, sources=sources, grace_s=grace_s, progress=progress)
    if as_json:
        print_json({"is_ok": report.is_ok, "report": report})
    else:
        _print(report)
    if not report.is_ok:
        count = len(report.damage)
        can = sum(1 for finding in report.damage if finding.repair)
        hint = (
            f"{can} of them can be repaired: registry fsck --repair"
            if can and not repair
            else ("restore them from another registry with --from, or push those adapters again")
        )
        raise CorruptArtifact(f"{count} damaged in {opened.url}; {hint}")


def audit(
    name: NameArgument,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="SHA256",
            help="Fail unless the log still holds this line (a folder's).",
        ),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show every change of an adapter: who, when, what, and why; exit code 5 if it was tampered with."""
    events = open_registry(registry).audit(name)
    if head is not None and not any(event.sha256 == head for event in events):
        raise CorruptArtifact(
            f"the audit log of '{name}' no longer holds the line {head[:12]}…: it was written anew"
        )
    if as_json:
        print_json({"head": events[-1].sha256 if events else None, "events": events})
        return
    shown = table("at", "who", "what", "of", "from", "to", "reason")
    for e in events:
        shown.add_row(
            e.at, escape(e.actor) or "?", e.event, e.subject, e.before or "-",
            e.after[:19] or "-", escape(e.reason),
        )  # fmt: skip
    console().print(shown)
    if events:
        console().print(f"head: {events[-1].sha256}", highlight=False)


def _print(report: FsckReport) -> None:
    if report.findings:
        console().print(_findings(report))
    console().print(
        f"{report.versions} versions, {report.blobs} blobs read; {report.spare_blobs} blobs "
        f"({size(report.spare_bytes)}) that no version refers to; {len(report.damage)} damaged",
        highlight=False,
    )


def _findings(report: FsckReport) -> Table:
    shown = table("where", "what", "problem", "repair")
    for finding in report.findings:
        colour = "red" if finding.severity == "damage" else "yellow"
        outcome = f"[green]done:[/] {finding.repair}" if finding.is_repaired else finding.repair
        shown.add_row(
            escape(finding.where), f"[{colour}]{finding.severity}[/]", escape(finding.problem),
            outcome or "none",
        )  # fmt: skip
    return shown
