"""Free what no version needs: blobs, unpacked folders of deleted versions, work that was never finished.

Nothing that anybody may be at work with is touched:

- what was written less than a grace time ago stays, and so does what a version needs that was deleted
  less than a grace time ago: a server or a pull may be reading it;
- a push holds a shared lock while it relies on blobs, from finding one that is here already to the
  version's pointer; what goes is removed under the exclusive one, after looking for versions that came
  meanwhile;
- a version whose manifest cannot be read stops everything: what it needs is not known.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from lorary.errors import CorruptArtifact
from lorary.registry.durable import locked, storage_errors, unused_name
from lorary.registry.results import Freed
from lorary.registry.unpacked import VersionFolders
from lorary.registry.versions import Pointer

GC_LOCK: Final = "tmp/gc.lock"
"""Below a registry's folder: held shared by pushes, and exclusively while something is removed."""

DEFAULT_GRACE_S: Final = 24 * 3600.0

Needed = Callable[[dict[str, int], str], set[str]]
"""Given the newest version seen of every adapter (which it updates), and a time: the sha256s of manifests
and files of all later versions but those deleted before that time."""


class Collector:
    """One collection in one folder.

    Args:
        root: the folder of blobs, unpacked versions and ``tmp``.
        needed: what versions need.
        grace_s: what was written less than so many seconds ago stays.
    """

    def __init__(self, root: Path, needed: Needed, *, grace_s: float) -> None:
        self._root = root
        self._needed = needed
        self._before = time.time() - grace_s

    def run(self, *, is_dry: bool) -> Freed:
        """Remove what is not needed, or only say what would be removed.

        Raises:
            CorruptArtifact: it cannot be known what a version needs; nothing is removed.
            StorageError: something cannot be removed.
        """
        seen: dict[str, int] = {}
        since = datetime.fromtimestamp(self._before, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        needed = self._needed(seen, since)
        with storage_errors(f"look into {self._root}"):
            blobs = [path for path in self._blobs() if path.name not in needed]
            folders = [path for path in self._unpacked() if path.name not in needed]
            left_overs = list(self._left_overs())
        if not is_dry:
            with locked(self._root / GC_LOCK):
                needed = self._needed(seen, since)
                blobs = [path for path in blobs if path.name not in needed]
                folders = [path for path in folders if path.name not in needed]
                freed = self._measured(blobs, folders, left_overs)
                self._remove(blobs, folders, left_overs)
            return freed
        return self._measured(blobs, folders, left_overs)

    def _blobs(self) -> Iterator[Path]:
        for path in (self._root / "blobs").glob("sha256/??/*"):
            if self._is_old(path):
                yield path

    def _unpacked(self) -> Iterator[Path]:
        for path in (self._root / "unpacked").iterdir():
            if self._is_old(path):
                yield path

    def _left_overs(self) -> Iterator[Path]:
        for path in (self._root / "tmp").iterdir():
            # A lock that is removed while somebody waits for it would be held by two.
            if not path.name.endswith(".lock") and all(
                self._is_old(part) for part in (path, *path.rglob("*"))
            ):
                yield path

    def _is_old(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):  # whoever owned it has removed it
            return path.lstat().st_mtime < self._before
        return False

    def _measured(self, blobs: list[Path], folders: list[Path], left_overs: list[Path]) -> Freed:
        """Count, and add up the files whose last names go."""
        links: dict[tuple[int, int], tuple[int, int, int]] = {}
        with storage_errors(f"look into {self._root}"):
            for path in (*blobs, *folders, *left_overs):
                for part in (path, *path.rglob("*")):
                    with contextlib.suppress(FileNotFoundError):
                        stat = part.lstat()
                        if not part.is_dir():
                            key = (stat.st_dev, stat.st_ino)
                            going = links.get(key, (0, 0, 0))[0] + 1
                            links[key] = (going, stat.st_nlink, stat.st_size)
        return Freed(
            num_blobs=len(blobs),
            num_folders=len(folders),
            num_left_overs=len(left_overs),
            num_bytes=sum(size for going, names, size in links.values() if going == names),
        )

    def _remove(self, blobs: list[Path], folders: list[Path], left_overs: list[Path]) -> None:
        with storage_errors(f"remove what is not needed from {self._root}"):
            for folder in folders:
                # Out of sight in one step, so that nobody finds half of it.
                aside = unused_name(self._root / "tmp", "gc")
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(aside)
                    shutil.rmtree(aside)
            for blob in blobs:
                blob.unlink(missing_ok=True)
            for path in left_overs:
                with contextlib.suppress(FileNotFoundError):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()


def used_by(folders: VersionFolders, pointer: Pointer, *, is_deleted: bool) -> set[str]:
    """Return the sha256s of a version's manifest and files.

    Raises:
        CorruptArtifact: its manifest cannot be read, and the version is not deleted.
    """
    try:
        manifest = folders.manifest(pointer)
    except CorruptArtifact as error:
        if is_deleted:
            return {pointer.manifest_sha256}  # removed already, or never here
        raise CorruptArtifact(
            f"nothing was removed: what version {pointer.version} ({pointer.digest[:19]}…) needs is "
            f"not known, since its manifest cannot be read ({error})"
        ) from error
    return {pointer.manifest_sha256, *(entry.sha256 for entry in manifest.files)}
