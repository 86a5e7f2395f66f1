"""The numbered versions of one adapter: small files that are created once and never changed.

``<adapter>/versions/3.json``::

    {"format_version": 1, "version": 3, "digest": "sha256:5e1f…", "manifest_sha256": "c0ff…",
     "manifest_size": 4711, "created_at": "2026-11-22T10:00:00Z"}

Numbers are consecutive from 1, so the newest version is found by looking whether the next one exists,
and a number is taken by creating its file exclusively.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorary.errors import CorruptArtifact, StorageError
from lorary.registry.durable import link_new, storage_errors
from lorary.registry.strict_json import parse_json

logger = logging.getLogger(__name__)

_FORMAT_VERSION: Final = 1
_HEX: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """What version number stands for: its identity and its manifest.

    Attributes:
        version: the number, from 1.
        digest: ``sha256:<hex>`` of the canonical content.
        manifest_sha256: hex sha256 of the bytes of ``manifest.json``.
        manifest_size: its size in bytes.
        created_at: when it was pushed, UTC.
    """

    version: int
    digest: str
    manifest_sha256: str
    manifest_size: int
    created_at: str

    def to_json(self) -> bytes:
        """Return the content of the version's file."""
        fields = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}
        return (json.dumps(fields) + "\n").encode()


class Versions:
    """The versions in one folder. Reads are remembered: a version never changes. Thread-safe."""

    __slots__ = ("_folder", "_newest", "_pointers")

    def __init__(self, folder: Path) -> None:
        # A text: a path object is larger than all the rest, and slower to look up.
        self._folder = str(folder)
        self._pointers: dict[int, Pointer] = {}
        self._newest = 0

    def newest(self) -> int:
        """Return the newest version's number, 0 if there is none. One ``stat`` when nothing is new."""
        newest = self._newest
        if newest and not self._has(newest):
            newest = 0  # somebody deleted files; count again
        if newest:
            while self._has(newest + 1):
                newest += 1
        else:
            newest = self._count()
        self._newest = newest
        return newest

    def pointer(self, version: int) -> Pointer | None:
        """Return a version's pointer, ``None`` if there is no such version.

        Raises:
            CorruptArtifact: the file is damaged.
            StorageError: the file cannot be read.
        """
        known = self._pointers.get(version)
        if known is None and 1 <= version <= self.newest():
            known = self._pointers[version] = self._read(version)
        return known

    def readable(self, *, after: int = 0, until: int | None = None) -> Iterator[Pointer]:
        """Yield the pointers that can be read, oldest first; a damaged one is logged and left out."""
        for version in range(after + 1, (self.newest() if until is None else until) + 1):
            try:
                pointer = self.pointer(version)
            except CorruptArtifact as error:
                logger.warning("leaving out version %d: %s", version, error)
            else:
                if pointer is not None:
                    yield pointer

    def take(self, pointer: Pointer, staged: Path) -> bool:
        """Make ``staged``, which holds ``pointer.to_json()``, the version's file if it has none yet."""
        with storage_errors(f"create version {pointer.version} in {self._folder}"):
            return link_new(staged, Path(self._file(pointer.version)))

    def _count(self) -> int:
        """Return the newest number below which none is missing; one look at the folder."""
        with storage_errors(f"look into {self._folder}"):
            try:
                names = set(os.listdir(self._folder))
            except FileNotFoundError:
                return 0
        newest = 0
        while f"{newest + 1}.json" in names:
            newest += 1
        return newest

    def _has(self, version: int) -> bool:
        # Without storage_errors, which takes as long as the look: servers do this in every call.
        try:
            os.stat(self._file(version))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise StorageError(
                f"cannot look into {self._folder}: {error.strerror or error}"
            ) from error
        return True

    def _file(self, version: int) -> str:
        return f"{self._folder}/{version}.json"

    def _read(self, version: int) -> Pointer:
        file = self._file(version)
        with storage_errors(f"read {file}"):
            raw = parse_json(Path(file).read_bytes(), file)
        return parse_pointer(raw, version, file)


def newest_file(folder: Path) -> int:
    """Return the highest number that has a file, whether or not those before it have one."""
    numbers = (entry.name.removesuffix(".json") for entry in os.scandir(folder))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def parse_pointer(raw: dict[str, Any], version: int, where: str) -> Pointer:
    """Check what was read of a version.

    Raises:
        CorruptArtifact: it is not that of ``version``.
    """
    if raw.pop("format_version", None) != _FORMAT_VERSION:
        raise CorruptArtifact(f"{where} has another format_version than {_FORMAT_VERSION}")
    try:
        pointer = Pointer(**raw)
        is_right = (
            pointer.version == version
            and pointer.digest.startswith("sha256:")
            and _HEX.fullmatch(pointer.digest.removeprefix("sha256:")) is not None
            and _HEX.fullmatch(pointer.manifest_sha256) is not None
            and type(pointer.manifest_size) is int
            and isinstance(pointer.created_at, str)
        )
    except (TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise CorruptArtifact(f"{where} is damaged; it is no version file of version {version}")
    return pointer
