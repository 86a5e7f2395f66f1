"""What the registry needs of the place where versions are kept.

Two kinds of places are known: a folder (``local``) and repositories on a Hub (``hub``). They differ in
how bytes travel and in what makes a change atomic; what a version, a number and a move of an alias are
is the same in both, and one suite of tests says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from lorary.registry.address import is_hub, local_path
from lorary.registry.aliases import Admit, AliasMove, Unset
from lorary.registry.audit import AuditEvent
from lorary.registry.blobs import Progress, Reader
from lorary.registry.manifest import Manifest
from lorary.registry.marks import Mark, Marks
from lorary.registry.results import Freed
from lorary.registry.splits import Split
from lorary.registry.summaries import Summary
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

    def summaries(self, name: str) -> Iterator[tuple[Pointer, Summary]]:
        """Yield what lists show of every version, oldest first; a damaged one is logged and left out."""

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
        admit: Admit | None = None,
    ) -> AliasMove:
        """Record ``move`` if the alias is where ``expect`` says; ``from_version`` is filled in.

        A move to where the alias points already changes nothing and is not recorded. With
        ``expect_serial``, that canary must run (``Split.serial``).

        Args:
            name: the adapter.
            move: the move.
            expect: where the alias must point before.
            expect_serial: the canary that must run; whichever if None.
            admit: called, perhaps repeatedly, with the move when nothing can come before it any more:
                what it reads of the adapter is what the move follows on.

        Raises:
            Conflict: the alias is elsewhere, or the canary another.
            LoraryError: ``admit`` raised it.
        """

    def marks(self, name: str) -> Marks:
        """Return what was decided about an adapter's versions and aliases."""

    def mark(self, name: str, mark: Mark, allow: Callable[[], None] | None = None) -> None:
        """Record a mark.

        Args:
            name: the adapter.
            mark: the mark.
            allow: called, perhaps repeatedly, when nothing can come before the mark any more; what it
                raises refuses it.
        """

    def reserve(self, name: str, pointer: Pointer, mark: Mark) -> None:
        """Take the next number for a version that is deleted, without its files.

        Args:
            name: the adapter.
            pointer: what the number stood for where it was deleted.
            mark: its deletion.

        Raises:
            Conflict: ``pointer.version`` is not the next number.
        """

    def gc(self, *, grace_s: float, is_dry: bool) -> Freed:
        """Remove what nothing needs, and was last written ``grace_s`` seconds ago or earlier.

        Safe while others push and fetch.

        Args:
            grace_s: what is younger stays: somebody may be at work with it.
            is_dry: only say what would be removed.
        """

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, checked against its digest."""

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder for one push; fails at once if the store cannot be written."""

    def signature(self, name: str, version: int) -> bytes | None:
        """Return a version's signature, ``None`` if it has none."""

    def put_signature(self, name: str, version: int, signature: bytes, actor: str) -> None:
        """Keep a version's signature in place of the one it may have, and record who signed."""

    def audit(self, name: str) -> tuple[AuditEvent, ...]:
        """Return every change of an adapter, oldest first: who, when, what, and why.

        Raises:
            CorruptArtifact: the log was tampered with.
        """

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
        """Make staged files the next version, or return the one with the same content.

        Args:
            name: the adapter.
            staged: folder from ``staging``, holding what ``draft.files`` lists, synced.
            draft: the manifest but for its number.
            progress: told of bytes read.
            created_at: when it was pushed; now if empty.
            actor: who pushes, for the audit log.
        """

    def fetch(
        self,
        name: str,
        pointer: Pointer,
        progress: Progress | None = None,
        reader: Reader | None = None,
    ) -> Path:
        """Return a folder with a version's files, each checked just now; it is not to be written to.

        ``reader`` reads the file of tensors.
        """

    def locate(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return what ``fetch`` returns, whole but not checked: the caller hashes what it reads.

        ``progress`` is told of bytes that were not on this machine.
        """

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Check every byte of a version where it is kept, and return its manifest."""


def open_store(
    address: str | Path, *, create: bool = False, watch: bool = False, cache_bytes: int = 0
) -> Store:
    """Open the store that an address names.

    Args:
        address: ``file:///path``, a path, or ``hf://owner[/prefix]``.
        create: make a folder that does not exist yet.
        watch: answer questions about versions and aliases of a Hub from memory, which is renewed in
            the background every few seconds. A folder always answers for this moment.
        cache_bytes: what is fetched from a Hub is kept within so many bytes; 0 sets no limit.

    Raises:
        ConfigError: an address of an unknown kind, or a folder that is something else.
        StorageError: the folder is missing, or cannot be read or created.
    """
    # Imported here: the Hub's client takes a third of a second, and folders do not need it.
    if is_hub(address):
        from lorary.registry.hub import HubStore

        return HubStore(str(address), watch=watch, cache_bytes=cache_bytes)
    from lorary.registry.local import LocalStore

    return LocalStore(local_path(address), create=create)
