"""The look at a registry in a folder: what ``fsck`` finds there."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Collection, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from lorary.errors import CorruptArtifact, InvalidRef
from lorary.registry.aliases import parse_moves, replay
from lorary.registry.audit import AuditEvent, parse_audit
from lorary.registry.backend import Store
from lorary.registry.blobs import Progress, hash_file
from lorary.registry.durable import storage_errors
from lorary.registry.folder import MANIFEST_FILE
from lorary.registry.fsck import Scan
from lorary.registry.fsck_logs import Checked, check_marks, check_moves
from lorary.registry.fsck_repair import Repairs
from lorary.registry.gc import GC_LOCK
from lorary.registry.local import LocalStore
from lorary.registry.manifest import Manifest
from lorary.registry.marks import parse_marks
from lorary.registry.refs import check_name
from lorary.registry.strict_json import parse_json
from lorary.registry.verify import check_identity
from lorary.registry.versions import Pointer, parse_pointer

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_WRITABLE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class LocalCheck:
    """Looks at a registry in a folder, as often as asked.

    Args:
        store: the registry.
        sources: registries that damaged files may be restored from.
        grace_s: age from which work in progress is taken for a left-over, in seconds.
        actor: who repairs.
        progress: told of bytes read.
    """

    def __init__(
        self,
        store: LocalStore,
        sources: Sequence[Store],
        grace_s: float,
        actor: str,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._folders = store.folders
        self._grace_s = grace_s
        self._progress = progress
        self._repairs = Repairs(store, sources, actor)
        self._begin()

    def _begin(self) -> None:
        self._seen = Scan()
        self._blobs: dict[str, str] = {}
        self._pointers: dict[str, tuple[str, Pointer, Manifest | None]] = {}

    def scan(self) -> Scan:
        """Look at everything once."""
        self._begin()
        for folder in _entries(self._store.root / "adapters"):
            self._check_adapter(folder)
        self._check_unpacked()
        self._check_blobs()
        self._check_left_overs()
        return self._seen

    # -- adapters -----------------------------------------------------------------------------

    def _check_adapter(self, folder: Path) -> None:
        name = folder.name.replace("%2F", "/")
        try:
            check_name(name)
        except InvalidRef:
            self._seen.add(
                self._short(folder), "this is no adapter's folder; look, and take it away"
            )
            return
        if not (folder / "versions").is_dir():
            return  # its first push is not done
        # Others may push meanwhile: what refers to something is read before what it refers to.
        audit = self._check_audit(name, folder)
        aliases = folder / "aliases.jsonl"
        moves = _read(aliases) if aliases.exists() else b""
        deleted = self._check_marks(name, folder / "marks.jsonl", audit)
        recorded = {int(e.subject): e for e in audit if e.event == "push"}
        found = {int(f.stem): f for f in _entries(folder / "versions") if f.stem.isdecimal()}
        newest = max([0, *found, *recorded])
        for version in range(1, newest + 1):
            self._seen.versions += 1
            is_kept = version not in deleted
            self._check_version(
                name, version, found.get(version), recorded.get(version), is_kept=is_kept
            )
        self._check_aliases(name, aliases, moves, newest, audit, deleted)

    def _check_version(
        self,
        name: str,
        version: int,
        file: Path | None,
        recorded: AuditEvent | None,
        *,
        is_kept: bool,
    ) -> None:
        """Check a version's file, and, unless the version was deleted, what it refers to."""
        where = f"{name}@{version}"
        wanted = recorded.evidence if recorded else ""
        try:
            if file is None:
                raise CorruptArtifact("its version file is missing")
            pointer = parse_pointer(_json(file), version, f"its version file {file.name}")
            if wanted and pointer.manifest_sha256 != wanted:
                raise CorruptArtifact(
                    f"its version file names manifest {pointer.manifest_sha256[:12]}…, and the audit log "
                    f"says that {wanted[:12]}… was pushed"
                )
        except CorruptArtifact as error:
            rebuilt = self._repairs.pointer_for(name, version, recorded)
            if rebuilt is None:
                hint = "no manifest that is whole says what it was"
                self._seen.add(where, f"{error}; {hint}")
            else:
                act = partial(self._repairs.write_pointer, name, rebuilt)
                self._seen.add(where, str(error), repair="make it again from its manifest", act=act)
            return
        if is_kept:
            self._check_content(name, pointer)

    def _check_content(self, name: str, pointer: Pointer) -> None:
        where, sha256 = f"{name}@{pointer.version}", pointer.manifest_sha256
        manifest: Manifest | None = None
        if self._is_whole(where, MANIFEST_FILE, sha256, name, pointer):
            try:
                manifest = Manifest.from_json(self._folders.blobs.path(sha256).read_bytes())
                check_identity(name, pointer, manifest)
            except CorruptArtifact as error:
                self._seen.add(where, str(error))
        if manifest is not None:
            for entry in manifest.files:
                self._is_whole(where, entry.path, entry.sha256, name, pointer)
        self._pointers[sha256] = (name, pointer, manifest)

    def _is_whole(self, where: str, path: str, sha256: str, name: str, pointer: Pointer) -> bool:
        """Tell whether a file of a version is what was promised; note it if not."""
        problem = self._blob(sha256)
        if not problem:
            return True
        act = self._repairs.blob_from_copy(path, sha256, name, pointer)
        repair = "restore it from another copy" if act else ""
        hint = "" if act else "; no copy of it is known: fsck --from REGISTRY, or push it again"
        self._seen.add(
            where, f"{path} {problem} (blob {sha256[:12]}…){hint}", repair=repair, act=act
        )
        return False

    def _blob(self, sha256: str) -> str:
        """Return what is wrong with a blob; it is read once."""
        if sha256 not in self._blobs:
            path = self._folders.blobs.path(sha256)
            with storage_errors(f"read {path}"):
                if not path.is_file() or path.is_symlink():
                    self._blobs[sha256] = "is missing"
                else:
                    self._seen.blobs += 1
                    right = hash_file(path, self._progress) == sha256
                    self._blobs[sha256] = "" if right else "is damaged"
        return self._blobs[sha256]

    # -- logs ---------------------------------------------------------------------------------

    def _check_audit(self, name: str, folder: Path) -> tuple[AuditEvent, ...]:
        file = folder / "audit.jsonl"
        if not file.exists():
            return ()
        raw = _read(file)
        self._check_torn(raw, file)
        try:
            return parse_audit(raw, self._short(file))
        except CorruptArtifact as error:
            act = partial(self._repairs.new_audit, name)
            repair = "keep it beside, and begin a new one with all that versions and aliases tell"
            self._seen.add(name, str(error), repair=repair, act=act)
            return ()

    def _check_aliases(
        self,
        name: str,
        file: Path,
        raw: bytes,
        newest: int,
        audit: Sequence[AuditEvent],
        deleted: Container[int],
    ) -> None:
        lines = self._check_log(name, file, raw, check_moves(raw, audit))
        for alias, version in replay(parse_moves(b"".join(lines), file.name)).items():
            if version in deleted or not 1 <= version <= newest:
                why = "was deleted" if version in deleted else "does not exist"
                self._seen.add(name, f"alias '{alias}' points at version {version}, which {why}")

    def _check_marks(self, name: str, file: Path, audit: Sequence[AuditEvent]) -> Collection[int]:
        """Check the log of marks; return the deleted versions."""
        raw = _read(file) if file.exists() else b""
        lines = self._check_log(name, file, raw, check_marks(raw, audit))
        return parse_marks(b"".join(lines), file.name).deleted.keys()

    def _check_log(self, name: str, file: Path, raw: bytes, checked: Checked) -> tuple[bytes, ...]:
        """Note what is wrong with a log; return its lines as they were written, if that is known."""
        self._check_torn(raw, file)
        problems, mended = checked
        for problem in problems:
            if mended is None:
                hint = "; the audit log does not say what it was"
                self._seen.add(self._short(file), problem + hint)
            else:
                act = partial(self._repairs.write_log, name, file, mended)
                repair = "make it again from the audit log"
                self._seen.add(self._short(file), problem, repair=repair, act=act)
        return mended or ()

    def _check_torn(self, raw: bytes, file: Path) -> None:
        if raw and not raw.endswith(b"\n"):
            act = partial(self._repairs.cut, file)
            problem = "its last line was cut short by a crash, and never acknowledged"
            self._seen.add(
                self._short(file), problem, severity="litter", repair="cut it off", act=act
            )

    # -- files --------------------------------------------------------------------------------

    def _check_unpacked(self) -> None:
        for folder in _entries(self._store.root / "unpacked"):
            known = self._pointers.get(folder.name)
            if known is None and time.time() - folder.lstat().st_mtime < self._grace_s:
                continue  # a push unpacks before its version has a file
            if known is None:
                act = partial(self._repairs.discard_unpacked, folder)
                problem = "no version is unpacked here"
                self._seen.add(
                    self._short(folder), problem, severity="litter", repair="remove it", act=act
                )
            elif known[2] is not None:
                self._check_links(folder, known[0], known[1], known[2])

    def _check_links(self, folder: Path, name: str, pointer: Pointer, manifest: Manifest) -> None:
        promised = {e.path: e.sha256 for e in manifest.files}
        promised[MANIFEST_FILE] = pointer.manifest_sha256
        found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if not p.is_dir()}
        act = partial(self._repairs.unpack_again, name, pointer)
        for path in sorted(found.keys() - promised.keys()):
            problem = f"{path} does not belong to the version"
            self._seen.add(self._short(folder), problem, repair="unpack it again", act=act)
        for path, sha256 in promised.items():
            blob = self._folders.blobs.path(sha256)
            if path not in found:
                self._seen.add(
                    self._short(folder), f"{path} is missing", repair="unpack it again", act=act
                )
            elif not blob.exists() or not found[path].samefile(blob):
                right = hash_file(found[path]) == sha256
                problem = (
                    f"{path} is {'a copy, not a link to' if right else 'not what is in'} its blob"
                )
                self._seen.add(
                    self._short(folder),
                    problem,
                    severity="litter" if right else "damage",
                    repair="unpack it again",
                    act=act if blob.exists() else None,
                )

    def _check_blobs(self) -> None:
        used = set(self._pointers)
        for _, _, manifest in self._pointers.values():
            used.update(e.sha256 for e in manifest.files) if manifest else None
        for path in self._all_blobs():
            where = self._short(path)
            if not _HEX.fullmatch(path.name) or path != self._folders.blobs.path(path.name):
                self._seen.add(where, "this is no blob; look, and take it away")
                continue
            status = path.lstat()
            if path.name not in used:
                self._seen.spare_blobs += 1
                self._seen.spare_bytes += status.st_size
                if self._blob(path.name):
                    act = partial(self._repairs.discard_blob, path)
                    problem = "it is damaged, and no version refers to it"
                    self._seen.add(where, problem, severity="litter", repair="remove it", act=act)
            if status.st_mode & _WRITABLE:
                problem = f"it can be written to (mode {stat.S_IMODE(status.st_mode):o})"
                act = partial(self._repairs.protect, path)
                self._seen.add(where, problem, repair="make it read-only", act=act)

    def _all_blobs(self) -> Iterator[Path]:
        for fan in _entries(self._store.root / "blobs" / "sha256"):
            yield from _entries(fan) if fan.is_dir() else [fan]

    def _check_left_overs(self) -> None:
        for path in _entries(self._store.root / "tmp"):
            if path == self._store.root / GC_LOCK:
                continue
            age_s = time.time() - _newest_change(path)
            if age_s >= self._grace_s:
                act = partial(self._repairs.discard, path)
                problem = "left over from a process that was killed"
                self._seen.add(
                    self._short(path), problem, severity="litter", repair="remove it", act=act
                )

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self._store.root))


def _entries(folder: Path) -> list[Path]:
    with storage_errors(f"list {folder}"):
        return sorted(folder.iterdir()) if folder.is_dir() else []


def _read(file: Path) -> bytes:
    with storage_errors(f"read {file}"):
        return file.read_bytes()


def _json(file: Path) -> dict[str, object]:
    return parse_json(_read(file), file.name)


def _newest_change(path: Path) -> float:
    """Return when something below ``path`` was last changed; what goes meanwhile is new."""
    try:
        below = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
        return max([path.lstat().st_mtime, *(p.lstat().st_mtime for p in below)])
    except FileNotFoundError:
        return time.time()
