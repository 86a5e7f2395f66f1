"""Read every byte of versions and compare it with what was promised when they were pushed."""

from __future__ import annotations

from collections.abc import Container

from lorary.errors import CorruptArtifact, LoraryError
from lorary.registry.backend import Store
from lorary.registry.blobs import Progress
from lorary.registry.canonical import digest_of
from lorary.registry.manifest import Manifest
from lorary.registry.results import VerifyReport, VersionCheck
from lorary.registry.versions import Pointer


def verify_version(
    store: Store, name: str, pointer: Pointer, progress: Progress | None = None
) -> VersionCheck:
    """Check a version's files, its manifest and its digest."""
    problem = ""
    try:
        check_identity(name, pointer, store.check(name, pointer, progress))
    except LoraryError as error:
        problem = str(error)
    return VersionCheck(name=name, version=pointer.version, digest=pointer.digest, problem=problem)


def verify_all(store: Store, progress: Progress | None = None) -> VerifyReport:
    """Check every version of every adapter, and every alias log."""
    checks: list[VersionCheck] = []
    problems: list[str] = []
    for name in store.names():
        newest = store.newest(name)
        deleted: Container[int]
        try:
            deleted = store.marks(name).deleted
        except LoraryError as error:
            problems.append(f"{name}: {error}")
            deleted = ()
        for version in range(1, newest + 1):
            if version in deleted:
                continue
            try:
                pointer = store.pointer(name, version)
            except LoraryError as error:
                broken = VersionCheck(name=name, version=version, digest="", problem=str(error))
                checks.append(broken)
            else:
                if pointer is not None:
                    checks.append(verify_version(store, name, pointer, progress))
        problems.extend(_alias_problems(store, name, newest, deleted))
    return VerifyReport(checks=tuple(checks), problems=tuple(problems))


def check_identity(name: str, pointer: Pointer, manifest: Manifest) -> None:
    """Compare what a version's file and its manifest say with each other, and with its content.

    Raises:
        CorruptArtifact: they differ.
    """
    if (manifest.name, manifest.version) != (name, pointer.version):
        raise CorruptArtifact(
            f"manifest is of {manifest.name}@{manifest.version}, not of {name}@{pointer.version}"
        )
    digest = digest_of(manifest)
    if not manifest.digest == pointer.digest == digest:
        raise CorruptArtifact(
            f"digest is {pointer.digest[:19]}…, but the content gives {digest[:19]}…"
        )


def _alias_problems(store: Store, name: str, newest: int, deleted: Container[int]) -> list[str]:
    try:
        state = store.alias_state(name)
        splits = store.alias_splits(name)
    except LoraryError as error:
        return [f"{name}: {error}"]
    return [
        f"{name}: alias '{alias}' points at version {version}, which "
        + ("was deleted" if version in deleted else "does not exist")
        for alias, version in sorted(state.items())
        if version in deleted or not 1 <= version <= newest
    ] + [
        f"{name}: the canary of alias '{alias}' is version {split.canary.version}, which "
        + ("was deleted" if split.canary.version in deleted else "does not exist")
        for alias, split in sorted(splits.items())
        if split.canary.version in deleted or not 1 <= split.canary.version <= newest
    ]
