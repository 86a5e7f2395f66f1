"""Keep what was fetched from a Hub within a budget of bytes: versions go by their last use.

Safe with any number of processes on one folder. Who fetches or reads a version holds ``<root>/lock`` shared;
who evicts holds it alone, and never waits long for it. A version's last use is the time of its unpacked
folder. One used less than ``GRACE_S`` ago stays, for its files may just be being read; so the budget may be
exceeded for as long. Manifests, a kilobyte each, always stay: they serve while the Hub is away.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from typing import TYPE_CHECKING, Final

from lorary.errors import Conflict, CorruptArtifact, StorageError
from lorary.registry.durable import locked, storage_errors, unused_name
from lorary.registry.folder import MANIFEST_FILE
from lorary.registry.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorary.registry.unpacked import VersionFolders

logger = logging.getLogger(__name__)

GRACE_S: Final = 60.0
_PATIENCE_S: Final = 0.1
_MANIFEST_BYTES: Final = 1 << 16
"""A blob that no version links to and that is larger is what an interrupted fetch has left."""


class CacheBudget:
    """The budget of one folder. Thread-safe.

    Args:
        folders: what it is about.
        max_bytes: of blobs; 0 sets no limit, but room is still made on a full disk.
    """

    def __init__(self, folders: VersionFolders, max_bytes: int) -> None:
        self._folders = folders
        self._max_bytes = max_bytes

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep everybody from evicting while the block fetches or reads."""
        with locked(self._folders.root / "lock", shared=True):
            yield

    def used(self, folder: Path) -> None:
        """Note that an unpacked version is used now."""
        # On a file system that is read-only nothing is evicted either.
        with contextlib.suppress(OSError):
            os.utime(folder)

    def admit(self, num_bytes: int) -> None:
        """Evict what is needed so that ``num_bytes`` more fit; what cannot go stays, with a warning."""
        if not self._max_bytes:
            return
        missing = self.num_bytes() + num_bytes - self._max_bytes
        if missing > 0 and self.free(missing) < missing:
            logger.warning(
                "%s holds more than its %d bytes: the rest was used within %g s",
                self._folders.root,
                self._max_bytes,
                GRACE_S,
            )

    def free(self, num_bytes: int) -> int:
        """Evict versions, the longest unused first, until that much is free; return how much is."""
        freed = 0
        try:
            with locked(self._folders.root / "lock", timeout_s=_PATIENCE_S):
                freed += self._drop_orphans()
                for folder in self._longest_unused_first():
                    if freed >= num_bytes:
                        break
                    freed += self._evict(folder)
        except Conflict:
            logger.info("nothing was evicted from %s: others are reading", self._folders.root)
        return freed

    def num_bytes(self) -> int:
        """Return the bytes of all blobs."""
        with storage_errors(f"measure {self._folders.root}"):
            return sum(status.st_size for _, status in self._blobs())

    def _blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        with contextlib.suppress(FileNotFoundError):
            for fan in os.scandir(self._folders.root / "blobs" / "sha256"):
                for blob in os.scandir(fan.path):
                    # Others may evict while this counts.
                    with contextlib.suppress(FileNotFoundError):
                        yield blob.path, blob.stat(follow_symlinks=False)

    def _drop_orphans(self) -> int:
        freed = 0
        with storage_errors(f"clean {self._folders.root}"):
            for path, status in list(self._blobs()):
                if status.st_nlink == 1 and status.st_size > _MANIFEST_BYTES:
                    os.unlink(path)
                    freed += status.st_size
        return freed

    def _longest_unused_first(self) -> list[Path]:
        with storage_errors(f"list {self._folders.root}"):
            found = []
            for folder in (self._folders.root / "unpacked").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found.append((folder.stat().st_mtime, folder))
        newest = time.time() - GRACE_S
        return [folder for used, folder in sorted(found) if used < newest]

    def _evict(self, folder: Path) -> int:
        """Take a version out of sight, then its blobs that no other version has; return their bytes."""
        freed = 0
        with storage_errors(f"evict {folder}"):
            gone = unused_name(self._folders.root / "tmp", "evicted")
            folder.rename(gone)
            with contextlib.suppress(CorruptArtifact, FileNotFoundError):
                # Where the manifest cannot be read the blobs are orphans, and go the next time.
                for entry in Manifest.from_json((gone / MANIFEST_FILE).read_bytes()).files:
                    status = (gone / entry.path).stat()
                    if status.st_nlink <= 2:
                        self._folders.blobs.path(entry.sha256).unlink(missing_ok=True)
                        freed += status.st_size
            shutil.rmtree(gone)
        logger.info("evicted %s from the disk cache: %d bytes", folder.name[:12], freed)
        return freed


def is_full(error: StorageError) -> bool:
    """Whether an error came from a full disk or a used-up quota."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False
