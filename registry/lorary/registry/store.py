"""The registry: push, resolve, fetch and pull adapters, move aliases, verify.

What happens in a push:

1. names and the registry itself are checked, before any work;
2. the folder is validated against the base (``validate``);
3. its canonical form is written inside the store, unseen, and validated again (``publish``);
4. the digest is computed, the manifest completed;
5. the store commits: blobs, manifest, unpacked folder, version number last (``local``);
6. aliases move, each with a line in the log (``aliases``).

``Registry`` holds the rules; a ``Store`` holds the bytes. A ``Registry`` may be shared by threads.
"""

from __future__ import annotations

import builtins
import getpass
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lorary.errors import AdapterNotFound, CorruptArtifact, InvalidRef
from lorary.registry.aliases import UNSET, AliasMove, MoveKind, Unset, before
from lorary.registry.backend import Store, open_store
from lorary.registry.base import BaseCard
from lorary.registry.blobs import Progress
from lorary.registry.local import utc_now
from lorary.registry.manifest import Manifest
from lorary.registry.publish import stage_version
from lorary.registry.pull import check_free, copy_version
from lorary.registry.refs import LATEST, AdapterRef, check_alias, check_name, parse_ref
from lorary.registry.results import Resolved, VerifyReport, VersionInfo
from lorary.registry.rollouts import Rollouts
from lorary.registry.splits import Canary
from lorary.registry.verify import verify_all, verify_version
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)


