"""The tables of the ``registry`` command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from lorary.registry.aliases import AliasMove
from lorary.registry.cli_support import table
from lorary.registry.manifest import Conversion, Manifest, Method, Metrics
from lorary.registry.marks import Mark, Marks
from lorary.registry.results import Freed, VerifyReport, VersionInfo

if TYPE_CHECKING:
    # These read tensors, which takes long to import.
    from lorary.registry.mirror import Mirrored
    from lorary.registry.whowas import Held

_DIGEST_CHARS = 19


def versions(infos: Sequence[VersionInfo]) -> Table:
    """One row per version."""
    result = table(
        "adapter",
        "version",
        "aliases",
        "digest",
        "rank",
        "size",
        "base",
        "task",
        "metric",
        "pushed",
    )
    for info in infos:
        result.add_row(
            info.name,
            f"{info.version} [yellow](deprecated)[/]" if info.deprecated else str(info.version),
            ", ".join(info.aliases),
            info.digest[:_DIGEST_CHARS],
            str(info.rank),
            size(info.size_bytes),
            escape(info.base_name),
            info.task_kind,
            _primary(info.metrics),
            info.created_at,
        )
    return result


def manifest(info: VersionInfo, described: Manifest, report: str = "") -> Table:
    """One row per fact; ``report`` is where its page lies."""
    method, task, base = described.method, described.task, described.base
    rows = {
        "version": f"{info.name}@{info.version}",
        "digest": info.digest,
        "aliases": ", ".join(info.aliases),
        "deprecated": info.deprecated,
        "description": described.description,
        "pushed": info.created_at,
        "trained": described.created_at,
        "base": f"{base.name} ({base.architecture}, quantization {base.quantization})",
        "base fingerprint": base.fingerprint,
        "method": f"{method.name}, rank {method.rank}, alpha {method.alpha:g}",
        "invocation": _invocation(method),
        "converted": _conversion(described.conversion),
        "modules": ", ".join(method.target_modules),
        "task": task.kind,
        "labels": ", ".join(task.labels),
        "template": _quoted(task.template),
        "tasks": "\n".join(
            f"{name} ({one.kind}) {_quoted(one.template)}".rstrip()
            for name, one in described.tasks.items()
        ),
        "metrics": _all_metrics(described.metrics),
        "report": report,
        "data": json.dumps(described.data, ensure_ascii=False) if described.data else "",
        "probes": str(len(described.golden_probes)) if described.golden_probes else "",
        "files": "\n".join(f"{f.path}  {size(f.size)}  {f.sha256[:12]}…" for f in described.files),
    }
    return facts(rows)


def moves(found: Sequence[AliasMove]) -> Table:
    """One row per move of an alias."""
    result = table("at", "who", "alias", "from", "to", "kind", "reason")
    for move in found:
        result.add_row(
            move.at,
            escape(move.actor),
            move.alias,
            "-" if move.from_version is None else str(move.from_version),
            _to(move),
            f"{move.kind} [yellow](forced)[/]" if move.forced else move.kind,
            escape("\n".join([move.reason, *map(str, move.figures)]).strip()),
        )
    return result


def history(moves: Sequence[AliasMove], marks: Sequence[Mark]) -> Table:
    """One row per move and mark, by time."""
    result = table("at", "who", "what", "of", "from", "to", "reason")
    rows = [
        (
            move.at,
            move.actor,
            f"{move.kind} (forced)" if move.forced else move.kind,
            move.alias,
            "-" if move.from_version is None else str(move.from_version),
            _to(move),
            "\n".join([move.reason, *map(str, move.figures)]).strip(),
        )
        for move in moves
    ]
    for mark in marks:
        of = mark.alias if mark.version is None else f"version {mark.version}"
        why = "\n".join([mark.reason, *(f"requires {text}" for text in mark.require)]).strip()
        rows.append((mark.at, mark.actor, mark.kind, of or "", "", "", why))
    for row in sorted(rows, key=lambda row: row[0]):
        result.add_row(*map(escape, row))
    return result


def held(found: Held) -> Table:
    """What an alias held."""
    return facts(
        {
            "version": f"{found.name}@{found.version}",
            "digest": found.digest,
            "at": found.at,
            "since": found.since,
            "until": found.until or "now",
            "who": found.actor,
            "reason": found.reason,
            "deleted": found.deleted,
        }
    )


def facts(rows: dict[str, str]) -> Table:
    """One row per fact that is known."""
    result = table("", "")
    result.show_header = False
    for key, value in rows.items():
        if value:
            result.add_row(f"[bold]{key}[/]", escape(value))
    return result


def freed(found: Freed, *, is_dry: bool) -> Table:
    """What a collection removed, or would."""
    result = table("would remove" if is_dry else "removed", "")
    for what, count in (
        ("files that no version needs", found.num_blobs),
        ("unpacked folders of deleted versions", found.num_folders),
        ("left-overs of work that never ended", found.num_left_overs),
    ):
        result.add_row(what, str(count))
    result.add_row("[bold]room that is freed[/]", size(found.num_bytes))
    return result


def mirrored(found: Sequence[Mirrored]) -> Table:
    """One row per adapter."""
    result = table("adapter", "copied", "size", "there before", "moves", "marks", "signatures")
    for one in found:
        result.add_row(
            one.name,
            str(one.num_versions),
            size(one.num_bytes),
            str(one.num_there),
            str(one.num_moves),
            str(one.num_marks),
            str(one.num_signatures),
        )
    return result


def _to(move: AliasMove) -> str:
    if move.canary is not None:
        return f"{move.to_version}, canary {_canary(move.canary.to_dict())}"
    return "-" if move.to_version is None else str(move.to_version)


def aliases(found: dict[str, Any], marks: Marks) -> Table:
    """One row per alias, protected ones that point nowhere included.

    One with a canary is an object of version and canary.
    """
    has_canary = _any_canary(found)
    result = table("alias", "version", *(["canary"] if has_canary else []), "protected")
    for alias in sorted(found.keys() | marks.protected.keys()):
        at = found.get(alias)
        version = at if at is None or isinstance(at, int) else at["version"]
        mark = marks.protected.get(alias)
        rules = "" if mark is None else ", ".join(mark.require) or "moves by --force only"
        shown = "-" if version is None else str(version)
        if version in marks.deprecated:
            shown += " [yellow](deprecated)[/]"
        canary = [_canary(at["canary"]) if isinstance(at, dict) else ""] if has_canary else []
        result.add_row(alias, shown, *canary, escape(rules))
    return result


def _any_canary(found: dict[str, Any]) -> bool:
    return not all(isinstance(at, int) for at in found.values())


def _canary(found: dict[str, Any]) -> str:
    gates = ", ".join(f"{name} {value:g}" for name, value in found["gates"].items())
    shadow = f", shadow {found['shadow']:g} %" if found["shadow"] else ""
    promoted = f", promoted after {found['promote_after']}" if found["promote_after"] else ""
    return f"{found['version']} at {found['percent']:g} %{shadow} (gates: {gates}{promoted})"


def report(found: VerifyReport) -> Table:
    """One row per version, and per further problem."""
    result = table("adapter", "version", "digest", "result")
    for check in found.checks:
        outcome = f"[red]{escape(check.problem)}[/]" if check.problem else "[green]ok[/]"
        result.add_row(check.name, str(check.version), check.digest[:_DIGEST_CHARS], outcome)
    for problem in found.problems:
        result.add_row("", "", "", f"[red]{escape(problem)}[/]")
    return result


def size(num_bytes: int) -> str:
    """Return a size for people: ``9.8 MB``."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _invocation(method: Method) -> str:
    if not method.is_activated:
        return ""
    tokens = ", ".join(map(str, method.invocation_tokens))
    return f"on from the last tokens [{tokens}] of a prompt; the base before"


