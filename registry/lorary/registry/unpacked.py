"""Versions as folders on this machine: blobs, and PEFT folders hard-linked to them.

::

    <root>/
      blobs/sha256/5e/5e1f…            files by the sha256 of their bytes (blobs)
      unpacked/<manifest's sha256>/    a version as a PEFT folder
      tmp/                             work in progress; left-overs of killed processes are harmless

A registry in a folder is built on this, and what was fetched from a Hub is kept in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Final

from lorary.errors import CorruptArtifact
from lorary.registry.blobs import Blobs, Progress, Reader, check_file
from lorary.registry.durable import make_folder, storage_errors, sync_folder, unused_name
from lorary.registry.folder import MANIFEST_FILE, TENSORS_FILE
from lorary.registry.manifest import Manifest
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)

FOLDERS: Final = ("blobs", "unpacked", "tmp")


class VersionFolders:
    """The blobs and unpacked versions under one folder. Thread-safe, and safe between processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root / "blobs")

    def create(self) -> None:
        """Make the folders that are missing.

        Raises:
            StorageError: they cannot be made.
        """
        with storage_errors(f"create {self.root}"):
            for folder in FOLDERS:
                make_folder(self.root / folder)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Give an empty folder on the same file system, removed at the end.

        Raises:
            StorageError: nothing can be written here.
        """
        folder = unused_name(self.root / "tmp", "push")
        with storage_errors(f"write to {self.root}"):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def manifest(self, pointer: Pointer) -> Manifest:
        """Return a version's manifest, checked against its digest.

        Raises:
            CorruptArtifact: it is missing or damaged.
        """
        path = self.blobs.check(pointer.manifest_sha256, pointer.manifest_size)
        with storage_errors(f"read {path}"):
            return Manifest.from_json(path.read_bytes())

    def has(self, pointer: Pointer) -> bool:
        """Tell whether the version is unpacked here, whole or damaged."""
        return self._folder(pointer).exists()

    def fetch(
        self, pointer: Pointer, progress: Progress | None = None, reader: Reader | None = None
    ) -> Path:
        """Return a folder with the version's files, each checked against its digest just now.

        ``reader`` reads the file of tensors.

        Raises:
            CorruptArtifact: a file is missing or damaged.
        """
        folder = self.locate(pointer)
        self._check(folder, pointer, progress, reader)
        return folder

    def locate(self, pointer: Pointer) -> Path:
        """Return the version's folder, made from its blobs if need be; its files are not checked.

        Raises:
            CorruptArtifact: its manifest is missing or damaged.
        """
        folder = self._folder(pointer)
        if not folder.exists():
            self.unpack(pointer)
        return folder

    def check(self, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Check every blob of a version and return its manifest.

        Raises:
            CorruptArtifact: something is missing or damaged.
        """
        manifest = self.manifest(pointer)
        for entry in manifest.files:
            self.blobs.check(entry.sha256, entry.size, progress)
        return manifest

    def unpack(self, pointer: Pointer) -> None:
        """Link a version's blobs into a PEFT folder; a damaged one is replaced.

        Raises:
            CorruptArtifact: its manifest is missing or damaged.
            StorageError: a blob is missing, or the folder cannot be written.
        """
        target = self._folder(pointer)
        if target.exists():
            try:
                self._check(target, pointer)
            except CorruptArtifact:
                self.drop(pointer)
            else:
                return
        manifest = self.manifest(pointer)
        staged = unused_name(self.root / "tmp", "unpack")
        with storage_errors(f"unpack version {pointer.version} to {target}"):
            staged.mkdir()
            try:
                for entry in manifest.files:
                    (staged / entry.path).parent.mkdir(exist_ok=True)
                    os.link(self.blobs.path(entry.sha256), staged / entry.path)
                os.link(self.blobs.path(pointer.manifest_sha256), staged / MANIFEST_FILE)
                for folder in {staged, *((staged / e.path).parent for e in manifest.files)}:
                    sync_folder(folder)
                staged.rename(target)
            except OSError as error:
                shutil.rmtree(staged)
                # Another process may have been first, with the same files.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync_folder(target.parent)

    def linked(self, *, without: Set[str]) -> set[str]:
        """Return the sha256s of the manifests and files of all versions that are unpacked here.

        Args:
            without: sha256s of the manifests of versions that do not count.
        """
        found: set[str] = set()
        with storage_errors(f"look into {self.root}"):
            folders = [f for f in (self.root / "unpacked").iterdir() if f.name not in without]
            inodes = {p.stat().st_ino for f in folders for p in f.rglob("*") if p.is_file()}
            for blob in (self.root / "blobs").glob("sha256/??/*"):
                if blob.stat().st_ino in inodes:
                    found.add(blob.name)
        return found | {folder.name for folder in folders}

    def drop(self, pointer: Pointer) -> None:
        """Take an unpacked folder out of sight."""
        target = self._folder(pointer)
        with storage_errors(f"replace {target}"), contextlib.suppress(FileNotFoundError):
            target.rename(unused_name(self.root / "tmp", "damaged"))

    def _check(
        self,
        folder: Path,
        pointer: Pointer,
        progress: Progress | None = None,
        reader: Reader | None = None,
    ) -> None:
        manifest = self.manifest(pointer)
        check_file(folder / MANIFEST_FILE, pointer.manifest_sha256, pointer.manifest_size)
        for entry in manifest.files:
            reads = reader if entry.path == TENSORS_FILE else None
            check_file(folder / entry.path, entry.sha256, entry.size, progress, reads)

    def _folder(self, pointer: Pointer) -> Path:
        return self.root / "unpacked" / pointer.manifest_sha256
