"""Files that are whole or absent, whatever happens to the process that writes them.

A file is written under a name nobody reads, synced, and only then given its real name in one step; the
folder is synced after. ``link`` gives a name only if it is free, which makes it a compare-and-swap
between processes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from lorary.errors import Conflict, LoraryError, StorageError

LOCK_TIMEOUT_S: Final = 60.0
_LOCK_POLL_S: Final = 0.01
_TAIL_BYTES: Final = 64 << 10
_HINTS: Final = {
    errno.ENOSPC: "free some space and try again; nothing was changed",
    errno.EDQUOT: "free some quota and try again; nothing was changed",
    errno.EROFS: "it is mounted read-only",
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "its file system may lack hard links, which a registry needs",
    errno.ENOTSUP: "its file system lacks hard links or locks, which a registry needs",
    errno.ENOLCK: "its file system lacks locks, which a registry needs",
}


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a ``StorageError`` that says what was being done."""
    try:
        yield
    except LoraryError:
        raise
    except OSError as error:
        hint = f"; {_HINTS[error.errno]}" if error.errno in _HINTS else ""
        raise StorageError(f"cannot {doing}: {error.strerror or error}{hint}") from error


def write_new(path: Path, content: bytes, *, mode: int = 0o444) -> None:
    """Write and sync a file that must not exist yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_new(staged: Path, target: Path) -> bool:
    """Give ``staged`` the name ``target`` as well, if it is free; tell whether it was.

    Either way the name survives a power cut: who had it first may have died before it could sync.
    """
    try:
        os.link(staged, target, follow_symlinks=False)
    except FileExistsError:
        is_new = False
    else:
        is_new = True
    sync_folder(target.parent)
    return is_new


def replace(staged: Path, target: Path) -> None:
    """Move ``staged`` to ``target``, whatever is there, in one step."""
    staged.replace(target)
    sync_folder(target.parent)


def append_line(file: Path, line: bytes) -> None:
    """Append a line to a log and sync it; a line that a crash cut short is cut off first.

    The caller holds the log's lock.
    """
    append_lines(file, (line,))


def append_lines(file: Path, lines: Sequence[bytes]) -> None:
    """Append whole lines and sync them; what a crash left of a last line is cut off first.

    The caller holds the log's lock. Only the end of the file is read.

    Raises:
        OSError: it cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(file, flags, 0o666), "r+b", buffering=0) as opened:
        end = _end_of_lines(opened)
        opened.truncate(end)
        opened.seek(end)
        rest = memoryview(b"".join(lines))
        while rest:
            rest = rest[opened.write(rest) :]
        os.fsync(opened.fileno())
    sync_folder(file.parent)


def sync_file(file: Path) -> None:
    """Make a file's content and name survive a power cut."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    sync_folder(file.parent)


def _end_of_lines(opened: IO[bytes]) -> int:
    """Return where the last newline ends; only a torn line is read through."""
    end = opened.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _TAIL_BYTES)
        opened.seek(start)
        found = opened.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and make their names survive a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing or (path,):  # the last may be there only since a moment ago, unsynced
        sync_folder(folder.parent)


def unused_name(folder: Path, kind: str) -> Path:
    """Return a path in ``folder`` that no other process will choose."""
    return folder / f"{kind}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def locked(
    path: Path, *, shared: bool = False, timeout_s: float = LOCK_TIMEOUT_S
) -> Iterator[None]:
    """Hold a lock between processes, exclusive or shared; the system drops it when a process dies.

    Raises:
        Conflict: another process holds it for longer than ``timeout_s``.
        StorageError: the file system has no locks, or the file cannot be opened.
    """
    with storage_errors(f"lock {path}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with storage_errors(f"lock {path}"):
            _wait_for_lock(descriptor, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path, kind: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Conflict(
                    f"another process has held {path} for {timeout_s:g} s; find it, or retry"
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            return
