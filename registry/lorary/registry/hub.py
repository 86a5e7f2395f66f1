"""A registry on a Hub: one model repository per adapter.

=====================  ==================================================================
adapter                repository ``owner/name``, or ``owner/prefix-name``
version                one commit with the adapter's PEFT files at its root, ``manifest.json`` and a
                       model card; tagged ``v3``
number, alias          a line in a log at the head (``hub_state``)
somebody was first     the commit's parent is no longer the head: the Hub refuses it, and we read
                       again and retry, within a bound
=====================  ==================================================================

What was fetched is kept under ``$LORARY_HOME/hub`` by its sha256 (``unpacked``): it is checked before every
use, may be deleted at any time, and serves versions while the Hub is away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeVar

from lorary.errors import (
    AlreadyExists,
    Conflict,
    CorruptArtifact,
    RegistryUnavailable,
)
from lorary.registry.aliases import Admit, AliasMove, Unset, compared
from lorary.registry.audit import AuditEvent
from lorary.registry.blobs import Progress, Reader
from lorary.registry.durable import storage_errors, write_new
from lorary.registry.folder import MANIFEST_FILE, MAX_JSON_BYTES, README_FILE
from lorary.registry.hub_audit import hub_audit
from lorary.registry.hub_card import empty_card, write_card
from lorary.registry.hub_client import HubClient
from lorary.registry.hub_errors import StaleHead
from lorary.registry.hub_gc import collect
from lorary.registry.hub_repos import HubRepos
from lorary.registry.hub_state import STATE_FOLDER, HubState, appended
from lorary.registry.hub_versions import HubVersions
from lorary.registry.local import utc_now
from lorary.registry.manifest import FileEntry, Manifest
from lorary.registry.marks import Mark, Marks
from lorary.registry.results import Freed
from lorary.registry.signing import MAX_SIGNATURE_BYTES
from lorary.registry.splits import Split, is_change
from lorary.registry.summaries import Summary, read_summaries
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)

RACE_S: Final = 60.0
"""How long a change is retried while others come first."""
_OURS_TO_REPLACE: Final = frozenset({".gitattributes", README_FILE})

T = TypeVar("T")


class HubStore:
    """Versions, aliases and files on a Hub. Thread-safe.

    Args:
        address: ``hf://owner`` or ``hf://owner/prefix``.
        watch: answer from memory, and renew it in the background every ``RENEW_S`` seconds.
        cache_bytes: what was fetched is kept within so many bytes; 0 sets no limit.

    Raises:
        ConfigError: the address is written otherwise.
        StorageError: the folder for what is fetched cannot be made.
    """

    def __init__(self, address: str, *, watch: bool = False, cache_bytes: int = 0) -> None:
        self._client = HubClient()
        self._repos = HubRepos(self._client, address, watch=watch)
        self._versions = HubVersions(self._client, self._repos, cache_bytes=cache_bytes)

    @property
    def url(self) -> str:
        """The store's address."""
        return self._repos.url

    def close(self) -> None:
        """Stop watching."""
        self._repos.close()

    # -- reading ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return all adapters that have a version."""
        return self._repos.names()

    def newest(self, name: str) -> int:
        """Return the newest version's number."""
        return self._repos.state(name).newest

    def pointer(self, name: str, version: int) -> Pointer | None:
        """Return a version's pointer."""
        return self._repos.state(name).pointer(version)

    def pointers(self, name: str) -> Iterator[Pointer]:
        """Yield the pointers that can be read."""
        return self._repos.state(name).readable()

    def summaries(self, name: str) -> Iterator[tuple[Pointer, Summary]]:
        """Yield what lists show of every version."""
        return read_summaries(self, name, self.pointers(name))

    def alias_state(self, name: str) -> Mapping[str, int]:
        """Return where every alias points."""
        return self._repos.state(name).alias_state()

    def alias_splits(self, name: str) -> Mapping[str, Split]:
        """Return the canaries that run."""
        return self._repos.state(name).alias_splits()

    def trouble(self) -> str:
        """Say what the watch met last, if the Hub was away."""
        return self._repos.trouble

    def alias_moves(self, name: str) -> tuple[AliasMove, ...]:
        """Return all moves."""
        return self._repos.state(name).alias_moves()

    def marks(self, name: str) -> Marks:
        """Return all marks."""
        return self._repos.state(name).marks()

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, from this machine or from the Hub."""
        return self._versions.manifest(name, pointer)

    def fetch(
        self,
        name: str,
        pointer: Pointer,
        progress: Progress | None = None,
        reader: Reader | None = None,
    ) -> Path:
        """Return a folder with the version's files, fetched if they are not here, whole and checked."""
        return self._versions.fetch(name, pointer, progress, reader)

    def locate(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with the version's files, fetched if they are not here, not checked."""
        return self._versions.locate(name, pointer, progress)

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Fetch every file anew and compare it; return the manifest."""
        return self._versions.check(name, pointer, progress)

    # -- changing -----------------------------------------------------------------------------

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder beside what was fetched, removed at the end."""
        return self._versions.cache.staging()

    def signature(self, name: str, version: int) -> bytes | None:
        """Return a version's signature, read at the head."""
        head = self._repos.state(name).head
        if not head:
            return None
        path = f"{STATE_FOLDER}/signatures/v{version}.json"
        return self._client.read(self._repos.repo(name), path, head, MAX_SIGNATURE_BYTES)

    def put_signature(self, name: str, version: int, signature: bytes, actor: str) -> None:
        """Keep a version's signature at the head, in a commit of its own."""
        repo_id = self._repos.repo(name)

        def attempt() -> None:
            state = self._repos.renew(name)
            path = f"{STATE_FOLDER}/signatures/v{version}.json"
            commit = self._client.commit(
                repo_id,
                parent=state.head,
                title=f"sign v{version}: {actor}",
                add={path: signature, **appended(state)},
            )
            self._repos.renew(name, commit)

        self._retried(name, attempt)

    def audit(self, name: str) -> tuple[AuditEvent, ...]:
        """Return every change; the history of commits is the log, and tells who pushed."""
        state = self._repos.renew(name)
        if not state.head:
            return ()
        history = self._client.history(self._repos.repo(name))
        return hub_audit(state.readable(), state.alias_moves(), state.marks().entries, history)

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
        """Make the files of ``staged`` a version, unless one has the same content already."""
        repo_id = self._repos.repo(name)

        def attempt() -> Pointer:
            state = self._ready_for(name, repo_id)
            deleted = state.marks().deleted
            for pointer in reversed(list(state.readable())):
                is_it = pointer.digest == draft.digest and pointer.version not in deleted
                if is_it and self._is_whole(name, pointer):
                    self._tag_all(repo_id, state)
                    return pointer
            manifest, pointer = self._describe(
                staged, draft, repo_id, state.newest + 1, created_at or utc_now()
            )
            paths = {entry.path for entry in manifest.files} | {MANIFEST_FILE}
            commit = self._client.commit(
                repo_id,
                parent=state.head,
                title=f"v{pointer.version}: {draft.description or draft.digest[:19]}",
                add={
                    **{path: staged / path for path in sorted(paths)},
                    **appended(state, version=pointer.to_json()),
                },
                delete=self._others(repo_id, state, paths),
                told=progress,
            )
            self._client.tag(repo_id, f"v{pointer.version}", commit)
            self._tag_all(repo_id, self._repos.renew(name, commit))
            self._versions.keep(staged, manifest, pointer)
            return pointer

        return self._retried(name, attempt)

    def move_alias(
        self,
        name: str,
        move: AliasMove,
        *,
        expect: int | Unset | None,
        expect_serial: int | None = None,
        admit: Admit | None = None,
    ) -> AliasMove:
        """Append a move to the log in a commit of its own."""
        repo_id = self._repos.repo(name)

        def attempt() -> AliasMove:
            state = self._repos.renew(name)
            done = compared(move, state.alias_state(), expect)
            if admit is not None:
                done = admit(done)
            if is_change(done, state.alias_splits(), expect_serial):
                target = "removed" if done.to_version is None else f"to v{done.to_version}"
                if done.from_version == done.to_version:
                    target = f"with {done.canary}" if done.canary else "without canary"
                commit = self._client.commit(
                    repo_id,
                    parent=state.head,
                    title=f"alias {done.alias} {target}",
                    add=appended(state, move=done.to_json()),
                )
                self._repos.renew(name, commit)
            return done

        return self._retried(name, attempt)

    def mark(self, name: str, mark: Mark, allow: Callable[[], None] | None = None) -> None:
        """Append a mark to the log in a commit of its own; a deleted version's files leave the head."""
        repo_id = self._repos.repo(name)

        def attempt() -> None:
            state = self._repos.renew(name)
            state.marks()
            if allow is not None:
                allow()
            files: dict[str, Path | bytes] = {**appended(state, mark=mark.to_json())}
            removed: list[str] = []
            if mark.kind == "delete":
                shown = self._shown_instead(name, repo_id, state, mark)
                if shown is not None:
                    removed = self._others(repo_id, state, shown)
                    files |= shown
            subject = f"alias {mark.alias}" if mark.version is None else f"v{mark.version}"
            commit = self._client.commit(
                repo_id,
                parent=state.head,
                title=f"{mark.kind} {subject}",
                add=files,
                delete=removed,
            )
            if mark.kind == "delete":
                self._client.untag(repo_id, f"v{mark.version}")
            self._repos.renew(name, commit)

        self._retried(name, attempt)

    def reserve(self, name: str, pointer: Pointer, mark: Mark) -> None:
        """Take the next number for a version that is deleted, in a commit of its own."""
        repo_id = self._repos.repo(name)

        def attempt() -> None:
            state = self._ready_for(name, repo_id)
            if pointer.version != state.newest + 1:
                raise Conflict(
                    f"version {state.newest + 1} of '{name}' is the next, not {pointer.version}"
                )
            lines = appended(state, version=pointer.to_json(), mark=mark.to_json())
            card = {} if state.newest else {README_FILE: empty_card(name)}
            commit = self._client.commit(
                repo_id,
                parent=state.head,
                title=f"reserve v{pointer.version}",
                add={**lines, **card},
            )
            self._repos.renew(name, commit)

        self._retried(name, attempt)

    def gc(self, *, grace_s: float, is_dry: bool) -> Freed:
        """Remove what was fetched of deleted versions, and left-overs, from this machine."""
        gone = {
            name: [p for p in self.pointers(name) if p.version in self.marks(name).deleted]
            for name in self.names()
        }
        repos = {self._repos.repo(name): pointers for name, pointers in gone.items() if pointers}
        return collect(self._versions.cache, repos, grace_s=grace_s, is_dry=is_dry)

    def _shown_instead(
        self, name: str, repo_id: str, state: HubState, mark: Mark
    ) -> dict[str, Path | bytes] | None:
        """Return the files to be at the head once a version is gone; ``None`` to leave it as it is."""
        raw = self._client.read(repo_id, MANIFEST_FILE, state.head, MAX_JSON_BYTES)
        if raw is None or Manifest.from_json(raw).version != mark.version:
            return None
        deleted = {*state.marks().deleted, mark.version}
        for pointer in reversed(list(state.readable())):
            if pointer.version not in deleted:
                folder = self.fetch(name, pointer)
                entries = self._versions.cache.manifest(pointer).files
                paths = [*(entry.path for entry in entries), MANIFEST_FILE]
                return {path: folder / path for path in paths}
        return {README_FILE: empty_card(name)}

    def _others(self, repo_id: str, state: HubState, kept: Collection[str]) -> list[str]:
        """Return the files at the head that are neither the registry's own nor among ``kept``."""
        return [
            path
            for path in self._client.files(repo_id, state.head)
            if path not in kept
            and path != ".gitattributes"
            and not path.startswith(f"{STATE_FOLDER}/")
        ]

    def _retried(self, name: str, attempt: Callable[[], T]) -> T:
        deadline = time.monotonic() + RACE_S
        wait_s = 0.05
        while True:
            try:
                return attempt()
            except StaleHead:
                if time.monotonic() > deadline:
                    raise Conflict(
                        f"others have been changing '{name}' for {RACE_S:g} s without a pause; "
                        "nothing was changed, try again"
                    ) from None
            # As in every race on a network: whoever lost waits a random while, longer each time.
            time.sleep(random.uniform(0, wait_s))
            wait_s = min(wait_s * 2, 2.0)

    def _ready_for(self, name: str, repo_id: str) -> HubState:
        """Return the newest state of a repository that may take a version; it is made if need be."""
        state = self._repos.renew(name)
        if not state.head:
            self._client.create(repo_id)
            state = self._repos.renew(name)
            if not state.head:
                raise RegistryUnavailable(
                    f"{repo_id} was created, but has no commit yet; try again"
                )
        if not state.raw_versions:
            others = sorted(set(self._client.files(repo_id, state.head)) - _OURS_TO_REPLACE)
            if others:
                raise AlreadyExists(
                    f"{repo_id} has files ({others[0]}, …) that no registry put there; choose another "
                    "name, or another prefix: hf://owner/prefix"
                )
        return state

    def _describe(
        self, staged: Path, draft: Manifest, repo_id: str, version: int, created_at: str
    ) -> tuple[Manifest, Pointer]:
        """Write card and manifest of a version into ``staged``."""
        numbered = dataclasses.replace(draft, version=version)
        own = staged / "README.own"
        with storage_errors(f"write to {staged}"):
            if (staged / README_FILE).exists() and not own.exists():
                (staged / README_FILE).rename(own)  # a retry makes the card of the original again
            if own.exists():
                shutil.copyfile(own, staged / README_FILE)
            card = write_card(staged, numbered, repo_id)
            (staged / README_FILE).unlink(missing_ok=True)
            write_new(staged / README_FILE, card)
            entry = FileEntry(
                path=README_FILE, size=len(card), sha256=hashlib.sha256(card).hexdigest()
            )
            others = [e for e in draft.files if e.path != README_FILE]
            files = tuple(sorted((*others, entry), key=lambda e: e.path))
            manifest = dataclasses.replace(numbered, files=files)
            raw = manifest.to_json().encode()
            (staged / MANIFEST_FILE).unlink(missing_ok=True)
            write_new(staged / MANIFEST_FILE, raw)
        pointer = Pointer(
            version=version,
            digest=draft.digest,
            manifest_sha256=hashlib.sha256(raw).hexdigest(),
            manifest_size=len(raw),
            created_at=created_at,
        )
        return manifest, pointer

    def _tag_all(self, repo_id: str, state: HubState) -> None:
        """Tag versions whose pusher died before it could, and untag deleted ones likewise."""
        tags = self._client.tags(repo_id)
        deleted = state.marks().deleted
        for version in deleted:
            if f"v{version}" in tags:
                self._client.untag(repo_id, f"v{version}")
        missing = [
            p.version
            for p in state.readable()
            if f"v{p.version}" not in tags and p.version not in deleted
        ]
        if not missing:
            return
        by_version = self._versions.commits_by_version(repo_id)
        for version in missing:
            for commit in by_version.get(version, ())[:1]:
                self._client.tag(repo_id, f"v{version}", commit)

    def untagged(self, name: str) -> list[int]:
        """Return the versions whose pusher died before it could tag them."""
        state, tags = self._repos.renew(name), self._client.tags(self._repos.repo(name))
        deleted = state.marks().deleted
        return [
            p.version
            for p in state.readable()
            if f"v{p.version}" not in tags and p.version not in deleted
        ]

    def tag_missing(self, name: str) -> None:
        """Tag the versions that have no tag."""
        self._tag_all(self._repos.repo(name), self._repos.renew(name))

    def _is_whole(self, name: str, pointer: Pointer) -> bool:
        """Tell whether a version's manifest can still be read."""
        try:
            self.manifest(name, pointer)
        except CorruptArtifact as error:
            logger.warning("%s@%d cannot be restored: %s", name, pointer.version, error)
            return False
        return True
