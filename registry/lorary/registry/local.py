"""A registry in a folder, shared by any number of processes.

::

    <root>/
      registry.json                    {"format_version": 1, "kind": "lorary-registry"}
      blobs/sha256/5e/5e1f…            files by the sha256 of their bytes (blobs)
      adapters/<name>/                 '/' of a team's name is written '%2F'
        versions/1.json 2.json …       one small file per version, created once (versions)
        aliases.jsonl                  append-only log of alias moves (aliases)
        lock                           held while a version is created or an alias moves
      unpacked/<manifest's sha256>/    a version as a PEFT folder, hard-linked to its blobs
      tmp/                             work in progress; left-overs of killed processes are harmless

A push writes blobs, then the manifest (a blob, too), then the unpacked folder, and last the version's
file. Readers only follow version files, so a push that dies anywhere has changed nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from lorary.errors import ConfigError, Conflict, CorruptArtifact, StorageError
from lorary.registry.aliases import AliasLog, AliasMove, Unset
from lorary.registry.blobs import Progress
from lorary.registry.durable import (
    link_new,
    locked,
    make_folder,
    storage_errors,
    unused_name,
    write_new,
)
from lorary.registry.folder import MANIFEST_FILE
from lorary.registry.manifest import Manifest
from lorary.registry.refs import check_name
from lorary.registry.splits import Split
from lorary.registry.strict_json import parse_json
from lorary.registry.unpacked import FOLDERS, VersionFolders
from lorary.registry.versions import Pointer, Versions

logger = logging.getLogger(__name__)

_ADAPTERS: Final = "adapters"
_MARKER: Final = "registry.json"
_MARKER_CONTENT: Final = b'{"format_version": 1, "kind": "lorary-registry"}\n'


class LocalStore:
    """Versions, aliases and files in a folder. Thread-safe, and safe between processes.

    Args:
        root: the registry's folder.
        create: make it if it is missing or empty.

    Raises:
        ConfigError: the folder is something else than a registry.
        StorageError: it is missing, or cannot be read, or cannot be created.
    """

    def __init__(self, root: Path, *, create: bool = False) -> None:
        self._root = root.absolute()
        self._folders = VersionFolders(self._root)
        self._versions: dict[str, Versions] = {}
        self._aliases: dict[str, AliasLog] = {}
        self._mutex = threading.Lock()
        if create:
            self._create()
        self._check()

    @property
    def url(self) -> str:
        """The registry's address."""
        return self._root.as_uri()

    def names(self) -> list[str]:
        """Return the names of all adapters that have a version."""
        with storage_errors(f"list {self._root}"):
            folders = [entry.name for entry in os.scandir(self._root / _ADAPTERS)]
        names = sorted(folder.replace("%2F", "/") for folder in folders)
        return [name for name in names if self.newest(name)]

    def newest(self, name: str) -> int:
        """Return the newest version's number; one ``stat`` once the adapter is known."""
        return self._of(name).newest()

    def pointer(self, name: str, version: int) -> Pointer | None:
        """Return a version's pointer."""
        return self._of(name).pointer(version)

    def pointers(self, name: str) -> Iterator[Pointer]:
        """Yield the pointers that can be read."""
        return self._of(name).readable()

    def alias_state(self, name: str) -> Mapping[str, int]:
        """Return where every alias points; one ``stat`` when nothing has changed."""
        return self._log(name).state()

    def alias_splits(self, name: str) -> Mapping[str, Split]:
        """Return the canaries that run; one ``stat`` when nothing has changed."""
        return self._log(name).splits()

    def trouble(self) -> str:
        """Say when the folder is gone, as a network file system goes."""
        try:
            (self._root / _MARKER).stat()
        except OSError as error:
            return f"{self._root} cannot be read: {error.strerror}"
        return ""

    def alias_moves(self, name: str) -> tuple[AliasMove, ...]:
        """Return all moves."""
        return self._log(name).moves()

    def move_alias(
        self,
        name: str,
        move: AliasMove,
        *,
        expect: int | Unset | None,
        expect_serial: int | None = None,
    ) -> AliasMove:
        """Append a move to the log, under the adapter's lock."""
        return self._log(name).append(move, expect=expect, expect_serial=expect_serial)

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, checked against its digest."""
        return self._folders.manifest(pointer)

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder on the store's file system, removed at the end."""
        return self._folders.staging()

    def commit(
        self, name: str, staged: Path, draft: Manifest, progress: Progress | None = None
    ) -> Pointer:
        """Make the files of ``staged`` a version, unless one has the same content already."""
        for entry in draft.files:
            self._folders.blobs.put(staged / entry.path, entry.sha256, progress)
        folder = self._folder(name)
        with storage_errors(f"create {folder}"):
            make_folder(folder / "versions")
        versions = self._of(name)
        with locked(folder / "lock"):
            for pointer in reversed(list(versions.readable())):
                if pointer.digest == draft.digest and self._restore(pointer):
                    return pointer
            return self._take_next(versions, staged, draft)

    def fetch(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with the version's files, each checked against its digest just now."""
        return self._folders.fetch(pointer, progress)

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Check every blob of a version and its unpacked folder; return its manifest."""
        manifest = self._folders.check(pointer, progress)
        self._folders.fetch(pointer)
        return manifest

    def _take_next(self, versions: Versions, staged: Path, draft: Manifest) -> Pointer:
        version = versions.newest() + 1
        raw = dataclasses.replace(draft, version=version).to_json().encode()
        with storage_errors(f"write version {version} to {self._root}"):
            write_new(staged / MANIFEST_FILE, raw)
            sha256 = hashlib.sha256(raw).hexdigest()
            self._folders.blobs.put(staged / MANIFEST_FILE, sha256)
            pointer = Pointer(
                version=version,
                digest=draft.digest,
                manifest_sha256=sha256,
                manifest_size=len(raw),
                created_at=utc_now(),
            )
            self._folders.unpack(pointer)
            write_new(staged / "pointer.json", pointer.to_json())
            if not versions.take(pointer, staged / "pointer.json"):
                raise Conflict(f"version {version} of '{draft.name}' was just created; push again")
        return pointer

    def _restore(self, pointer: Pointer) -> bool:
        """Unpack a version whose file blobs are whole; tell whether its manifest is, too."""
        try:
            self._folders.unpack(pointer)
        except CorruptArtifact as error:
            logger.warning("version %d cannot be restored: %s", pointer.version, error)
            return False
        return True

    def _folder(self, name: str) -> Path:
        return self._root / _ADAPTERS / check_name(name).replace("/", "%2F")

    def _of(self, name: str) -> Versions:
        return self._versions.get(name) or self._remember(name)

    def _log(self, name: str) -> AliasLog:
        log = self._aliases.get(name)
        if log is None:
            folder = self._folder(name)
            log = AliasLog(folder / "aliases.jsonl", folder / "lock")
            log = self._aliases.setdefault(name, log)
        return log

    def _remember(self, name: str) -> Versions:
        versions = Versions(self._folder(name) / "versions")
        if not versions.newest():
            return versions  # not kept: anybody may ask for names that do not exist
        with self._mutex:
            return self._versions.setdefault(name, versions)

    def _create(self) -> None:
        with storage_errors(f"create registry {self._root}"):
            make_folder(self._root)
            found = {entry.name for entry in self._root.iterdir()}
            if _MARKER not in found and not found <= {*FOLDERS, _ADAPTERS}:
                return  # not ours to fill; the check says so
            self._folders.create()
            make_folder(self._root / _ADAPTERS)
            if not (self._root / _MARKER).exists():
                staged = unused_name(self._root / "tmp", "marker")
                write_new(staged, _MARKER_CONTENT)
                link_new(staged, self._root / _MARKER)
                staged.unlink()

    def _check(self) -> None:
        if not self._root.is_dir():
            raise StorageError(
                f"no registry at {self._root}: no such folder. `registry push` makes one; "
                "or set --registry or LORARY_REGISTRY."
            )
        marker = self._root / _MARKER
        if not marker.exists():
            raise ConfigError(
                f"{self._root} is not a registry: it has no {_MARKER}. Name a registry's folder, or an "
                "empty one."
            )
        with storage_errors(f"read {marker}"):
            found = parse_json(marker.read_bytes(), str(marker))
        if found != parse_json(_MARKER_CONTENT, _MARKER):
            raise ConfigError(
                f"{marker} says {found}; this Lorary reads format_version 1. Upgrade it."
            )


def utc_now() -> str:
    """Return the time as ``2026-11-22T10:00:00Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
