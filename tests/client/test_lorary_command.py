"""The ``lorary`` command itself: quick help, lazy parts, and what a missing extra says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorary.cli.main import PARTS

HEAVY = ("torch", "transformers", "peft", "grpc_health", "prometheus_client")


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60
    )


def test_help_lists_every_part_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorary.cli.main as m\n"
        "sys.argv = ['lorary', '--help']\n"
        "try: m.main()\n"
        "except SystemExit as e: assert not e.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_help_of_its_own(part: str) -> None:
    done = run("from lorary.cli.main import main; main()", part, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: lorary" in done.stdout


@pytest.mark.parametrize("part", ["serve", "call", "ps"])
def test_help_of_these_needs_no_extra(part: str) -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in ("torch", "transformers"))
    done = run(f"import sys; {blocked}; from lorary.cli.main import main; main()", part, "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", ["grpc_health", "prometheus_client"])
def test_a_missing_extra_is_one_line_and_exit_78(library: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; from lorary.cli.main import main; main()"
    done = run(code, "serve", "--base", "x", "--port", "0", "--metrics-port", "0")
    assert done.returncode == 78
    assert f"needs {library}" in done.stderr
    assert "pip install 'lorary[server]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_version_and_unknown_commands() -> None:
    main = "from lorary.cli.main import main; main()"
    assert run(main, "--version").stdout.startswith("lorary ")
    unknown = run(main, "sevre")
    assert unknown.returncode == 2
    assert "sevre" in unknown.stderr


def test_completion_reaches_into_lazy_parts() -> None:
    import os

    env = os.environ | {
        "_LORARY_COMPLETE": "complete_bash",
        "COMP_WORDS": "lorary serve --max-b",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from lorary.cli.main import main; main()"],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
    )
    assert "--max-batch" in done.stdout, done.stderr
