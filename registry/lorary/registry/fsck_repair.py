"""What ``fsck --repair`` does in a folder: every repair puts back what was, from a source that proves it."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lorary.errors import CorruptArtifact, LoraryError
from lorary.registry.audit import AUDIT_FILE, AuditEvent
from lorary.registry.backend import Store
from lorary.registry.blobs import copy_file, hash_file
from lorary.registry.durable import (
    append_lines,
    locked,
    make_folder,
    replace,
    storage_errors,
    sync_folder,
    unused_name,
    write_new,
)
from lorary.registry.folder import MANIFEST_FILE, MAX_JSON_BYTES
from lorary.registry.gc import GC_LOCK
from lorary.registry.local import LocalStore, utc_now
from lorary.registry.manifest import Manifest
from lorary.registry.versions import Pointer


class Repairs:
    """Repairs of a registry in a folder.

    Args:
        store: the registry.
        sources: other registries that hold copies.
        actor: who repairs.
    """

    def __init__(self, store: LocalStore, sources: Sequence[Store], actor: str) -> None:
        self._store = store
        self._folders = store.folders
        self._sources = sources
        self._actor = actor

    # -- version files ------------------------------------------------------------------------

    def pointer_for(self, name: str, version: int, recorded: AuditEvent | None) -> Pointer | None:
        """Return what a lost version file held, if a whole manifest says so beyond doubt."""
        if recorded is not None and recorded.evidence:
            path = self._folders.blobs.path(recorded.evidence)
            found = [path] if path.is_file() and hash_file(path) == recorded.evidence else []
        else:
            found = [path for path in self._manifests() if _is_of(path, name, version)]
        if len(found) != 1:
            return None
        (path,) = found
        with storage_errors(f"read {path}"):
            raw, changed = path.read_bytes(), path.stat().st_mtime
        then = datetime.datetime.fromtimestamp(changed, datetime.UTC)
        return Pointer(
            version=version,
            digest=Manifest.from_json(raw).digest,
            manifest_sha256=path.name,
            manifest_size=len(raw),
            created_at=recorded.at if recorded else then.strftime("%Y-%m-%dT%H:%M:%SZ"),
        )

    def write_pointer(self, name: str, pointer: Pointer) -> None:
        """Write a version's file; one that is there is damaged, and replaced."""
        folder = self._store.folder(name)
        target = folder / "versions" / f"{pointer.version}.json"
        staged = unused_name(self._folders.root / "tmp", "pointer")
        with locked(folder / "lock"), storage_errors(f"write {target}"):
            write_new(staged, pointer.to_json())
            replace(staged, target)
        self._store.forget(name)
        self._note(
            name, str(pointer.version), pointer.digest, "version file made from its manifest"
        )

    def _manifests(self) -> Iterator[Path]:
        """Yield the blobs that may be manifests."""
        for path in sorted((self._folders.root / "blobs" / "sha256").glob("??/*")):
            if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:
                with path.open("rb") as file:
                    if file.read(1) == b"{":
                        yield path

    # -- files --------------------------------------------------------------------------------

    def blob_from_copy(
        self, path: str, sha256: str, name: str, pointer: Pointer
    ) -> Callable[[], None] | None:
        """Return what restores a blob, or ``None`` if no copy is known."""
        for source in self._copies(path, sha256, name, pointer):

            def restore(source: Path = source) -> None:
                self._restore(source, sha256)
                self._folders.drop(pointer)
                self._note(name, str(pointer.version), sha256, f"{path} restored from {source}")

            return restore
        return None

    def _copies(self, path: str, sha256: str, name: str, pointer: Pointer) -> Iterator[Path]:
        for unpacked in (self._folders.root / "unpacked").glob(f"*/{path}"):
            if hash_file(unpacked) == sha256:
                yield unpacked
        for store in self._sources:
            try:
                yield from _copies_in(store, name, pointer, path, sha256)
            except LoraryError:
                continue  # another source may have it; that none has is said with the finding

    def _restore(self, source: Path, sha256: str) -> None:
        target = self._folders.blobs.path(sha256)
        staged = unused_name(self._folders.root / "tmp", "blob")
        with storage_errors(f"restore {target}"):
            make_folder(target.parent)
            if copy_file(source, staged) != sha256:
                staged.unlink()
                raise CorruptArtifact(f"{source} changed while it was copied")
            staged.chmod(0o444)
            replace(staged, target)

    def unpack_again(self, name: str, pointer: Pointer) -> None:
        """Replace an unpacked folder by one that is linked to the blobs."""
        self._folders.drop(pointer)
        self._folders.unpack(pointer)
        self._note(name, str(pointer.version), pointer.manifest_sha256, "unpacked again")

    def protect(self, path: Path) -> None:
        """Make a blob read-only."""
        with storage_errors(f"protect {path}"):
            path.chmod(0o444)

    def discard_blob(self, path: Path) -> None:
        """Remove a damaged blob that no version refers to, unless a push has replaced it meanwhile."""
        with locked(self._store.root / GC_LOCK):
            if not path.exists() or hash_file(path) == path.name:
                return
            self.discard(path)

    def discard_unpacked(self, folder: Path) -> None:
        """Remove an unpacked folder of no version, unless a push has made it one's meanwhile."""
        with locked(self._store.root / GC_LOCK):
            for name in self._store.names():
                self._store.forget(name)
                if any(p.manifest_sha256 == folder.name for p in self._store.pointers(name)):
                    return
            self.discard(folder)

    def discard(self, path: Path) -> None:
        """Remove what nobody reads; a folder goes out of sight in one step."""
        aside = unused_name(self._folders.root / "tmp", "discarded")
        with storage_errors(f"remove {path}"):
            try:
                path.rename(aside)
            except FileNotFoundError:
                return  # whoever it belonged to has removed it
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()

    # -- logs ---------------------------------------------------------------------------------

    def cut(self, file: Path) -> None:
        """Cut off a torn last line."""
        with locked(file.parent / "lock"), storage_errors(f"repair {file}"):
            append_lines(file, ())

    def write_log(self, name: str, file: Path, lines: Sequence[bytes]) -> None:
        """Write a log of an adapter's anew; the damaged one is kept beside it."""
        folder = self._store.folder(name)
        staged = unused_name(self._folders.root / "tmp", file.stem)
        with locked(folder / "lock"), storage_errors(f"repair {file}"):
            write_new(staged, b"".join(lines), mode=0o644)
            kept = _set_aside(file)
            replace(staged, file)
        self._store.forget(name)
        self._note(name, file.stem, "", f"{file.name} made from the audit log; damaged: {kept}")

    def new_audit(self, name: str) -> None:
        """Begin a new audit log; the first line says where the broken one is, and what it hashes to."""
        folder = self._store.folder(name)
        file = folder / AUDIT_FILE
        with locked(folder / "lock"), storage_errors(f"repair {file}"):
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            kept = _set_aside(file)
            file.unlink()
            sync_folder(folder)
        self._note(name, "audit", sha256, f"broken audit log kept as {kept}")

    def _note(self, name: str, subject: str, evidence: str, reason: str) -> None:
        event = AuditEvent(
            at=utc_now(),
            actor=self._actor,
            event="repair",
            subject=subject,
            reason=reason,
            evidence=evidence,
        )
        self._store.record(name, event)


def _set_aside(file: Path) -> str:
    """Keep a damaged file under another name as well; return that."""
    kept = unused_name(file.parent, f"{file.name}.damaged")
    if file.exists():
        kept.write_bytes(file.read_bytes())
    return kept.name


def _is_of(path: Path, name: str, version: int) -> bool:
    """Tell whether a blob is a whole manifest of a version."""
    if hash_file(path) != path.name:
        return False
    try:
        fields = json.loads(path.read_bytes())
        if fields.get("name") != name or fields.get("version") != version:
            return False
        Manifest.from_json(path.read_bytes())
    except (ValueError, AttributeError, CorruptArtifact):
        return False
    return True


def _copies_in(store: Store, name: str, pointer: Pointer, path: str, sha256: str) -> Iterator[Path]:
    """Yield a copy of a file that another registry has under the same adapter and digest."""
    for other in store.pointers(name):
        if other.digest != pointer.digest:
            continue
        is_manifest = path == MANIFEST_FILE and other.manifest_sha256 == sha256
        manifest = store.manifest(name, other)
        if is_manifest or any((e.path, e.sha256) == (path, sha256) for e in manifest.files):
            yield store.fetch(name, other) / path
