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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from lorary.errors import AdapterNotFound, CorruptArtifact, InvalidRef, InvalidRequest, Refused
from lorary.registry.aliases import (
    UNSET,
    AliasMove,
    MoveKind,
    Unset,
    before,
    check_expected,
)
from lorary.registry.audit import AuditEvent
from lorary.registry.backend import Store, open_store
from lorary.registry.base import BaseCard
from lorary.registry.blobs import Progress, Reader
from lorary.registry.fsck import GRACE_S, FsckReport, fsck
from lorary.registry.gates import deletable, gate
from lorary.registry.gc import DEFAULT_GRACE_S
from lorary.registry.listing import described, described_version, listed
from lorary.registry.local import utc_now
from lorary.registry.manifest import MAX_RATIO, Accepted, Manifest
from lorary.registry.marks import Mark, Marks
from lorary.registry.publish import stage_version
from lorary.registry.pull import check_free, copy_version
from lorary.registry.refs import LATEST, AdapterRef, check_alias, check_name
from lorary.registry.requirements import parse_requirement
from lorary.registry.resolving import Resolver
from lorary.registry.results import Freed, Resolved, VerifyReport, VersionInfo
from lorary.registry.rollouts import Rollouts
from lorary.registry.signing import sign_folder
from lorary.registry.splits import Canary
from lorary.registry.trust import Trust, TrustPolicy
from lorary.registry.user import current_user
from lorary.registry.verify import verify_all, verify_version
from lorary.registry.versions import Pointer

MAX_MAX_RATIO: Final = 1e30


