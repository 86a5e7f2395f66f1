"""``lorary train`` as a person runs it: real processes, exit codes, what is printed and left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from lorary.registry.cli_support import exit_code_of
from lorary.trainer.cli import app
from lorary.trainer.recipe_file import recipe_dict
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

COMMAND = [sys.executable, "-m", "lorary.trainer"]
# Its last step does not end: else the run might be over before the signal comes.
WAITS_TO_BE_KILLED = """
import signal
from lorary.trainer import fit
from lorary.trainer.cli import main

before = fit._Steps.on_step_end

def on_step_end(self, args, state, control, **kwargs):
    before(self, args, state, control, **kwargs)
    if state.global_step == state.max_steps:
        signal.pause()

fit._Steps.on_step_end = on_step_end
main()
"""


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(make_recipe())))
    return path


def call(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
        timeout=300,
    )


def test_run_prints_figures_and_json_is_the_manifest(recipe_file: Path, tmp_path: Path) -> None:
    done = call(recipe_file, "--set", "training.max_steps=2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())
    assert manifest["training"]["steps"] == 2
    assert manifest["training"]["threads"] == 1
    assert "loss" in done.stderr
    assert "eta" in done.stderr
    assert "Warning" not in done.stderr


def test_dry_run_checks_everything_and_leaves_nothing(recipe_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = call(recipe_file, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing was trained or written" in done.stdout
    assert sorted(tmp_path.iterdir()) == before
    done = call(recipe_file, "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["plan"]["train"] == 92


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--set", "training.max_step=1"], 2, "Did you mean 'training.max_steps'"),
        (["--set", "data.path=/none.jsonl"], 2, "no such file"),
        (["--set", "base=nothing-such"], 3, "nothing-such"),
        (["--resume"], 2, "holds no whole checkpoint"),
        (["--output", "."], 4, "exists"),
        (["--output", "/proc/x/y"], 8, "cannot be written"),
        (["--threads", "0"], 2, "threads"),
        (["--nonsense"], 2, "nonsense"),
    ],
)
def test_bad_call_has_its_exit_code_and_leaves_nothing(
    recipe_file: Path,
    tmp_path: Path,
    args: list[str],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = sorted(tmp_path.iterdir())
    arguments = [str(recipe_file), *args]
    assert exit_code_of(lambda: app(args=arguments, standalone_mode=False)) == code
    printed = capsys.readouterr().err
    assert says in printed
    assert "Traceback" not in printed
    # A folder of runs may be made to see whether it can be.
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "runs"] == before


def test_killed_run_leaves_no_adapter_and_can_be_resumed(recipe_file: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment: nothing half-written has the output's name, and --resume ends the run."""
    args = [str(recipe_file), "--set", "training.max_steps=100"]
    args += ["--set", "training.patience=1000", "--set", "training.learning_rate=1e-4"]
    checkpoints = tmp_path / "runs" / "tiny.checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_TO_BE_KILLED, *args],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not list(checkpoints.glob("checkpoint-*/lorary.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "runs" / "tiny").exists()
    done = call(*args, "--resume", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["steps"] == 100
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("asked", "configured", "expected"),
    [(1, "", 1), (None, "1", 1), (10_000, "", None), (None, "", None), (None, "junk", None)],
)
def test_threads_never_exceed_the_cpus(
    asked: int | None, configured: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, configured)
    try:
        count = use_threads(asked)
        assert count == (expected or len(os.sched_getaffinity(0)))
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_mounted_function_is_the_command() -> None:
    from typer.testing import CliRunner

    result: Any = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for option in ("--output", "--set", "--resume", "--force", "--dry-run", "--threads", "--json"):
        assert option in result.output
