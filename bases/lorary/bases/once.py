"""How a folder appears all at once, such as ``assets/`` and ``bases/`` of ``$LORARY_HOME`` have them.

A folder is written beside its place under a
``.tmp-`` name and renamed when complete, so whoever sees it sees all of it; a lock file keeps two
processes from doing the same work twice.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make ``folder`` by calling ``build`` on an empty folder beside it, unless it is there.

    Safe among processes and threads: one builds while the others wait, and a build that raises or
    is killed leaves nothing under the final name.

    Returns:
        Whether this call built it.

    Raises:
        StorageError: the parent cannot be written.
    """
    if folder.is_dir():
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return False
            _remove_leftovers(folder)
            draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
            try:
                draft.chmod(0o755)
                build(draft)
                _flush(draft)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write '{folder}': {error.strerror or error}. "
            "Free space, fix its permissions, or set LORARY_HOME to another folder."
        ) from error
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it when the process dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Delete drafts of builds that were killed; called under the lock, so none is in use."""
    for draft in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force every file to disk, so that the rename cannot become visible before the bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
