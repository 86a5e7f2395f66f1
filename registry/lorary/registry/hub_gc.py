"""What deleting versions on a hub frees: here, what was fetched of them; there, nothing by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lorary.registry.gc import Collector
from lorary.registry.results import Freed
from lorary.registry.unpacked import VersionFolders
from lorary.registry.versions import Pointer


def collect(
    cache: VersionFolders,
    deleted: Mapping[str, Sequence[Pointer]],
    *,
    grace_s: float,
    is_dry: bool,
) -> Freed:
    """Remove deleted versions and left-overs from this machine, and say what stays on the hub.

    What other registries have fetched into the same place stays as well.

    Args:
        cache: where what was fetched is kept.
        deleted: the deleted versions by repository.
        grace_s: what is younger stays.
        is_dry: only say what would be removed.
    """
    manifests = {p.manifest_sha256 for pointers in deleted.values() for p in pointers}

    def needed(_seen: dict[str, int], _since: str) -> set[str]:
        return cache.linked(without=manifests)

    freed = Collector(cache.root, needed, grace_s=grace_s).run(is_dry=is_dry)
    notes = tuple(
        f"{repo_id}: the hub keeps the files of deleted {_listed(pointers)} in the repository's "
        "history; only deleting the repository, or squashing its history, frees them"
        for repo_id, pointers in sorted(deleted.items())
    )
    return dataclasses.replace(freed, notes=notes)


def _listed(pointers: Sequence[Pointer]) -> str:
    numbers = ", ".join(str(pointer.version) for pointer in pointers)
    return f"version{'s' if len(pointers) > 1 else ''} {numbers}"
