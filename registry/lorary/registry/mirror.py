"""Make one registry hold what another does: versions with their numbers, aliases, marks and signatures.

A mirror may be repeated, and goes on where it was interrupted: versions that are there with the same
digest are left alone, and so are lines of the logs. Where the two have gone apart (another content under a
number, a move that the source does not know) nothing of that adapter is changed.

A version's digest is the same on both sides. Its manifest need not be: a hub's versions have a model card. A
signature is over the manifest, too, so it goes along where manifests are equal, and is counted where they
are not.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorary.errors import AdapterNotFound, Conflict, CorruptArtifact
from lorary.registry.backend import Store
from lorary.registry.blobs import Progress, copy_file
from lorary.registry.canonical import digest_of
from lorary.registry.durable import storage_errors
from lorary.registry.folder import MANIFEST_FILE, scan_folder
from lorary.registry.manifest import Manifest
from lorary.registry.marks import Mark
from lorary.registry.refs import check_name
from lorary.registry.store import Registry
from lorary.registry.versions import Pointer


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirrored:
    """What was done for one adapter.

    Attributes:
        name: the adapter.
        num_versions: versions that were copied.
        num_there: versions that were there already, deleted ones included.
        num_bytes: bytes that were copied.
        num_moves: moves of aliases that were added to the log.
        num_marks: marks that were added.
        num_signatures: signatures that were added.
        num_unsigned: versions whose signature does not hold for the target's manifest: sign them there.
    """

    name: str
    num_versions: int = 0
    num_there: int = 0
    num_bytes: int = 0
    num_moves: int = 0
    num_marks: int = 0
    num_signatures: int = 0
    num_unsigned: int = 0


def mirror(
    source: Registry,
    target: Registry,
    names: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    told: Callable[[Mirrored], None] | None = None,
) -> list[Mirrored]:
    """Copy adapters with everything that is known of them.

    Args:
        source: where they are.
        target: where they are to be, too.
        names: which; all if there is none.
        progress: told of bytes read from the source, and of bytes sent to a hub.
        told: told of every adapter that is done.

    Raises:
        InvalidRef: a name is not valid, or not in the target (a team's on a hub).
        AdapterNotFound: the source has no such adapter.
        Conflict: the two have gone apart; adapters before this one are done.
        CorruptArtifact: a version is not what its digest says; nothing of it was copied.
    """
    done: list[Mirrored] = []
    for name in names or source.store.names():
        if not source.store.newest(check_name(name)):
            raise AdapterNotFound(f"adapter '{name}' is not in {source.url}")
        done.append(_mirror_one(source.store, target.store, name, progress))
        if told is not None:
            told(done[-1])
    return done


def _mirror_one(source: Store, target: Store, name: str, progress: Progress | None) -> Mirrored:
    _check_together(source, target, name)
    deleted = source.marks(name).deleted
    result = Mirrored(name=name, num_there=target.newest(name))
    for version in range(result.num_there + 1, source.newest(name) + 1):
        pointer = source.pointer(name, version)
        if pointer is None:
            raise AdapterNotFound(f"version {version} of '{name}' has gone from {source.url}")
        if version in deleted:
            target.reserve(name, pointer, deleted[version])
            result = dataclasses.replace(result, num_there=result.num_there + 1)
        else:
            size = _copy(source, target, name, pointer, progress)
            result = dataclasses.replace(
                result,
                num_versions=result.num_versions + 1,
                num_bytes=result.num_bytes + size,
            )
    # Before the aliases: who enforces signatures must not be sent to a version that has none yet.
    num_signatures, num_unsigned = _copy_signatures(source, target, name)
    moves = source.alias_moves(name)[len(target.alias_moves(name)) :]
    for move in moves:
        target.move_alias(name, move, expect=move.from_version)
    there = Counter(target.marks(name).entries)
    missing = [mark for mark in source.marks(name).entries if not _taken(there, mark)]
    for mark in missing:
        target.mark(name, mark)
    return dataclasses.replace(
        result,
        num_moves=len(moves),
        num_marks=len(missing),
        num_signatures=num_signatures,
        num_unsigned=num_unsigned,
    )


def _copy_signatures(source: Store, target: Store, name: str) -> tuple[int, int]:
    """Add the signatures that the target lacks; return how many, and how many do not hold there."""
    # The log first: on a hub, every signature is a file to ask for.
    signers = {int(e.subject): e.actor for e in source.audit(name) if e.event == "sign"}
    num_added = num_left = 0
    for version in sorted(signers.keys() - source.marks(name).deleted.keys()):
        signature = source.signature(name, version)
        theirs, ours = source.pointer(name, version), target.pointer(name, version)
        if signature is None or theirs is None or ours is None:
            continue
        if target.signature(name, version) is not None:
            continue  # that of the target's own signer, or of an earlier run
        if source.manifest(name, theirs) == target.manifest(name, ours):
            target.put_signature(name, version, signature, signers[version])
            num_added += 1
        else:
            num_left += 1
    return num_added, num_left


def _taken(there: Counter[Mark], mark: Mark) -> bool:
    """Take a mark out of ``there``; tell whether it was in."""
    if not there[mark]:
        return False
    there[mark] -= 1
    return True


def _check_together(source: Store, target: Store, name: str) -> None:
    """Raise ``Conflict`` unless what the target has of an adapter is how the source's began."""
    newest = source.newest(name)
    if target.newest(name) > newest:
        raise Conflict(
            f"'{name}' has {target.newest(name)} versions in {target.url}, and {newest} in "
            f"{source.url}: the two have gone apart, nothing of it was changed"
        )
    for version in range(1, target.newest(name) + 1):
        pointers = [store.pointer(name, version) for store in (source, target)]
        digests = [pointer.digest[:19] if pointer else "nothing" for pointer in pointers]
        if digests[0] != digests[1]:
            raise Conflict(
                f"version {version} of '{name}' is {digests[0]}… in {source.url}, and {digests[1]}… in "
                f"{target.url}: the two have gone apart, nothing of it was changed"
            )
    moves = target.alias_moves(name)
    if source.alias_moves(name)[: len(moves)] != moves:
        raise Conflict(
            f"aliases of '{name}' were moved in {target.url} itself, so its log cannot become that of "
            f"{source.url}; nothing of it was changed"
        )
    ours = Counter(source.marks(name).entries)
    if any(not _taken(ours, mark) for mark in target.marks(name).entries):
        raise Conflict(
            f"versions or aliases of '{name}' were marked in {target.url} itself, which "
            f"{source.url} knows nothing of; nothing of it was changed"
        )


def _copy(
    source: Store, target: Store, name: str, pointer: Pointer, progress: Progress | None
) -> int:
    folder = source.fetch(name, pointer, progress)
    scan_folder(folder, allow_hardlinks=True)
    manifest = source.manifest(name, pointer)
    with target.staging() as staged:
        with storage_errors(f"write to {staged}"):
            for entry in manifest.files:
                (staged / entry.path).parent.mkdir(exist_ok=True)
                written = copy_file(folder / entry.path, staged / entry.path)
                if written != entry.sha256:
                    raise CorruptArtifact(f"{folder / entry.path} changed while it was copied")
        _check_digest(name, pointer, manifest)
        draft = dataclasses.replace(manifest, name=name, version=0)
        taken = target.commit(name, staged, draft, progress, created_at=pointer.created_at)
    if (taken.version, taken.digest) != (pointer.version, pointer.digest):
        raise Conflict(
            f"somebody else pushed to '{name}' in {target.url} meanwhile: {pointer.version} became "
            f"{taken.version}. The two have gone apart."
        )
    return sum(entry.size for entry in manifest.files)


def _check_digest(name: str, pointer: Pointer, manifest: Manifest) -> None:
    digest = digest_of(manifest)
    if not manifest.digest == pointer.digest == digest:
        raise CorruptArtifact(
            f"{MANIFEST_FILE} of {name}@{pointer.version} has digest {digest[:19]}…, not "
            f"{pointer.digest[:19]}…; push the adapter again"
        )
