"""What installers are made of: commands whose output is kept, environments, missing programs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TAIL_LINES = 25


class InstallError(Exception):
    """A step failed; the message says which, the end of its output, and what to do."""


def say(line: str) -> None:
    """Tell what is being done."""
    print(line, file=sys.stderr, flush=True)


def run(what: str, command: Sequence[str | Path], *, log: Path) -> None:
    """Run a command; its output goes to the end of ``log``.

    Raises:
        InstallError: it failed or does not exist.
    """
    started_s = time.monotonic()
    say(f"{what} (output in {log})")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(words)}\n".encode())
        output.flush()
        start = output.tell()
        try:
            code = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        except FileNotFoundError:
            raise InstallError(f"{what}: there is no program '{words[0]}'.") from None
    if code:
        with log.open("rb") as output:
            output.seek(start)
            tail = output.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        raise InstallError(
            f"{what} failed with exit code {code}; the end of '{log}':\n" + "\n".join(tail)
        )
    say(f"{what}: done in {time.monotonic() - started_s:.0f} s")


def make_environment(folder: Path, *, log: Path) -> Path:
    """Make a virtual environment unless it is there; return its interpreter.

    ``VENV_ARGS`` is passed on, as in the Makefile.
    """
    python = folder / "bin" / "python"
    # pip comes last in a new environment.
    if not (folder / "bin" / "pip").exists():
        shutil.rmtree(folder, ignore_errors=True)
        arguments = shlex.split(os.environ.get("VENV_ARGS", ""))
        command = [sys.executable, "-m", "venv", *arguments, str(folder)]
        run(f"making {folder.name}", command, log=log)
    return python


def pip_arguments() -> list[str]:
    """Return ``PIP_ARGS``, which every ``pip install`` and ``pip download`` gets."""
    return shlex.split(os.environ.get("PIP_ARGS", ""))


def pip_install(python: Path, requirements: Sequence[str], *, log: Path) -> None:
    """Install into an environment; what is there already is not fetched again."""
    command = [str(python), "-m", "pip", "install", "--no-input", *pip_arguments(), *requirements]
    run(f"installing {' '.join(requirements)}", command, log=log)


def pip_uninstall(python: Path, packages: Sequence[str], *, log: Path) -> None:
    """Remove packages, those that are there."""
    command = [str(python), "-m", "pip", "uninstall", "--yes", *packages]
    run(f"removing {' '.join(packages)}", command, log=log)


def apt_install(package: str, *, log: Path) -> None:
    """Install a Debian package, if this user may.

    Raises:
        InstallError: there is no apt-get, or this is not root; the message has the command.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise InstallError(
            f"the system package '{package}' is missing. Run: sudo apt-get install {package} "
            "(or what your system calls it), then `make peers` again."
        )
    run("reading Debian's package lists", ["apt-get", "update", "-q"], log=log)
    run(
        f"installing {package}",
        ["apt-get", "install", "-y", "-q", "--no-install-recommends", package],
        log=log,
    )
