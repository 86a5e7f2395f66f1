"""What the registry needs of the place where versions are kept.

Two kinds of places are known: a folder (``local``) and repositories on a Hub (``hub``). They differ in
how bytes travel and in what makes a change atomic; what a version, a number and a move of an alias are
is the same in both, and one suite of tests says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from lorary.registry.address import is_hub, local_path
from lorary.registry.aliases import AliasMove, Unset
from lorary.registry.blobs import Progress
from lorary.registry.manifest import Manifest
from lorary.registry.splits import Split
from lorary.registry.versions import Pointer


class Store(Protocol):
    """Where versions are kept. Thread-safe.

    Every method may raise ``StorageError`` (a folder), ``RegistryUnavailable`` or ``AccessDenied`` (a
    Hub), and ``CorruptArtifact`` when what was kept is damaged. Asking for an adapter that does not
    exist is no error: it has no versions.
    """

    @property
    def url(self) -> str:
        """The store's address."""

    def names(self) -> list[str]:
        """Return all adapters that have a version, sorted."""

    def newest(self, name: str) -> int:
        """Return the number of an adapter's newest version, 0 if it has none."""

    def pointer(self, name: str, version: int) -> Pointer | None:
        """Return what a version's number stands for, ``None`` if there is no such version."""

    def pointers(self, name: str) -> Iterator[Pointer]:
        """Yield all pointers that can be read, oldest first; a damaged one is logged and left out."""

    def alias_state(self, name: str) -> Mapping[str, int]:
        """Return where every alias of an adapter points."""

    def alias_splits(self, name: str) -> Mapping[str, Split]:
        """Return the canaries of an adapter that run, by alias."""

    def trouble(self) -> str:
        """Return why answers may be out of date just now, empty if they are not; asks nobody afar."""

    def alias_moves(self, name: str) -> tuple[AliasMove, ...]:
        """Return all moves of an adapter's aliases, oldest first."""

    def move_alias(
        self,
        name: str,
        move: AliasMove,
        *,
        expect: int | Unset | None,
        expect_serial: int | None = None,
    ) -> AliasMove:
        """Record ``move`` if the alias is where ``expect`` says; ``from_version`` is filled in.

        A move to where the alias points already changes nothing and is not recorded. With
        ``expect_serial``, that canary must run (``Split.serial``).

        Raises:
            Conflict: the alias is elsewhere, or the canary another.
        """

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, checked against its digest."""

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder for one push; fails at once if the store cannot be written."""

    def commit(
        self, name: str, staged: Path, draft: Manifest, progress: Progress | None = None
    ) -> Pointer:
        """Make staged files the next version, or return the one with the same content.

        Args:
            name: the adapter.
            staged: folder from ``staging``, holding what ``draft.files`` lists, synced.
            draft: the manifest but for its number.
            progress: told of bytes read.
        """

    def fetch(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with a version's files, each checked just now; it is not to be written to."""

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Check every byte of a version where it is kept, and return its manifest."""


def open_store(address: str | Path, *, create: bool = False, watch: bool = False) -> Store:
    """Open the store that an address names.

    Args:
        address: ``file:///path``, a path, or ``hf://owner[/prefix]``.
        create: make a folder that does not exist yet.
        watch: answer questions about versions and aliases of a Hub from memory, which is renewed in
            the background every few seconds. A folder always answers for this moment.

    Raises:
        ConfigError: an address of an unknown kind, or a folder that is something else.
        StorageError: the folder is missing, or cannot be read or created.
    """
    # Imported here: the Hub's client takes a third of a second, and folders do not need it.
    if is_hub(address):
        from lorary.registry.hub import HubStore

        return HubStore(str(address), watch=watch)
    from lorary.registry.local import LocalStore

    return LocalStore(local_path(address), create=create)
