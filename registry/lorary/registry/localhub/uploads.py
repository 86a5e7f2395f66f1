"""Large files on their way in: streamed to disk, hashed while they arrive, kept when they are what they claim.

``basic`` uploads are one PUT. Larger files come in parts, which lie beside each other until the last one is
there; what an interrupted upload leaves is overwritten by the next one, or swept at a later start.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

from starlette.concurrency import run_in_threadpool

from lorary.registry.durable import storage_errors, unused_name
from lorary.registry.localhub.problems import HubProblem
from lorary.registry.localhub.repos import Repo

PART_BYTES: Final = 64 << 20
MAX_FILE_BYTES: Final = 64 << 30
_CHUNK_BYTES: Final = 1 << 20


async def receive(repo: Repo, oid: str, size: int, body: AsyncIterator[bytes]) -> None:
    """Keep a whole file that must have this sha256 and size.

    Raises:
        HubProblem: 400: it has not.
    """
    staged = unused_name(repo.tmp, "upload")
    try:
        found, count = await _write(staged, body, size)
        _compare(oid, size, found, count)
        await run_in_threadpool(repo.blobs.put, staged, oid)
    finally:
        staged.unlink(missing_ok=True)


async def receive_part(repo: Repo, oid: str, number: int, body: AsyncIterator[bytes]) -> str:
    """Keep one part of a file; return its sha256, which the client must repeat at the end.

    Raises:
        HubProblem: 413: it is too large.
    """
    folder = _parts(repo, oid)
    folder.mkdir(exist_ok=True)
    staged = unused_name(repo.tmp, "part")
    try:
        found, _ = await _write(staged, body, PART_BYTES)
        staged.rename(folder / str(number))
    finally:
        staged.unlink(missing_ok=True)
    return found


def join_parts(repo: Repo, oid: str, size: int, etags: Iterable[tuple[int, str]]) -> None:
    """Make a file of its parts.

    Raises:
        HubProblem: 400: a part is missing or another, or the whole is not what it claims.
    """
    folder, staged = _parts(repo, oid), unused_name(repo.tmp, "upload")
    whole = hashlib.sha256()
    count = 0
    try:
        with storage_errors(f"join the parts of {oid}"), staged.open("xb") as writer:
            for number, etag in sorted(etags):
                part = hashlib.sha256()
                path = folder / str(number)
                if not path.is_file():
                    raise HubProblem(400, f"Part {number} was not uploaded")
                with path.open("rb") as reader:
                    while chunk := reader.read(_CHUNK_BYTES):
                        part.update(chunk)
                        whole.update(chunk)
                        writer.write(chunk)
                        count += len(chunk)
                if part.hexdigest() != etag.strip('"'):
                    raise HubProblem(400, f"Part {number} is not what was uploaded last")
            writer.flush()
            os.fsync(writer.fileno())
        _compare(oid, size, whole.hexdigest(), count)
        repo.blobs.put(staged, oid)
    finally:
        staged.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def is_kept(repo: Repo, oid: str, size: int) -> bool:
    """Tell whether a repository has a file of this sha256 and size."""
    path = repo.blobs.path(oid)
    return path.is_file() and path.stat().st_size == size


async def _write(path: Path, body: AsyncIterator[bytes], limit: int) -> tuple[str, int]:
    sha256 = hashlib.sha256()
    count = 0
    with storage_errors("store an upload"), path.open("xb") as file:
        async for chunk in body:
            count += len(chunk)
            if count > limit:
                raise HubProblem(413, f"The upload is longer than the {limit} bytes announced")
            sha256.update(chunk)
            file.write(chunk)
        file.flush()
        await run_in_threadpool(os.fsync, file.fileno())  # other callers do not wait for the disk
    return sha256.hexdigest(), count


def _compare(oid: str, size: int, found: str, count: int) -> None:
    if (found, count) != (oid, size):
        raise HubProblem(
            400, f"The upload has {count} bytes and sha256 {found}, not {size} bytes and {oid}"
        )


def _parts(repo: Repo, oid: str) -> Path:
    return repo.tmp / f"parts-{repo.id.replace('/', '%2F')}-{oid}"
