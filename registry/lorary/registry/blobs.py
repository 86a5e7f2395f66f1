"""Content-addressed files: a blob's name is the sha256 of its bytes, so it is never changed.

``<root>/sha256/5e/5e1f…`` — two hex digits of fan-out, mode 0444. A blob gets its name only when it is
complete and synced; one that nothing points at is harmless.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from lorary.errors import CorruptArtifact
from lorary.registry.durable import link_new, make_folder, replace, storage_errors

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the number of bytes just hashed or copied."""

Reader = Callable[[Path, int], str]
"""Reads a file of so many bytes and returns its hex sha256: for whoever needs the bytes, too."""

_CHUNK_BYTES: Final = 1 << 20


class Blobs:
    """The blobs under one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, sha256: str) -> Path:
        """Return where the blob is, or would be."""
        return self._root / "sha256" / sha256[:2] / sha256

    def put(self, staged: Path, sha256: str, progress: Progress | None = None) -> Path:
        """Keep ``staged``, a complete and synced file on the same file system, as a blob.

        A blob that is there already is checked, and replaced if its bytes have rotted.

        Raises:
            StorageError: the disk is full, read-only, or has no hard links.
        """
        target = self.path(sha256)
        with storage_errors(f"store {target}"):
            make_folder(target.parent)
            staged.chmod(0o444)
            if not link_new(staged, target) and hash_file(target, progress) != sha256:
                logger.warning("blob %s was damaged; replacing it", target)
                replace(staged, target)
        return target

    def check(self, sha256: str, size: int, progress: Progress | None = None) -> Path:
        """Return the blob's path if its bytes are what its name says.

        Raises:
            CorruptArtifact: it is missing, or its bytes differ.
            StorageError: it cannot be read.
        """
        path = self.path(sha256)
        check_file(path, sha256, size, progress)
        return path


def check_file(
    path: Path,
    sha256: str,
    size: int,
    progress: Progress | None = None,
    reader: Reader | None = None,
) -> None:
    """Compare a file with its promised size and digest; ``reader`` reads it in the place of ``hash_file``.

    Raises:
        CorruptArtifact: they differ.
        StorageError: it cannot be read.
    """
    with storage_errors(f"read {path}"):
        if not path.exists():
            raise CorruptArtifact(f"{path} is missing; push the adapter again to restore it")
        actual = path.stat().st_size
        if actual != size:
            raise CorruptArtifact(f"{path} has {actual} bytes; its manifest says {size}")
        found = hash_file(path, progress) if reader is None else reader(path, size)
    if found != sha256:
        raise CorruptArtifact(
            f"{path} has sha256 {found[:12]}…; its manifest says {sha256[:12]}…. "
            "Push the adapter again to restore it."
        )


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """Return the hex sha256 of a file's bytes."""
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return sha256.hexdigest()


def copy_file(source: Path, target: Path, progress: Progress | None = None) -> str:
    """Copy a plain file to a new path, sync it, and return the hex sha256 of what was written."""
    sha256 = hashlib.sha256()
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    # One thread writes a chunk while this one hashes it: both let go of Python's lock.
    with (
        open(descriptor, "rb", buffering=0) as reader,
        target.open("xb", buffering=0) as writer,
        ThreadPoolExecutor(1, "copy") as pool,
    ):
        written = pool.submit(lambda: None)
        while chunk := reader.read(_CHUNK_BYTES):
            written.result()
            written = pool.submit(_write_all, writer, chunk)
            sha256.update(chunk)
            if progress is not None:
                progress(len(chunk))
        written.result()
        os.fsync(writer.fileno())
    return sha256.hexdigest()


def _write_all(writer: io.FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[writer.write(rest) :]
