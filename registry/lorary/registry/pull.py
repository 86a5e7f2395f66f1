"""Copy a version out of a registry: whole and checked, or not at all.

Bytes are compared with their digests, and then looked at as if a stranger had sent them: a registry
that somebody else could write to may promise anything. What needs the base is checked by who has one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lorary.errors import AlreadyExists, CorruptArtifact
from lorary.registry.blobs import Progress, copy_file
from lorary.registry.durable import storage_errors, sync_folder, unused_name
from lorary.registry.folder import MANIFEST_FILE, scan_folder
from lorary.registry.manifest import Manifest
from lorary.registry.validate import check_form
from lorary.registry.versions import Pointer


def check_free(dest: Path) -> None:
    """Raise ``AlreadyExists`` unless ``dest`` is missing or an empty folder."""
    with storage_errors(f"look at {dest}"):
        if dest.is_symlink() or (dest.exists() and (not dest.is_dir() or any(dest.iterdir()))):
            raise AlreadyExists(f"{dest} exists and is not empty; choose another folder")


def copy_version(
    source: Path,
    pointer: Pointer,
    manifest: Manifest,
    dest: Path,
    progress: Progress | None = None,
    *,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Copy a version's folder beside ``dest``, compare what was written, and only then name it ``dest``.

    Nothing is believed of ``source``: every byte that is written is hashed on the way, and synced.

    Args:
        source: the version's folder, as it is kept.
        pointer: says what the manifest must be.
        manifest: says what the files must be.
        dest: a missing or empty folder.
        progress: told of bytes copied.
        check: looks at the copy before it is named ``dest``; what it raises leaves nothing behind.

    Raises:
        CorruptArtifact: a file is missing, is not what was promised, may not be in an adapter's folder,
            or is not what it claims.
        IncompatibleAdapter: the configuration switches on what is never served.
        StorageError: ``dest`` cannot be written.
    """
    promised = {entry.path: entry.sha256 for entry in manifest.files}
    promised[MANIFEST_FILE] = pointer.manifest_sha256
    with storage_errors(f"write {dest}"):
        dest.parent.mkdir(parents=True, exist_ok=True)
        staged = unused_name(dest.parent, f".{dest.name}.tmp")
        staged.mkdir()
        try:
            for path, sha256 in promised.items():
                (staged / path).parent.mkdir(exist_ok=True)
                _copy(source / path, staged / path, sha256, progress)
            for folder in {staged, *((staged / path).parent for path in promised)}:
                sync_folder(folder)
            check_form(scan_folder(staged))
            if check is not None:
                check(staged)
            staged.rename(dest)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        sync_folder(dest.parent)
    return dest


def _copy(source: Path, target: Path, sha256: str, progress: Progress | None) -> None:
    try:
        written = copy_file(source, target, progress)
    except FileNotFoundError:
        raise CorruptArtifact(
            f"{source} is missing; push the adapter again to restore it"
        ) from None
    if written != sha256:
        raise CorruptArtifact(
            f"{source} has sha256 {written[:12]}…; its manifest says {sha256[:12]}…. "
            "Push the adapter again to restore it."
        )
