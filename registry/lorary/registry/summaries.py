"""What lists show of every version, kept together, so that a list need not open two files per version.

``<adapter>/summaries.jsonl``, one version a line, written after the version is there. It is derived: a line
counts while the size and time of change of the version's file and of its manifest are what they were when it
was written; what has no such line is read from those files, and the file may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorary.errors import CorruptArtifact
from lorary.registry.manifest import Manifest, Metrics, TaskKind
from lorary.registry.versions import Pointer

if TYPE_CHECKING:
    from lorary.registry.backend import Store

logger = logging.getLogger(__name__)

SUMMARIES_FILE: Final = "summaries.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a list shows of a manifest; the fields are those of ``VersionInfo``."""

    size_bytes: int
    rank: int
    base_name: str
    base_fingerprint: str
    task_kind: TaskKind
    metrics: Metrics | None


def summarized(manifest: Manifest) -> Summary:
    """Return what lists show of a version: figures, but not how sure they are."""
    metrics = manifest.metrics
    return Summary(
        size_bytes=sum(entry.size for entry in manifest.files),
        rank=manifest.method.rank,
        base_name=manifest.base.name,
        base_fingerprint=manifest.base.fingerprint,
        task_kind=manifest.task.kind,
        metrics=dataclasses.replace(metrics, uncertainty={}) if metrics else None,
    )


def read_summaries(
    store: Store, name: str, pointers: Iterable[Pointer]
) -> Iterator[tuple[Pointer, Summary]]:
    """Yield summaries read from manifests; a damaged one is logged and left out."""
    for pointer in pointers:
        try:
            yield pointer, summarized(store.manifest(name, pointer))
        except CorruptArtifact as error:
            logger.warning("leaving out %s@%d: %s", name, pointer.version, error)


class Summaries:
    """The summaries of one adapter's versions.

    Args:
        folder: the adapter's.
        blobs: ``…/blobs/sha256``.
    """

    def __init__(self, folder: Path, blobs: Path) -> None:
        self._file = folder / SUMMARIES_FILE
        # Joined as text: a list looks at two files per version, and paths are objects that cost more.
        self._versions = f"{folder}/versions/"
        self._blobs = f"{blobs}/"

    def exists(self) -> bool:
        """Tell whether there is a file."""
        return self._file.exists()

    def read(self) -> dict[int, tuple[Pointer, Summary]]:
        """Return the lines that count, by version."""
        try:
            raw = self._file.read_bytes()
        except FileNotFoundError:
            return {}
        lines = raw[: raw.rfind(b"\n") + 1].splitlines()
        try:
            rows = json.loads(b"[" + b",".join(lines) + b"]")
            found = [_parsed(row) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is damaged and not used (%s); delete it", self._file, error)
            return {}
        return {
            pointer.version: (pointer, summary)
            for pointer, summary, stamp in found
            if stamp == self._stamp(pointer)
        }

    def append(self, versions: Iterable[tuple[Pointer, Manifest]]) -> None:
        """Add lines; the caller holds the adapter's lock.

        Raises:
            OSError: they cannot be written.
        """
        with self._file.open("ab") as file:
            if file.tell():
                file.write(b"" if self._ends_whole() else b"\n")
            for pointer, manifest in versions:
                row = {
                    "pointer": dataclasses.asdict(pointer),
                    "summary": dataclasses.asdict(summarized(manifest)),
                    "stamp": self._stamp(pointer),
                }
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def _ends_whole(self) -> bool:
        with self._file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _stamp(self, pointer: Pointer) -> list[int]:
        """Return size and time of change of a version's file and of its manifest; empty if one is gone."""
        sha256 = pointer.manifest_sha256
        try:
            file = os.stat(f"{self._versions}{pointer.version}.json")
            manifest = os.stat(f"{self._blobs}{sha256[:2]}/{sha256}")
        except OSError:
            return []
        return [file.st_size, file.st_mtime_ns, manifest.st_size, manifest.st_mtime_ns]


def _parsed(row: Mapping[str, Any]) -> tuple[Pointer, Summary, list[int]]:
    summary = row["summary"]
    metrics = summary["metrics"]
    fields = {**summary, "metrics": Metrics(**metrics) if metrics else None}
    return Pointer(**row["pointer"]), Summary(**fields), row["stamp"]