class Registry:
    """Adapters as immutable, numbered, verified versions with movable aliases."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, address: str | Path, *, create: bool = False, watch: bool = False) -> Self:
        """Open a registry.

        Args:
            address: ``file:///path``, a path, or ``hf://owner[/prefix]``.
            create: make a registry in a folder that does not exist yet.
            watch: for servers: a ref on a Hub is resolved in memory, seconds old at most.

        Raises:
            ConfigError: an address of an unknown kind, or a folder that is something else.
            StorageError: the folder is missing, or cannot be read or created.
        """
        return cls(open_store(address, create=create, watch=watch))

    @property
    def url(self) -> str:
        """The registry's address."""
        return self._store.url

    @property
    def rollouts(self) -> Rollouts:
        """The canaries behind aliases."""
        return Rollouts(self._store, self._describe_move)

    def trouble(self) -> str:
        """Return why answers may be out of date just now (the Hub is away); empty if they are not."""
        return self._store.trouble()

    def push(
        self,
        folder: Path,
        name: str,
        *,
        base: BaseCard,
        aliases: Sequence[str] = (),
        description: str = "",
        allow_zero: bool = False,
        actor: str = "",
        progress: Progress | None = None,
    ) -> VersionInfo:
        """Validate an adapter folder and keep it as a version; equal content is the version it was.

        Args:
            folder: a PEFT folder; with ``manifest.json``, its base must be ``base``.
            name: the adapter.
            base: the base it was trained on.
            aliases: to be moved to the version.
            description: replaces the manifest's own.
            allow_zero: accept an adapter that changes nothing.
            actor: who pushes; the system's user if empty.
            progress: called with the number of bytes just read.

        Raises:
            InvalidRef: the name or an alias is not valid.
            CorruptArtifact: the files are not what they claim.
            IncompatibleAdapter: sound, but not for this base, or not plain LoRA.
            StorageError: the registry cannot be written, or the folder cannot be read.
        """
        check_name(name)
        for alias in aliases:
            _check_movable(alias)
        with self._store.staging() as staged:
            draft = stage_version(
                Path(folder),
                staged,
                name=name,
                base=base,
                description=description,
                allow_zero=allow_zero,
                progress=progress,
            )
            pointer = self._store.commit(name, staged, draft, progress)
        for alias in aliases:
            self._move(name, alias, pointer.version, actor=actor, reason="push")
        return self._info(name, pointer)

    def resolve(self, ref: str | AdapterRef) -> Resolved:
        """Return what a ref means just now; two or three ``stat`` calls once an adapter is known.

        Raises:
            InvalidRef: the text is not a ref, or a digest prefix fits several versions.
            AdapterNotFound: no such adapter, alias, version or digest.
        """
        if isinstance(ref, str):
            ref = parse_ref(ref)
        newest = self._known(ref.name)
        if ref.digest is not None:
            return self._resolve_digest(ref.name, ref.digest)
        version = ref.version
        if ref.alias == LATEST:
            version = newest
        elif ref.alias is not None:
            version = self._store.alias_state(ref.name).get(ref.alias)
            if version is None:
                raise AdapterNotFound(
                    f"adapter '{ref.name}' has no alias '{ref.alias}'; it has "
                    f"{', '.join(sorted(self.aliases(ref.name)))}"
                )
        pointer = self._store.pointer(ref.name, version or 0)
        if pointer is None:
            raise AdapterNotFound(
                f"adapter '{ref.name}' has no version {version}; it has 1 to {newest}"
            )
        return Resolved(
            name=ref.name, version=pointer.version, digest=pointer.digest, alias=ref.alias
        )

    def manifest(self, resolved: Resolved) -> Manifest:
        """Return a version's manifest, checked against its digest.

        Raises:
            AdapterNotFound: the version is gone.
            CorruptArtifact: the manifest is missing or damaged.
        """
        return self._store.manifest(resolved.name, self._pointer(resolved))

    def fetch(self, resolved: Resolved, progress: Progress | None = None) -> Path:
        """Return a read-only PEFT folder of the version, every file checked just now.

        The folder belongs to the registry: do not write to it.

        Raises:
            AdapterNotFound: the version is gone.
            CorruptArtifact: a file is missing or damaged.
        """
        return self._store.fetch(resolved.name, self._pointer(resolved), progress)

    def pull(self, ref: str | AdapterRef, dest: Path, progress: Progress | None = None) -> Path:
        """Copy a version to ``dest``, a standard PEFT folder; it appears whole or not at all.

        ``progress`` is told of every byte twice: when it is fetched or checked, and when it is copied.

        Raises:
            InvalidRef: the text is not a ref.
            AdapterNotFound: no such version.
            AlreadyExists: ``dest`` exists and is not empty.
            CorruptArtifact: a file is damaged; nothing is written.
            StorageError: ``dest`` cannot be written.
        """
        resolved = self.resolve(ref)
        dest = Path(dest).absolute()
        check_free(dest)
        folder = self.fetch(resolved, progress)
        return copy_version(folder, self.manifest(resolved), dest, progress)

    def list(self) -> builtins.list[VersionInfo]:
        """Return every version of every adapter, by name and number.

        A damaged version is left out, with a warning in the log; ``verify`` says what is wrong.
        """
        infos: builtins.list[VersionInfo] = []
        for name in self._store.names():
            for pointer in self._store.pointers(name):
                try:
                    infos.append(self._info(name, pointer))
                except CorruptArtifact as error:
                    logger.warning("leaving out %s@%d: %s", name, pointer.version, error)
        return infos

    def info(self, resolved: Resolved) -> VersionInfo:
        """Return one version's description for people."""
        return self._info(resolved.name, self._pointer(resolved))

    def aliases(self, name: str) -> dict[str, int]:
        """Return where every alias points, ``latest`` included.

        Raises:
            AdapterNotFound: no such adapter.
        """
        newest = self._known(name)
        return {LATEST: newest, **self._store.alias_state(name)}

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int | None,
        *,
        expect: int | Unset | None = UNSET,
        reason: str = "",
        actor: str = "",
    ) -> AliasMove:
        """Point an alias at a version, or remove it with ``None``.

        Args:
            name: the adapter.
            alias: any alias but ``latest``.
            version: a version's number, or ``None``.
            expect: where the alias must point before (``None``: nowhere), else nothing changes.
            reason: for the log.
            actor: who; the system's user if empty.

        Raises:
            InvalidRef: the alias is not valid, or is ``latest``.
            AdapterNotFound: no such adapter or version.
            Conflict: the alias is not where ``expect`` says.
        """
        _check_movable(alias)
        newest = self._known(name)
        if version is not None and self._store.pointer(name, version) is None:
            raise AdapterNotFound(
                f"adapter '{name}' has no version {version}; it has 1 to {newest}"
            )
        return self._move(name, alias, version, expect=expect, reason=reason, actor=actor)

    def rollback(self, name: str, alias: str, *, reason: str = "", actor: str = "") -> AliasMove:
        """Return an alias to where it pointed before its last move; again, and it goes further back.

        While it has a canary, that is what the last move began: the canary ends, the alias stays.

        Raises:
            AdapterNotFound: no such adapter or alias, or nothing to return to.
            Conflict: somebody moved the alias meanwhile.
        """
        _check_movable(alias)
        self._known(name)
        split = self.rollouts.of(name, alias)
        if split is not None:
            return self.rollouts.stop(
                name, alias, expect=split, reason=reason, actor=actor, kind="rollback"
            )
        current, previous = before(self._store.alias_moves(name), alias)
        return self._move(
            name, alias, previous, expect=current, reason=reason, actor=actor, kind="rollback"
        )

    def log(self, name: str, alias: str | None = None) -> builtins.list[AliasMove]:
        """Return the moves of all aliases of an adapter, or of one, oldest first.

        Raises:
            AdapterNotFound: no such adapter.
        """
        self._known(name)
        return [m for m in self._store.alias_moves(name) if alias in (None, m.alias)]

    def verify(
        self, ref: str | AdapterRef | None = None, progress: Progress | None = None
    ) -> VerifyReport:
        """Read every byte of one version, or of all, and compare it with what was promised.

        Raises:
            AdapterNotFound: ``ref`` names nothing.
        """
        if ref is None:
            return verify_all(self._store, progress)
        resolved = self.resolve(ref)
        check = verify_version(self._store, resolved.name, self._pointer(resolved), progress)
        return VerifyReport(checks=(check,))

    def _known(self, name: str) -> int:
        newest = self._store.newest(check_name(name))
        if not newest:
            raise AdapterNotFound(f"adapter '{name}' is not in the registry")
        return newest

    def _pointer(self, resolved: Resolved) -> Pointer:
        self._known(resolved.name)
        pointer = self._store.pointer(resolved.name, resolved.version)
        if pointer is None or pointer.digest != resolved.digest:
            raise AdapterNotFound(
                f"version {resolved.version} of adapter '{resolved.name}' is no longer "
                f"{resolved.digest[:19]}…; resolve the ref again"
            )
        return pointer

    def _resolve_digest(self, name: str, digest: str) -> Resolved:
        found = [p for p in self._store.pointers(name) if p.digest.startswith(digest)]
        if not found:
            raise AdapterNotFound(f"adapter '{name}' has no version with digest {digest}…")
        if len({pointer.digest for pointer in found}) > 1:
            numbers = ", ".join(str(pointer.version) for pointer in found)
            raise InvalidRef(
                f"digest {digest}… fits versions {numbers} of '{name}'; give more digits"
            )
        newest = found[-1]
        return Resolved(name=name, version=newest.version, digest=newest.digest)

    def _move(
        self,
        name: str,
        alias: str,
        version: int | None,
        *,
        expect: int | Unset | None = UNSET,
        reason: str,
        actor: str,
        kind: MoveKind = "set",
    ) -> AliasMove:
        move = self._describe_move(alias, version, reason=reason, actor=actor, kind=kind)
        return self._store.move_alias(name, move, expect=expect)

    @staticmethod
    def _describe_move(
        alias: str,
        version: int | None,
        *,
        reason: str,
        actor: str,
        kind: MoveKind,
        canary: Canary | None = None,
    ) -> AliasMove:
        return AliasMove(
            at=utc_now(),
            actor=actor or _user(),
            alias=alias,
            from_version=None,
            to_version=version,
            reason=reason,
            kind=kind,
            canary=canary,
        )

    def _info(self, name: str, pointer: Pointer) -> VersionInfo:
        manifest = self._store.manifest(name, pointer)
        state = self._store.alias_state(name)
        return VersionInfo(
            name=name,
            version=pointer.version,
            digest=pointer.digest,
            aliases=tuple(sorted(a for a, version in state.items() if version == pointer.version)),
            created_at=pointer.created_at,
            size_bytes=sum(entry.size for entry in manifest.files),
            rank=manifest.method.rank,
            base_name=manifest.base.name,
            base_fingerprint=manifest.base.fingerprint,
            task_kind=manifest.task.kind,
            metrics=manifest.metrics,
        )


def _check_movable(alias: str) -> None:
    if check_alias(alias) == LATEST:
        raise InvalidRef(f"alias '{LATEST}' is always the newest version and cannot be moved")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        return f"uid-{os.getuid()}"
