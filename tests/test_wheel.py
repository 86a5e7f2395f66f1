"""What an installation brings: one top-level name, every file, and no torch in the core."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOTS = ("registry", "bases", "server", "trainer", "client", "protos")
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "prometheus-client")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=REPO,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/", 1)[0] for name in archive.namelist()}
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert tops == {"lorary", f"lorary-{version}.dist-info"}


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Kernels and marker files, too: what git tracks under a root is what is installed."""
    tracked = subprocess.run(
        ["git", "ls-files", *ROOTS], cwd=REPO, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    wanted = {path.split("/", 1)[1] for path in tracked if "/lorary/" in path}
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())


def test_core_installation_asks_for_no_torch(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    core = [r for r in Distribution.at(info).requires or [] if "extra ==" not in r]
    assert core
    assert not [r for r in core if r.startswith(HEAVY)]


def test_wheel_works_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    """Imported from the wheel alone, the namespace's parts find one another."""
    program = (
        "import lorary.client, lorary.registry, lorary.v1.inference_pb2 as m; print(m.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(unpacked) in done.stdout
