"""Copy a version out of a registry: whole and checked, or not at all.

Bytes are compared with their digests, and then looked at as if a stranger had sent them: a registry
that somebody else could write to may promise anything. What needs the base is checked by who has one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lorary.errors import AlreadyExists, CorruptArtifact
from lorary.registry.blobs import Progress, copy_file
from lorary.registry.durable import storage_errors, sync_folder, unused_name
from lorary.registry.folder import MANIFEST_FILE, scan_folder
from lorary.registry.manifest import Manifest
from lorary.registry.validate import check_form


def check_free(dest: Path) -> None:
    """Raise ``AlreadyExists`` unless ``dest`` is missing or an empty folder."""
    with storage_errors(f"look at {dest}"):
        if dest.is_symlink() or (dest.exists() and (not dest.is_dir() or any(dest.iterdir()))):
            raise AlreadyExists(f"{dest} exists and is not empty; choose another folder")


def copy_version(
    source: Path, manifest: Manifest, dest: Path, progress: Progress | None = None
) -> Path:
    """Copy a version's folder beside ``dest``, compare what was written, and only then name it ``dest``.

    Raises:
        CorruptArtifact: a file changed on the way, may not be in an adapter's folder, or is not what it
            claims.
        IncompatibleAdapter: the configuration switches on what is never served.
        StorageError: ``dest`` cannot be written.
    """
    with storage_errors(f"write {dest}"):
        dest.parent.mkdir(parents=True, exist_ok=True)
        staged = unused_name(dest.parent, f".{dest.name}.tmp")
        staged.mkdir()
        try:
            for entry in manifest.files:
                (staged / entry.path).parent.mkdir(exist_ok=True)
                written = copy_file(source / entry.path, staged / entry.path, progress)
                if written != entry.sha256:
                    raise CorruptArtifact(f"{source / entry.path} changed while it was copied")
            copy_file(source / MANIFEST_FILE, staged / MANIFEST_FILE)
            check_form(scan_folder(staged))
            staged.rename(dest)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        sync_folder(dest.parent)
    return dest