def _conversion(found: Conversion | None) -> str:
    if found is None or (found.source == "LORA" and not found.max_error):
        return ""
    return f"from {found.source}, relative error {found.max_error:.2g}"


def _quoted(template: str | None) -> str:
    return json.dumps(template, ensure_ascii=False) if template else ""


def _primary(metrics: Metrics | None) -> str:
    if metrics is None or metrics.primary not in metrics.adapter:
        return ""
    before = metrics.base.get(metrics.primary)
    after = metrics.adapter[metrics.primary]
    arrow = "" if before is None else f"{before:.3g} → "
    return escape(f"{metrics.primary} {arrow}{after:.3g}")


def _all_metrics(metrics: Metrics | None) -> str:
    if metrics is None:
        return ""
    names = sorted(metrics.base.keys() | metrics.adapter.keys())
    lines = [
        f"{name}: base {metrics.base.get(name, float('nan')):.4g}, "
        f"adapter {metrics.adapter.get(name, float('nan')):.4g}{_gain(metrics, name)}"
        for name in names
    ]
    return "\n".join([*lines, f"on {metrics.num_examples} held-out examples"])


def _gain(metrics: Metrics, name: str) -> str:
    """Return the interval of the difference that the adapter makes, where it is known."""
    found = metrics.uncertainty.get(name)
    if found is None or found.difference is None:
        return ""
    interval = found.difference
    return f", difference {interval.low:+.4g} to {interval.high:+.4g} ({metrics.confidence:.0%})"
