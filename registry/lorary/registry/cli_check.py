"""The commands that judge adapters without keeping them: check, poison."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lorary.errors import CorruptArtifact, IncompatibleAdapter, InvalidRequest, MissingDependency
from lorary.registry.cli_base import BaseOption, base_folder_and_card
from lorary.registry.cli_options import (
    AllowZeroOption,
    JsonOption,
    MaxRatioOption,
    ResidualBaseOption,
)
from lorary.registry.cli_support import console, print_json, table
from lorary.registry.manifest import MAX_RATIO, Accepted

if TYPE_CHECKING:
    from lorary.registry.check import CheckReport
    from lorary.registry.servability import Server

_LOADER_TIMEOUT_S = 60.0
_SHOWN_PROBLEMS = 40


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT folder.")],
    base: BaseOption,
    server: Annotated[
        str | None,
        typer.Option(
            help="lorary, vllm, llama.cpp or peft: only this one, which must take it; with peft it is "
            "loaded and compared."
        ),
    ] = None,
    allow_zero: AllowZeroOption = False,
    max_ratio: MaxRatioOption = MAX_RATIO,
    residual_base: ResidualBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say everything that is wrong with an adapter, and who can load it with which deviation."""
    from lorary.registry.check import check_folder, worst_error

    servers = _servers(server)
    path, card = base_folder_and_card(base)
    with tempfile.TemporaryDirectory(prefix="lorary-check-") as work:
        canonical = Path(work) / "canonical"
        report = check_folder(
            folder,
            card,
            servers=servers,
            accepted=Accepted(allow_zero=allow_zero, max_ratio=max_ratio),
            residual_base=residual_base,
            dest=canonical,
        )
        deviation = None
        if server == "peft" and not report.problems and not residual_base:
            deviation = _compare(path, folder, canonical)
    if as_json:
        print_json({"is_ok": not report.problems, "report": report, "deviation": deviation})
    else:
        _print(report, deviation)
    if report.problems:
        count = len(report.problems)
        raise worst_error(report)(f"{count} problem{'s' if count > 1 else ''} in {folder}")
    if server is not None and report.canonical[0].outcome == "refuses":
        raise IncompatibleAdapter(f"{server} refuses it: {'; '.join(report.canonical[0].reasons)}")


def poison(
    dest: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    base: BaseOption,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this for every folder, put in place of {}; exit code 0, or none within a minute, "
            "means that it was taken.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write hostile adapters for a base, one folder each, and try a loader on them."""
    from lorary.registry.poison import attacks, run_against, write_corpus
    from lorary.registry.poison.corpus import description

    card = base_folder_and_card(base)[1]
    if against is None:
        write_corpus(card, dest)
        if as_json:
            print_json([description(attack) for attack in attacks()])
        else:
            listed = table("attack", "kind", "what")
            for attack in attacks():
                listed.add_row(attack.name, attack.kind, escape(attack.what))
            console().print(listed)
        return
    command = shlex.split(against)
    if "{}" not in command:
        raise InvalidRequest("--against needs {} where the folder goes", field="against")
    outcomes = [*run_against(lambda folder: _run(command, folder), card, dest)]
    rows = [
        {
            "name": outcome.attack.name if outcome.attack else "honest",
            "is_right": outcome.is_right,
            "answer": str(outcome.refusal) if outcome.refusal else "taken",
        }
        for outcome in outcomes
    ]
    if as_json:
        print_json(rows)
    else:
        listed = table("folder", "result", "answer")
        for row in rows:
            result = "[green]ok[/]" if row["is_right"] else "[red]WRONG[/]"
            listed.add_row(str(row["name"]), result, escape(str(row["answer"])))
        console().print(listed)
    wrong = [str(row["name"]) for row in rows if not row["is_right"]]
    if wrong:
        raise CorruptArtifact(
            f"the loader was wrong about {len(wrong)} of {len(rows)}: {wrong[:5]}"
        )


def _servers(server: str | None) -> tuple[Server, ...]:
    from lorary.registry.servability import SERVERS

    if server is None:
        return SERVERS
    for known in SERVERS:
        if server == known:
            return (known,)
    raise InvalidRequest(
        f"--server is '{server}'; it must be one of {', '.join(SERVERS)}", field="server"
    )


def _compare(base: Path, given: Path, canonical: Path) -> Any:
    """Load both forms with PEFT; only after the validator has found nothing."""
    try:
        adapted = importlib.import_module("lorary.bases.adapted")
    except ImportError as error:
        raise MissingDependency(
            f"loading with PEFT needs {error.name or error}: pip install 'lorary[train]'"
        ) from error
    return adapted.compare_adapters(base, given, canonical)


def _print(report: CheckReport, deviation: Any) -> None:
    if report.problems:
        problems = table("problem", "")
        for problem in report.problems[:_SHOWN_PROBLEMS]:
            problems.add_row(f"[red]{problem.error}[/]", escape(problem.text))
        if len(report.problems) > _SHOWN_PROBLEMS:
            problems.add_row("", f"and {len(report.problems) - _SHOWN_PROBLEMS} more (--json)")
        console().print(problems)
    verdicts = table("server", "the files as given", "the form that push keeps", "why")
    for i, given in enumerate(report.as_given):
        kept = report.canonical[i] if report.canonical else None
        reasons = list(dict.fromkeys([*given.reasons, *(kept.reasons if kept else ())]))
        outcome = kept.outcome if kept else "-"
        verdicts.add_row(given.server, given.outcome, outcome, escape("; ".join(reasons)))
    console().print(verdicts)
    if report.conversion is not None:
        source, error = report.conversion.source, report.conversion.max_error
        typer.echo(f"kept as LoRA, from {source}; relative error {error:.2g}")
    if deviation is not None:
        typer.echo(
            f"PEFT, original against canonical: largest logit deviation {deviation.max_logit:.2g}, "
            f"where the adapter's effect is {deviation.adapter_effect:.2g}; "
            f"{100 * deviation.top_1:.4g} % of {deviation.num_positions} positions agree"
        )


def _run(command: list[str], folder: Path) -> None:
    """Run a loader on a folder; a failure becomes an exception that holds its last line."""
    argv = [str(folder) if part == "{}" else part for part in command]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_LOADER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return  # one that hangs has not refused
    except OSError as error:
        raise InvalidRequest(f"cannot run {argv[0]}: {error.strerror}", field="against") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise ValueError(f"exit code {done.returncode}: {lines[-1]}")
