"""What is in a registry, for people: every version with its aliases, size, base, task and figures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from lorary.errors import CorruptArtifact
from lorary.registry.backend import Store
from lorary.registry.manifest import Manifest
from lorary.registry.marks import Marks
from lorary.registry.results import VersionInfo
from lorary.registry.summaries import Summary, summarized
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)


def listed(store: Store, only: str = "") -> list[VersionInfo]:
    """Return every version that is not deleted, by name and number: of every adapter, or of ``only`` this one.

    A damaged version is left out, with a warning in the log; ``verify`` says what is wrong.
    """
    infos: list[VersionInfo] = []
    for name in [only] if only else store.names():
        marks = _marks_or_none(store, name)
        if marks is None:
            continue
        aliases = _aliases_by_version(store.alias_state(name))
        infos.extend(
            _version_info(name, pointer, summary, aliases, marks)
            for pointer, summary in store.summaries(name)
            if pointer.version not in marks.deleted
        )
    return infos


def described(store: Store) -> Iterator[tuple[VersionInfo, Manifest]]:
    """Yield what ``listed`` returns, each with its manifest."""
    for name in store.names():
        marks = _marks_or_none(store, name)
        if marks is None:
            continue
        aliases = _aliases_by_version(store.alias_state(name))
        for pointer in store.pointers(name):
            if pointer.version in marks.deleted:
                continue
            try:
                manifest = store.manifest(name, pointer)
            except CorruptArtifact as error:
                logger.warning("leaving out %s@%d: %s", name, pointer.version, error)
                continue
            summary = summarized(manifest)
            yield _version_info(name, pointer, summary, aliases, marks), manifest


def described_version(store: Store, name: str, pointer: Pointer) -> VersionInfo:
    """Return one version's description for people."""
    summary = summarized(store.manifest(name, pointer))
    aliases = _aliases_by_version(store.alias_state(name))
    return _version_info(name, pointer, summary, aliases, store.marks(name))


def _marks_or_none(store: Store, name: str) -> Marks | None:
    """Return an adapter's marks; None, with a warning, when they are damaged."""
    try:
        return store.marks(name)
    except CorruptArtifact as error:
        logger.warning("leaving out %s: %s", name, error)
        return None


def _aliases_by_version(state: Mapping[str, int]) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for alias, version in sorted(state.items()):
        found[version] = (*found.get(version, ()), alias)
    return found


def _version_info(
    name: str,
    pointer: Pointer,
    summary: Summary,
    aliases: Mapping[int, tuple[str, ...]],
    marks: Marks,
) -> VersionInfo:
    return VersionInfo(
        name=name,
        version=pointer.version,
        digest=pointer.digest,
        aliases=aliases.get(pointer.version, ()),
        created_at=pointer.created_at,
        size_bytes=summary.size_bytes,
        rank=summary.rank,
        base_name=summary.base_name,
        base_fingerprint=summary.base_fingerprint,
        task_kind=summary.task_kind,
        metrics=summary.metrics,
        deprecated=marks.why_deprecated(pointer.version),
    )
