"""A registry in a folder, shared by any number of processes.

::

    <root>/
      registry.json                    {"format_version": 1, "kind": "lorary-registry"}
      blobs/sha256/5e/5e1f…            files by the sha256 of their bytes (blobs)
      adapters/<name>/                 '/' of a team's name is written '%2F'
        versions/1.json 2.json …       one small file per version, created once (versions)
        aliases.jsonl                  append-only log of alias moves (aliases)
        marks.jsonl                    append-only log of deprecations, deletions, protections (marks)
        audit.jsonl                    append-only, chained log of all changes (audit)
        signatures/3.json              a version's signature, if it was signed (signing)
        summaries.jsonl                what lists show, derived (summaries)
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from lorary.errors import ConfigError, Conflict, CorruptArtifact, StorageError
from lorary.registry.aliases import Admit, AliasLog, AliasMove, Unset
from lorary.registry.audit import AUDIT_FILE, AuditEvent, AuditLog, signed, unrecorded
from lorary.registry.blobs import Progress, Reader
from lorary.registry.durable import (
    link_new,
    locked,
    make_folder,
    replace,
    storage_errors,
    sync_folder,
    unused_name,
    write_new,
)
from lorary.registry.folder import MANIFEST_FILE
from lorary.registry.gc import GC_LOCK, Collector, used_by
from lorary.registry.manifest import Manifest
from lorary.registry.marks import Mark, MarkLog, Marks
from lorary.registry.refs import check_name
from lorary.registry.results import Freed
from lorary.registry.splits import Split
from lorary.registry.strict_json import parse_json
from lorary.registry.summaries import Summaries, Summary, read_summaries
from lorary.registry.unpacked import FOLDERS, VersionFolders
from lorary.registry.versions import Pointer, Versions, newest_file

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
        self._mark_logs: dict[str, MarkLog] = {}
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

    def summaries(self, name: str) -> Iterator[tuple[Pointer, Summary]]:
        """Yield what lists show of every version; two ``stat`` calls for each."""
        known = self._summaries(name).read()
        for version in range(1, self.newest(name) + 1):
            if version in known:
                yield known[version]
            else:
                pointers = self._of(name).readable(after=version - 1, until=version)
                yield from read_summaries(self, name, pointers)

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
        admit: Admit | None = None,
    ) -> AliasMove:
        """Append a move to the log, under the adapter's lock."""
        self._audit(name).last()  # a damaged log refuses changes, rather than miss them
        done = self._log(name).append(move, expect=expect, expect_serial=expect_serial, admit=admit)
        with locked(self.folder(name) / "lock"):
            self._record_done(name)
        return done

    def marks(self, name: str) -> Marks:
        """Return all marks; one ``stat`` when nothing has changed."""
        return self._marks_of(name).marks()

    def mark(self, name: str, mark: Mark, allow: Callable[[], None] | None = None) -> None:
        """Append a mark to the log, under the adapter's lock."""
        self._audit(name).last()
        self._marks_of(name).append(mark, allow)
        with locked(self.folder(name) / "lock"):
            self._record_done(name)

    def reserve(self, name: str, pointer: Pointer, mark: Mark) -> None:
        """Take the next number for a version that is deleted."""
        folder = self.folder(name)
        with storage_errors(f"create {folder}"):
            make_folder(folder / "versions")
        versions = self._of(name)
        with self.staging() as staged:
            with storage_errors(f"write version {pointer.version} to {self._root}"):
                write_new(staged / "pointer.json", pointer.to_json())
            # The number first: were it the mark, a crash would leave one for whoever pushes next.
            is_next = versions.newest() + 1 == pointer.version
            if not is_next or not versions.take(pointer, staged / "pointer.json"):
                raise Conflict(
                    f"version {versions.newest() + 1} of '{name}' is the next, not {pointer.version}"
                )
        self.mark(name, mark)

    def gc(self, *, grace_s: float, is_dry: bool) -> Freed:
        """Remove blobs, unpacked folders and left-overs that no version needs."""
        return Collector(self._root, self._needed, grace_s=grace_s).run(is_dry=is_dry)

    def signature(self, name: str, version: int) -> bytes | None:
        """Return a version's signature."""
        file = self.folder(name) / "signatures" / f"{version}.json"
        with storage_errors(f"read {file}"):
            return file.read_bytes() if file.exists() else None

    def put_signature(self, name: str, version: int, signature: bytes, actor: str) -> None:
        """Keep a version's signature."""
        folder = self.folder(name)
        file = folder / "signatures" / f"{version}.json"
        staged = unused_name(self._root / "tmp", "signature")
        with locked(folder / "lock"), storage_errors(f"write {file}"):
            make_folder(file.parent)
            write_new(staged, signature)
            replace(staged, file)
            self._record(name, signed(version, signature, actor, utc_now()))

    def audit(self, name: str) -> tuple[AuditEvent, ...]:
        """Return every change; what a killed process did not record yet is there as well."""
        log = self._audit(name)
        events = log.events()
        last = events[-1] if events else None
        return (*events, *self._unrecorded(name, last))

    def record(self, name: str, event: AuditEvent) -> None:
        """Add an event of its own kind to the audit log."""
        with locked(self.folder(name) / "lock"):
            self._record(name, event)

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, checked against its digest."""
        return self._folders.manifest(pointer)

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder on the store's file system, removed at the end."""
        return self._folders.staging()

    def commit(
        self,
        name: str,
        staged: Path,
        draft: Manifest,
        progress: Progress | None = None,
        *,
        created_at: str = "",
        actor: str = "",
    ) -> Pointer:
        """Make the files of ``staged`` a version, unless one has the same content already."""
        # Shared with other pushes, but not with the end of a gc: a blob that is here already may be
        # one that nothing has needed so far.
        with locked(self._root / GC_LOCK, shared=True):
            for entry in draft.files:
                self._folders.blobs.put(staged / entry.path, entry.sha256, progress)
            folder = self.folder(name)
            with storage_errors(f"create {folder}"):
                make_folder(folder / "versions")
            versions = self._of(name)
            with locked(folder / "lock"):
                deleted = self.marks(name).deleted
                for pointer in reversed(list(versions.readable())):
                    is_it = pointer.digest == draft.digest and pointer.version not in deleted
                    if is_it and self._restore(pointer):
                        with storage_errors(f"sync {folder}"):
                            sync_folder(folder / "versions")  # its pusher may have died too early
                        return pointer
                self._check_complete(name, versions.newest())
                pointer = self._take_next(versions, staged, draft, created_at or utc_now())
                self._record_done(name, pusher=actor, pushed=pointer.version)
                self._summarize(name, pointer)
                return pointer

    def fetch(
        self,
        name: str,
        pointer: Pointer,
        progress: Progress | None = None,
        reader: Reader | None = None,
    ) -> Path:
        """Return a folder with the version's files, each checked against its digest just now."""
        return self._folders.fetch(pointer, progress, reader)

    def locate(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with the version's files, not checked."""
        return self._folders.locate(pointer)

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Check every blob of a version and its unpacked folder; return its manifest."""
        manifest = self._folders.check(pointer, progress)
        self._folders.fetch(pointer)
        return manifest

    def _take_next(
        self, versions: Versions, staged: Path, draft: Manifest, created_at: str
    ) -> Pointer:
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
                created_at=created_at,
            )
            self._folders.unpack(pointer)
            write_new(staged / "pointer.json", pointer.to_json())
            if not versions.take(pointer, staged / "pointer.json"):
                raise Conflict(f"version {version} of '{draft.name}' was just created; push again")
        return pointer

    def _check_complete(self, name: str, newest: int) -> None:
        """Refuse to give a number again whose version file somebody took away.

        Raises:
            CorruptArtifact: one is missing, or the audit log is damaged.
        """
        last = self._audit(name).last()
        with storage_errors(f"list versions of '{name}'"):
            known = newest_file(self.folder(name) / "versions")
        known = max(known, last.versions if last else 0)
        if known > newest:
            raise CorruptArtifact(
                f"'{name}' had version {known}, and the file of version {newest + 1} is gone; no number "
                "is ever given twice. Run registry fsck --repair."
            )

    def _record(self, name: str, *events: AuditEvent, pusher: str = "", pushed: int = 0) -> None:
        """Write what the audit log lacks, and ``events``; the caller holds the lock."""
        log = self._audit(name)
        last = log.last()
        missing = self._unrecorded(name, last, pusher=pusher, pushed=pushed)
        newest = missing[-1] if missing else last
        for event in events:
            if newest is not None:
                event = dataclasses.replace(
                    event, versions=newest.versions, moves=newest.moves, marks=newest.marks
                )
            missing.append(event)
        log.append(missing)

    def _record_done(self, name: str, *, pusher: str = "", pushed: int = 0) -> None:
        """Record a change that is done already: a full disk must not make it look undone."""
        try:
            self._record(name, pusher=pusher, pushed=pushed)
        except StorageError as error:
            logger.warning("'%s' was changed; the next change will record it: %s", name, error)

    def _unrecorded(
        self, name: str, last: AuditEvent | None, *, pusher: str = "", pushed: int = 0
    ) -> list[AuditEvent]:
        moves: tuple[AliasMove, ...] = ()
        marks: tuple[Mark, ...] = ()
        try:
            moves = self.alias_moves(name)
            marks = self.marks(name).entries
        except CorruptArtifact as error:
            logger.warning(
                "changes of '%s' are not recorded until its logs are repaired: %s", name, error
            )
        pointers = self._of(name).readable(after=last.versions if last else 0)
        return unrecorded(last, pointers, moves, marks, pusher=pusher, pushed=pushed)

    def _summarize(self, name: str, pointer: Pointer) -> None:
        summaries = self._summaries(name)
        try:
            pointers = [pointer]
            if not summaries.exists():
                # A deleted version may have no manifest here: a mirror takes its number only.
                deleted = self.marks(name).deleted
                pointers = [p for p in self.pointers(name) if p.version not in deleted]
            summaries.append([(p, self._folders.manifest(p)) for p in pointers])
        except (OSError, CorruptArtifact) as error:
            logger.warning(
                "lists will be slower: no summary of %s@%d: %s", name, pointer.version, error
            )

    def _summaries(self, name: str) -> Summaries:
        return Summaries(self.folder(name), self._root / "blobs" / "sha256")

    def _audit(self, name: str) -> AuditLog:
        return AuditLog(self.folder(name) / AUDIT_FILE)

    def _restore(self, pointer: Pointer) -> bool:
        """Unpack a version whose file blobs are whole; tell whether its manifest is, too."""
        try:
            self._folders.unpack(pointer)
        except CorruptArtifact as error:
            logger.warning("version %d cannot be restored: %s", pointer.version, error)
            return False
        return True

    def _needed(self, seen: dict[str, int], since: str) -> set[str]:
        """Return the hashes that versions need; see ``gc.Needed``."""
        needed: set[str] = set()
        for name in self.names():
            deleted = self.marks(name).deleted
            newest = self.newest(name)
            for version in range(seen.get(name, 0) + 1, newest + 1):
                mark = deleted.get(version)
                if mark is not None and mark.at < since:
                    continue
                pointer = self.pointer(name, version)
                assert pointer is not None
                needed |= used_by(self._folders, pointer, is_deleted=mark is not None)
            seen[name] = newest
        return needed

    @property
    def root(self) -> Path:
        """The registry's folder."""
        return self._root

    @property
    def folders(self) -> VersionFolders:
        """Its blobs and unpacked versions."""
        return self._folders

    def forget(self, name: str) -> None:
        """Read an adapter's files anew: a repair changed what never changes otherwise."""
        with self._mutex:
            self._versions.pop(name, None)
            self._aliases.pop(name, None)
            self._mark_logs.pop(name, None)

    def folder(self, name: str) -> Path:
        """Return where an adapter's versions and logs are, or would be."""
        return self._root / _ADAPTERS / check_name(name).replace("/", "%2F")

    def _of(self, name: str) -> Versions:
        return self._versions.get(name) or self._remember(name)

    def _log(self, name: str) -> AliasLog:
        log = self._aliases.get(name)
        if log is None:
            folder = self.folder(name)
            log = AliasLog(folder / "aliases.jsonl", folder / "lock")
            if self._of(name).newest():  # else not kept, as in _remember
                log = self._aliases.setdefault(name, log)
        return log

    def _marks_of(self, name: str) -> MarkLog:
        log = self._mark_logs.get(name)
        if log is None:
            folder = self.folder(name)
            log = MarkLog(folder / "marks.jsonl", folder / "lock")
            if self._of(name).newest():  # else not kept, as in _remember
                log = self._mark_logs.setdefault(name, log)
        return log

    def _remember(self, name: str) -> Versions:
        versions = Versions(self.folder(name) / "versions")
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
