"""The commands that judge adapters without keeping them: poison."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lorary.errors import CorruptArtifact, InvalidRequest
from lorary.registry.cli_base import BaseOption, base_folder_and_card
from lorary.registry.cli_options import JsonOption
from lorary.registry.cli_support import console, print_json, table

_LOADER_TIMEOUT_S = 60.0


def poison(
    dest: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    base: BaseOption,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this for every folder, put in place of {}; exit code 0 means that it was taken.",
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


def _run(command: list[str], folder: Path) -> None:
    """Run a loader on a folder; a failure becomes an exception that holds its last line."""
    argv = [str(folder) if part == "{}" else part for part in command]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_LOADER_TIMEOUT_S, check=False)
    except OSError as error:
        raise InvalidRequest(f"cannot run {argv[0]}: {error.strerror}", field="against") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise ValueError(f"exit code {done.returncode}: {lines[-1]}")
