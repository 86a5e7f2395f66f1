"""What the registry needs of the place where versions are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from lorary.registry.aliases import AliasLog
from lorary.registry.blobs import Progress
from lorary.registry.manifest import Manifest
from lorary.registry.versions import Pointer, Versions


class Store(Protocol):
    """Where versions are kept. Every method may raise ``StorageError`` or ``CorruptArtifact``."""

    @property
    def url(self) -> str:
        """The store's address."""

    def names(self) -> list[str]:
        """Return all adapters that have a version."""

    def versions(self, name: str) -> Versions:
        """Return an adapter's versions, which may be none."""

    def aliases(self, name: str) -> AliasLog:
        """Return an adapter's alias log."""

    def manifest(self, pointer: Pointer) -> Manifest:
        """Return a version's manifest, checked against its digest."""

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder for one push; fails at once if the store cannot be written."""

    def commit(
        self, name: str, staged: Path, draft: Manifest, progress: Progress | None = None
    ) -> Pointer:
        """Make staged files the next version, or return the one with the same content."""

    def fetch(self, pointer: Pointer) -> Path:
        """Return a folder with a version's files, each checked just now."""

    def check(self, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Check every byte of a version and return its manifest."""