class Registry:
    """Adapters as immutable, numbered, verified versions with movable aliases."""

    def __init__(self, store: Store, trust: TrustPolicy | None = None) -> None:
        self._store = store
        self._resolver = Resolver(store)
        self._trust = Trust(trust or TrustPolicy(), store.url)

    @classmethod
    def open(
        cls,
        address: str | Path,
        *,
        create: bool = False,
        watch: bool = False,
        cache_bytes: int = 0,
        trust: TrustPolicy | None = None,
    ) -> Self:
        """Open a registry.

        Args:
            address: ``file:///path``, a path, or ``hf://owner[/prefix]``.
            create: make a registry in a folder that does not exist yet.
            watch: for servers: a ref on a Hub is resolved in memory, seconds old at most.
            cache_bytes: what is fetched from a Hub is kept within so many bytes; 0 sets no limit.
            trust: what is asked of signatures; what the environment says if not given (``trust``).

        Raises:
            ConfigError: an address of an unknown kind, a folder that is something else, or a trusted key
                that is missing.
            StorageError: the folder is missing, or cannot be read or created.
        """
        policy = TrustPolicy.from_environment() if trust is None else trust
        store = open_store(address, create=create, watch=watch, cache_bytes=cache_bytes)
        return cls(store, policy)

    @property
    def url(self) -> str:
        """The registry's address."""
        return self._store.url

    @property
    def store(self) -> Store:
        """Where the versions are kept."""
        return self._store

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
        max_ratio: float = MAX_RATIO,
        residual_base: bool = False,
        originals: bool | None = None,
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
            max_ratio: largest change of a module, as a multiple of the norm of its weight.
            residual_base: ``base`` is the model that PiSSA, OLoRA, CorDA or LoRA-GA left behind.
            originals: keep the files as they were given beside the canonical ones; ``None``: only those
                that were another method than LoRA.
            actor: who pushes; the system's user if empty.
            progress: called with the number of bytes just read.

        Raises:
            InvalidRef: the name or an alias is not valid.
            InvalidRequest: ``max_ratio`` makes no sense.
            CorruptArtifact: the files are not what they claim.
            IncompatibleAdapter: sound, but not for this base, or not plain LoRA.
            Refused: an alias is protected; the version is kept all the same.
            StorageError: the registry cannot be written, or the folder cannot be read.
        """
        check_name(name)
        for alias in aliases:
            _check_movable(alias)
        if not 0 < max_ratio < MAX_MAX_RATIO:
            raise InvalidRequest(
                f"max_ratio is {max_ratio}; it must be above 0 and below {MAX_MAX_RATIO:g}",
                field="max_ratio",
            )
        with self._store.staging() as staged:
            draft = stage_version(
                Path(folder),
                staged,
                name=name,
                base=base,
                description=description,
                accepted=Accepted(allow_zero=allow_zero, max_ratio=max_ratio),
                residual_base=residual_base,
                originals=originals,
                progress=progress,
            )
            pointer = self._store.commit(
                name, staged, draft, progress, actor=actor or current_user()
            )
        for alias in aliases:
            try:
                self._move(name, alias, pointer.version, actor=actor, reason="push")
            except Refused as error:
                raise Refused(f"pushed as {name}@{pointer.version}, but {error}") from error
        return described_version(self._store, name, pointer)

    def resolve(self, ref: str | AdapterRef) -> Resolved:
        """Return what a ref means just now; one or two ``stat`` calls once an adapter is known.

        Raises:
            InvalidRef: the text is not a ref, or a digest prefix fits several versions.
            AdapterNotFound: no such adapter, alias, version or digest.
        """
        return self._resolver.resolve(ref)

    def manifest(self, resolved: Resolved) -> Manifest:
        """Return a version's manifest, checked against its digest.

        Raises:
            AdapterNotFound: the version is gone.
            CorruptArtifact: the manifest is missing or damaged.
        """
        return self._store.manifest(resolved.name, self._resolver.pointer(resolved))

    def fetch(
        self, resolved: Resolved, progress: Progress | None = None, reader: Reader | None = None
    ) -> Path:
        """Return a read-only PEFT folder of the version, every file checked just now.

        The folder belongs to the registry: do not write to it. ``reader`` reads the file of tensors, so that
        who needs its bytes reads it once; they are right when this returns.

        Raises:
            AdapterNotFound: the version is gone.
            CorruptArtifact: a file is missing or damaged, or its signature is not as asked for.
        """
        pointer = self._resolver.pointer(resolved)
        folder = self._store.fetch(resolved.name, pointer, progress, reader)
        self._check_trust(folder, resolved, pointer)
        return folder

    def locate(self, resolved: Resolved) -> Path:
        """Return the folder that ``fetch`` returns, its files not checked: to show people where it is.

        Raises:
            AdapterNotFound: the version is gone.
            CorruptArtifact: its manifest is missing or damaged.
        """
        return self._store.locate(resolved.name, self._resolver.pointer(resolved))

    def pull(
        self, ref: str | AdapterRef | Resolved, dest: Path, progress: Progress | None = None
    ) -> Path:
        """Copy a version to ``dest``, a standard PEFT folder; it appears whole or not at all.

        ``progress`` is told of every byte twice: when it is fetched or checked, and when it is copied.

        Raises:
            InvalidRef: the text is not a ref.
            AdapterNotFound: no such version.
            AlreadyExists: ``dest`` exists and is not empty.
            CorruptArtifact: a file is damaged, or its signature is not as asked for; nothing is written.
            StorageError: ``dest`` cannot be written.
        """
        resolved = ref if isinstance(ref, Resolved) else self.resolve(ref)
        dest = Path(dest).absolute()
        check_free(dest)
        pointer, manifest = self._resolver.pointer(resolved), self.manifest(resolved)
        left = sum(entry.size for entry in manifest.files)

        def fetched(count: int) -> None:
            nonlocal left
            left -= count
            if progress is not None:
                progress(count)

        # What is written is hashed on the way, so it need not be read before, too.
        folder = self._store.locate(resolved.name, pointer, fetched)
        if left > 0:
            fetched(left)  # it was here already

        is_whole = False

        def check(copied: Path) -> None:
            nonlocal is_whole
            is_whole = True
            self._check_trust(copied, resolved, pointer)

        try:
            return copy_version(folder, pointer, manifest, dest, progress, check=check)
        except CorruptArtifact:
            if is_whole:
                raise  # not damaged: its signature is not as asked for
            folder = self._store.fetch(resolved.name, pointer)  # heals what it can, or says why not
            return copy_version(folder, pointer, manifest, dest, check=check)

    def list(self, name: str = "") -> builtins.list[VersionInfo]:
        """Return every version that is not deleted, by name and number.

        A damaged version is left out, with a warning in the log; ``verify`` says what is wrong.

        Args:
            name: only of this adapter, and no other is read: nothing if there is none; of every one if empty.

        Raises:
            InvalidRef: the name is not valid.
        """
        if name:
            check_name(name)
        return listed(self._store, name)

    def described(self) -> Iterator[tuple[VersionInfo, Manifest]]:
        """Yield what ``list`` returns, each with its manifest."""
        return described(self._store)

    def info(self, resolved: Resolved) -> VersionInfo:
        """Return one version's description for people."""
        return described_version(self._store, resolved.name, self._resolver.pointer(resolved))

    def aliases(self, name: str) -> dict[str, int]:
        """Return where every alias points, ``latest`` included.

        Raises:
            AdapterNotFound: no such adapter.
        """
        return self._resolver.aliases(name)

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int | None,
        *,
        expect: int | Unset | None = UNSET,
        reason: str = "",
        actor: str = "",
        require: Sequence[str] = (),
        force: bool = False,
    ) -> AliasMove:
        """Point an alias at a version, or remove it with ``None``.

        Args:
            name: the adapter.
            alias: any alias but ``latest``.
            version: a version's number, or ``None``.
            expect: where the alias must point before (``None``: nowhere), else nothing changes.
            reason: for the log.
            actor: who; the system's user if empty.
            require: what the version must meet (``requirements``); kept in the log with its figures.
            force: move a protected alias whatever its own requirements say; needs a reason.

        Raises:
            InvalidRef: the alias is not valid, or is ``latest``.
            InvalidRequest: a requirement cannot be read, or ``force`` lacks a reason.
            AdapterNotFound: no such adapter or version.
            Conflict: the alias is not where ``expect`` says.
            Refused: a requirement is not met, or the alias is protected.
        """
        _check_movable(alias)
        newest = self._resolver.known(name)
        if version is not None and self._store.pointer(name, version) is None:
            raise AdapterNotFound(
                f"adapter '{name}' has no version {version}; it has 1 to {newest}"
            )
        return self._move(
            name,
            alias,
            version,
            expect=expect,
            reason=reason,
            actor=actor,
            require=require,
            force=force,
        )

    def rollback(
        self,
        name: str,
        alias: str,
        *,
        expect: int | Unset = UNSET,
        reason: str = "",
        actor: str = "",
    ) -> AliasMove:
        """Return an alias to where it pointed before its last move; again, and it goes further back.

        While it has a canary, that is what the last move began: the canary ends, the alias stays.

        Args:
            name: the adapter.
            alias: which alias.
            expect: where the alias must point before, else nothing changes.
            reason: for the log.
            actor: who; the system's user if empty.

        Raises:
            AdapterNotFound: no such adapter or alias, or nothing to return to.
            Conflict: the alias is not where ``expect`` says, or somebody moved it meanwhile.
            Refused: the alias is protected, and there is no reason.
        """
        _check_movable(alias)
        self._resolver.known(name)
        split = self.rollouts.of(name, alias)
        if split is not None:
            check_expected(alias, split.version, expect)
            return self.rollouts.stop(
                name, alias, expect=split, reason=reason, actor=actor, kind="rollback"
            )
        current, previous = before(self._store.alias_moves(name), alias)
        check_expected(alias, current, expect)
        return self._move(
            name, alias, previous, expect=current, reason=reason, actor=actor, kind="rollback"
        )

    def log(self, name: str, alias: str | None = None) -> builtins.list[AliasMove]:
        """Return the moves of all aliases of an adapter, or of one, oldest first.

        Raises:
            AdapterNotFound: no such adapter.
        """
        self._resolver.known(name)
        return [m for m in self._store.alias_moves(name) if alias in (None, m.alias)]

    def marks(self, name: str) -> Marks:
        """Return what was decided about an adapter's versions and aliases.

        Raises:
            AdapterNotFound: no such adapter.
        """
        self._resolver.known(name)
        return self._store.marks(name)

    def protect(
        self,
        name: str,
        alias: str,
        *,
        require: Sequence[str] = (),
        is_on: bool = True,
        reason: str = "",
        actor: str = "",
    ) -> Mark:
        """Protect an alias: it then moves to what meets ``require``, or by force with a reason.

        Args:
            name: the adapter.
            alias: any alias but ``latest``, there or not.
            require: what versions must meet (``requirements``); without, every move needs force.
            is_on: ``False`` takes the protection back.
            reason: for the log.
            actor: who; the system's user if empty.

        Raises:
            InvalidRef: the alias is not valid, or is ``latest``.
            InvalidRequest: a requirement cannot be read.
            AdapterNotFound: no such adapter, or the alias is not protected.
        """
        _check_movable(alias)
        self._resolver.known(name)
        for text in require:
            parse_requirement(text)
        if not is_on and alias not in self._store.marks(name).protected:
            raise AdapterNotFound(f"alias '{alias}' of '{name}' is not protected")
        mark = Mark(
            at=utc_now(),
            actor=actor or current_user(),
            kind="protect" if is_on else "unprotect",
            alias=alias,
            require=tuple(text.strip() for text in require),
            reason=reason,
        )
        self._store.mark(name, mark)
        return mark

    def deprecate(
        self, ref: str | AdapterRef, *, is_on: bool = True, reason: str = "", actor: str = ""
    ) -> Mark:
        """Say that a version should not be used any more; it still resolves, and says so.

        Args:
            ref: the version.
            is_on: ``False`` takes it back.
            reason: why; needed to deprecate.
            actor: who; the system's user if empty.

        Raises:
            InvalidRequest: there is no reason.
            AdapterNotFound: no such version, or it is not deprecated.
        """
        resolved = self.resolve(ref)
        if is_on and not reason.strip():
            raise InvalidRequest(
                "say why with --reason: whoever uses it will read it", field="reason"
            )
        if not is_on and not resolved.deprecated:
            raise AdapterNotFound(f"{resolved.name}@{resolved.version} is not deprecated")
        mark = Mark(
            at=utc_now(),
            actor=actor or current_user(),
            kind="deprecate" if is_on else "restore",
            version=resolved.version,
            reason=reason,
        )

        def allow() -> None:
            self._store.marks(resolved.name).check_there(resolved.name, resolved.version)

        self._store.mark(resolved.name, mark, allow)
        return mark

    def delete(self, ref: str | AdapterRef, *, reason: str = "", actor: str = "") -> Mark:
        """Delete a version: its number is never used again, and a ref to it says when and why.

        Its files stay until ``gc``, for whoever is reading them.

        Args:
            ref: a number or a digest; never an alias.
            reason: for the log.
            actor: who; the system's user if empty.

        Raises:
            InvalidRef: the ref goes through an alias.
            AdapterNotFound: no such version.
            Refused: an alias points at it.
        """
        resolved = self.resolve(ref)
        if resolved.alias is not None:
            raise InvalidRef(
                f"'{ref}' goes through alias '{resolved.alias}', which moves; name the version: "
                f"{resolved.name}@{resolved.version}"
            )
        mark = Mark(
            at=utc_now(),
            actor=actor or current_user(),
            kind="delete",
            version=resolved.version,
            reason=reason,
        )
        allow = deletable(self._store, resolved.name, resolved.version)
        self._store.mark(resolved.name, mark, allow)
        return mark

    def gc(self, *, grace_s: float = DEFAULT_GRACE_S, is_dry: bool = False) -> Freed:
        """Remove what no version needs, and nobody can be at work with; see ``gc``.

        Args:
            grace_s: what was written, or deleted, less than so many seconds ago stays.
            is_dry: only say what would be removed.

        Raises:
            CorruptArtifact: it cannot be known what a version needs; nothing is removed.
            StorageError: something cannot be removed.
        """
        return self._store.gc(grace_s=grace_s, is_dry=is_dry)

    def sign(
        self,
        ref: str | AdapterRef,
        key: Path,
        *,
        certificate: Path | None = None,
        chain: Sequence[Path] = (),
        actor: str = "",
    ) -> Resolved:
        """Sign a version: its files, its name, its number, its digest and its base.

        Args:
            ref: the version.
            key: an elliptic private key as PEM, not encrypted.
            certificate: of the key, as PEM.
            chain: the certificates between it and a root, as PEM.
            actor: who signs; the system's user if empty.

        Raises:
            AdapterNotFound: no such version.
            CorruptArtifact: a file is damaged.
            InvalidRequest: the key or a certificate cannot be used.
            MissingDependency: ``lorary[signing]`` is not installed.
        """
        resolved = self.resolve(ref)
        folder = self._store.fetch(resolved.name, self._resolver.pointer(resolved))
        signature = sign_folder(folder, key, certificate=certificate, chain=chain)
        self._store.put_signature(
            resolved.name, resolved.version, signature, actor or current_user()
        )
        return resolved

    def verify_signature(
        self, ref: str | AdapterRef, policy: TrustPolicy, *, accept_older: bool = False
    ) -> tuple[Resolved, str]:
        """Check a version's signature whatever this registry was opened with.

        Args:
            ref: the version.
            policy: whose keys are trusted.
            accept_older: accept that the ref points at an older version than it did before.

        Returns:
            The version, and the trusted file that it was signed by.

        Raises:
            AdapterNotFound: no such version.
            CorruptArtifact: the signature is missing or not right, or the version is older.
        """
        resolved = self.resolve(ref)
        pointer = self._resolver.pointer(resolved)
        folder = self._store.fetch(resolved.name, pointer)
        signature = self._store.signature(resolved.name, resolved.version)
        trust = Trust(policy, self.url)
        key = trust.verify(folder, resolved, pointer, signature, accept_older=accept_older)
        return resolved, key

    def audit(self, name: str) -> builtins.list[AuditEvent]:
        """Return every change of an adapter, oldest first: who, when, what, and why.

        Raises:
            AdapterNotFound: no such adapter.
            CorruptArtifact: the log was tampered with.
        """
        self._resolver.known(name)
        return [*self._store.audit(name)]

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
        check = verify_version(
            self._store, resolved.name, self._resolver.pointer(resolved), progress
        )
        return VerifyReport(checks=(check,))

    def fsck(
        self,
        *,
        repair: bool = False,
        sources: Sequence[Registry] = (),
        grace_s: float = GRACE_S,
        actor: str = "",
        progress: Progress | None = None,
    ) -> FsckReport:
        """Look for everything that can be wrong, and put right what can be.

        Args:
            repair: whether to change anything.
            sources: registries that damaged files may be restored from.
            grace_s: age from which work in progress is taken for a left-over, in seconds.
            actor: who repairs; the system's user if empty.
            progress: told of bytes read.

        Raises:
            StorageError: a folder cannot be read, or with ``repair`` not be written.
        """
        return fsck(
            self._store,
            repair=repair,
            sources=[source._store for source in sources],
            grace_s=grace_s,
            actor=actor or current_user(),
            progress=progress,
        )

    def _check_trust(self, folder: Path, resolved: Resolved, pointer: Pointer) -> None:
        if self._trust.policy.mode != "off":
            signature = self._store.signature(resolved.name, resolved.version)
            self._trust.check(folder, resolved, pointer, signature)

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
        require: Sequence[str] = (),
        force: bool = False,
    ) -> AliasMove:
        move = self._describe_move(alias, version, reason=reason, actor=actor, kind=kind)
        admit = gate(self._store, name, require=require, force=force)
        return self._store.move_alias(name, move, expect=expect, admit=admit)

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
            actor=actor or current_user(),
            alias=alias,
            from_version=None,
            to_version=version,
            reason=reason,
            kind=kind,
            canary=canary,
        )


def _check_movable(alias: str) -> None:
    if check_alias(alias) == LATEST:
        raise InvalidRef(f"alias '{LATEST}' is always the newest version and cannot be moved")
