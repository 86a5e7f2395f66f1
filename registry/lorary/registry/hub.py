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
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeVar

from lorary.errors import (
    AlreadyExists,
    Conflict,
    CorruptArtifact,
    InvalidRef,
    LoraryError,
    RegistryUnavailable,
    StorageError,
)
from lorary.registry.address import hub_owner
from lorary.registry.aliases import Admit, AliasMove, Unset, compared
from lorary.registry.audit import AuditEvent
from lorary.registry.blobs import Progress, check_file
from lorary.registry.cache_budget import CacheBudget, is_full
from lorary.registry.durable import locked, make_folder, storage_errors, unused_name, write_new
from lorary.registry.folder import MANIFEST_FILE, MAX_JSON_BYTES, README_FILE
from lorary.registry.gc import GC_LOCK
from lorary.registry.hub_audit import hub_audit
from lorary.registry.hub_card import TAG, empty_card, write_card
from lorary.registry.hub_client import HubClient
from lorary.registry.hub_errors import StaleHead
from lorary.registry.hub_gc import collect
from lorary.registry.hub_state import NOTHING, STATE_FOLDER, HubState, appended, read_state
from lorary.registry.local import utc_now
from lorary.registry.manifest import FileEntry, Manifest
from lorary.registry.marks import Mark, Marks
from lorary.registry.refs import check_name
from lorary.registry.results import Freed
from lorary.registry.signing import MAX_SIGNATURE_BYTES
from lorary.registry.splits import Split, is_change
from lorary.registry.summaries import Summary, read_summaries
from lorary.registry.unpacked import VersionFolders
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)

FRESH_S: Final = 1.0
"""How old what is known of a repository may be when somebody asks; changes always read anew."""
RENEW_S: Final = 5.0
"""How often a watching store looks for changes."""
RACE_S: Final = 60.0
"""How long a change is retried while others come first."""
_READERS: Final = 8
_OURS_TO_REPLACE: Final = frozenset({".gitattributes", README_FILE})
_TITLE: Final = re.compile(r"v([1-9][0-9]*): ")

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
        self._owner, self._prefix = hub_owner(address)
        self._client = HubClient()
        self._cache = VersionFolders(_cache_root())
        self._cache.create()
        self._budget = CacheBudget(self._cache, cache_bytes)
        self._states: dict[str, tuple[float, HubState]] = {}
        self._known: frozenset[str] | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._trouble = ""
        self._watches = watch
        if watch:
            threading.Thread(target=self._watch, name="registry-watch", daemon=True).start()

    @property
    def url(self) -> str:
        """The store's address."""
        return f"hf://{self._owner}" + (f"/{self._prefix}" if self._prefix else "")

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    # -- reading ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return all adapters that have a version."""
        if self._watches and self._known is not None:
            return sorted(name for name in self._known if self._state(name).newest)
        heads = self._heads()
        with ThreadPoolExecutor(_READERS) as pool:
            states = list(pool.map(lambda item: self._at(*item), heads.items()))
        return sorted(name for name, state in zip(heads, states, strict=True) if state.newest)

    def newest(self, name: str) -> int:
        """Return the newest version's number."""
        return self._state(name).newest

    def pointer(self, name: str, version: int) -> Pointer | None:
        """Return a version's pointer."""
        return self._state(name).pointer(version)

    def pointers(self, name: str) -> Iterator[Pointer]:
        """Yield the pointers that can be read."""
        return self._state(name).readable()

    def summaries(self, name: str) -> Iterator[tuple[Pointer, Summary]]:
        """Yield what lists show of every version."""
        return read_summaries(self, name, self.pointers(name))

    def alias_state(self, name: str) -> Mapping[str, int]:
        """Return where every alias points."""
        return self._state(name).alias_state()

    def alias_splits(self, name: str) -> Mapping[str, Split]:
        """Return the canaries that run."""
        return self._state(name).alias_splits()

    def trouble(self) -> str:
        """Say what the watch met last, if the Hub was away."""
        return self._trouble

    def alias_moves(self, name: str) -> tuple[AliasMove, ...]:
        """Return all moves."""
        return self._state(name).alias_moves()

    def marks(self, name: str) -> Marks:
        """Return all marks."""
        return self._state(name).marks()

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, from this machine or from the Hub."""
        try:
            return self._cache.manifest(pointer)
        except CorruptArtifact:
            _, raw = self._locate(name, pointer)
            self._keep_manifest(raw, pointer)
            return self._cache.manifest(pointer)

    def fetch(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with the version's files, fetched if they are not here, whole and checked."""
        if not self._cache.has(pointer):
            self._budget.admit(self._size(name, pointer))
        try:
            folder = self._fetch(name, pointer, progress)
        except StorageError as error:
            # A full disk: what was not used for long makes way, once.
            if not is_full(error) or not self._budget.free(self._size(name, pointer)):
                raise
            folder = self._fetch(name, pointer, progress)
        self._budget.used(folder)
        return folder

    def _fetch(self, name: str, pointer: Pointer, progress: Progress | None) -> Path:
        with self._budget.reading():
            if self._cache.has(pointer):
                try:
                    return self._cache.fetch(pointer, progress)
                except CorruptArtifact as error:
                    logger.warning("fetching %s@%d again: %s", name, pointer.version, error)
                    self._cache.drop(pointer)
            self._download(name, pointer, progress or _nobody)
            return self._cache.fetch(pointer)

    def _size(self, name: str, pointer: Pointer) -> int:
        return sum(entry.size for entry in self.manifest(name, pointer).files)

    def locate(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with the version's files, fetched if they are not here, not checked."""
        if not self._cache.has(pointer):
            self._download(name, pointer, progress or _nobody)
        return self._cache.locate(pointer)

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Fetch every file anew and compare it; return the manifest."""
        repo_id = self._repo(name)
        commit, raw = self._locate(name, pointer)
        manifest = Manifest.from_json(raw)
        with self.staging() as folder:
            for entry in manifest.files:
                path = self._client.download(
                    repo_id, entry.path, commit, folder, progress or _nobody
                )
                check_file(path, entry.sha256, entry.size)
        return manifest

    # -- changing -----------------------------------------------------------------------------

    def staging(self) -> AbstractContextManager[Path]:
        """Give an empty folder beside what was fetched, removed at the end."""
        return self._cache.staging()

    def signature(self, name: str, version: int) -> bytes | None:
        """Return a version's signature, read at the head."""
        head = self._state(name).head
        if not head:
            return None
        path = f"{STATE_FOLDER}/signatures/v{version}.json"
        return self._client.read(self._repo(name), path, head, MAX_SIGNATURE_BYTES)

    def put_signature(self, name: str, version: int, signature: bytes, actor: str) -> None:
        """Keep a version's signature at the head, in a commit of its own."""
        repo_id = self._repo(name)

        def attempt() -> None:
            state = self._renew(name)
            path = f"{STATE_FOLDER}/signatures/v{version}.json"
            commit = self._client.commit(
                repo_id,
                parent=state.head,
                title=f"sign v{version}: {actor}",
                add={path: signature, **appended(state)},
            )
            self._renew(name, commit)

        self._retried(name, attempt)

    def audit(self, name: str) -> tuple[AuditEvent, ...]:
        """Return every change; the history of commits is the log, and tells who pushed."""
        state = self._renew(name)
        if not state.head:
            return ()
        history = self._client.history(self._repo(name))
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
        repo_id = self._repo(name)

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
            self._tag_all(repo_id, self._renew(name, commit))
            self._keep(staged, manifest, pointer)
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
        repo_id = self._repo(name)

        def attempt() -> AliasMove:
            state = self._renew(name)
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
                self._renew(name, commit)
            return done

        return self._retried(name, attempt)

    def mark(self, name: str, mark: Mark, allow: Callable[[], None] | None = None) -> None:
        """Append a mark to the log in a commit of its own; a deleted version's files leave the head."""
        repo_id = self._repo(name)

        def attempt() -> None:
            state = self._renew(name)
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
            self._renew(name, commit)

        self._retried(name, attempt)

    def reserve(self, name: str, pointer: Pointer, mark: Mark) -> None:
        """Take the next number for a version that is deleted, in a commit of its own."""
        repo_id = self._repo(name)

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
            self._renew(name, commit)

        self._retried(name, attempt)

    def gc(self, *, grace_s: float, is_dry: bool) -> Freed:
        """Remove what was fetched of deleted versions, and left-overs, from this machine."""
        gone = {
            name: [p for p in self.pointers(name) if p.version in self.marks(name).deleted]
            for name in self.names()
        }
        repos = {self._repo(name): pointers for name, pointers in gone.items() if pointers}
        return collect(self._cache, repos, grace_s=grace_s, is_dry=is_dry)

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
                entries = self._cache.manifest(pointer).files
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
        state = self._renew(name)
        if not state.head:
            self._client.create(repo_id)
            state = self._renew(name)
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

    def _keep(self, staged: Path, manifest: Manifest, pointer: Pointer) -> None:
        """Keep what was just pushed, so that this machine need not fetch it."""
        try:
            with locked(self._cache.root / GC_LOCK, shared=True), self._budget.reading():
                for entry in manifest.files:
                    self._cache.blobs.put(staged / entry.path, entry.sha256)
                self._cache.blobs.put(staged / MANIFEST_FILE, pointer.manifest_sha256)
                self._cache.unpack(pointer)
        except StorageError as error:
            logger.warning("the push is done, but %s is not kept here: %s", pointer.digest, error)

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
        by_version = self._commits_by_version(repo_id)
        for version in missing:
            for commit in by_version.get(version, ())[:1]:
                self._client.tag(repo_id, f"v{version}", commit)

    def untagged(self, name: str) -> list[int]:
        """Return the versions whose pusher died before it could tag them."""
        state, tags = self._renew(name), self._client.tags(self._repo(name))
        deleted = state.marks().deleted
        return [
            p.version
            for p in state.readable()
            if f"v{p.version}" not in tags and p.version not in deleted
        ]

    def tag_missing(self, name: str) -> None:
        """Tag the versions that have no tag."""
        self._tag_all(self._repo(name), self._renew(name))

    def _is_whole(self, name: str, pointer: Pointer) -> bool:
        """Tell whether a version's manifest can still be read."""
        try:
            self.manifest(name, pointer)
        except CorruptArtifact as error:
            logger.warning("%s@%d cannot be restored: %s", name, pointer.version, error)
            return False
        return True

    # -- fetching -----------------------------------------------------------------------------

    def _download(self, name: str, pointer: Pointer, told: Progress) -> None:
        repo_id = self._repo(name)
        commit, raw = self._locate(name, pointer)
        manifest = Manifest.from_json(raw)
        # The folder's name is the content's, so that a fetch goes on where a killed one stopped.
        folder = self._cache.root / "tmp" / f"fetch-{pointer.manifest_sha256}"
        with (
            locked(self._cache.root / "tmp" / f"{folder.name}.lock"),
            locked(self._cache.root / GC_LOCK, shared=True),
        ):
            if self._cache.has(pointer):
                return
            self._keep_manifest(raw, pointer)
            with storage_errors(f"write to {folder}"):
                make_folder(folder)
            for entry in manifest.files:
                self._fetch_file(repo_id, commit, entry, folder, told)
            self._cache.unpack(pointer)
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch_file(
        self, repo_id: str, commit: str, entry: FileEntry, folder: Path, told: Progress
    ) -> None:
        blobs = self._cache.blobs
        if blobs.path(entry.sha256).exists():
            try:
                blobs.check(entry.sha256, entry.size, told)
            except CorruptArtifact:
                blobs.path(entry.sha256).unlink(missing_ok=True)
            else:
                return
        path = self._client.download(repo_id, entry.path, commit, folder, told)
        try:
            check_file(path, entry.sha256, entry.size)
        except CorruptArtifact as error:
            path.unlink(missing_ok=True)
            raise CorruptArtifact(
                f"{entry.path} of {repo_id} is not what its manifest says ({error}); "
                "push the adapter again"
            ) from error
        with storage_errors(f"store {entry.path}"), path.open("rb+") as file:
            os.fsync(file.fileno())
        blobs.put(path, entry.sha256)

    def _keep_manifest(self, raw: bytes, pointer: Pointer) -> None:
        staged = unused_name(self._cache.root / "tmp", "manifest")
        with storage_errors("store a manifest"):
            write_new(staged, raw)
            self._cache.blobs.put(staged, pointer.manifest_sha256)
            staged.unlink(missing_ok=True)

    def _locate(self, name: str, pointer: Pointer) -> tuple[str, bytes]:
        """Return the commit that holds a version, and its manifest's bytes.

        That is the tag's; a tag that is missing or was moved is made up for by the history.

        Raises:
            CorruptArtifact: no commit holds it as it was pushed.
        """
        repo_id = self._repo(name)
        tagged = self._client.head(repo_id, f"v{pointer.version}")
        found = self._holding(repo_id, [tagged] if tagged else [], pointer)
        if found is None:
            commits = self._commits_by_version(repo_id).get(pointer.version, [])
            found = self._holding(repo_id, commits, pointer)
        if found is not None:
            return found
        raise CorruptArtifact(
            f"{repo_id} has no commit that holds version {pointer.version} as it was pushed; its tag "
            "or history was changed. Push the adapter again."
        )

    def _holding(
        self, repo_id: str, commits: list[str], pointer: Pointer
    ) -> tuple[str, bytes] | None:
        for commit in commits:
            raw = self._client.read(repo_id, MANIFEST_FILE, commit, MAX_JSON_BYTES)
            if raw and hashlib.sha256(raw).hexdigest() == pointer.manifest_sha256:
                return commit, raw
        return None

    def _commits_by_version(self, repo_id: str) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for commit, title in self._client.titles(repo_id):
            match = _TITLE.match(title)
            if match is not None:
                found.setdefault(int(match[1]), []).append(commit)
        return found

    # -- what is known of repositories --------------------------------------------------------

    def _state(self, name: str) -> HubState:
        """Return what is known of an adapter, recent enough."""
        check_name(name)
        known = self._states.get(name)
        if self._watches:
            if known is not None:
                return known[1]
            if self._known is not None and name not in self._known:
                return NOTHING
        elif known is not None and time.monotonic() - known[0] < FRESH_S:
            return known[1]
        return self._renew(name)

    def _renew(self, name: str, head: str | None = None) -> HubState:
        """Read what the Hub says now of an adapter; ``head`` if it is known."""
        repo_id = self._repo(name)
        return self._at(name, head or self._client.head(repo_id) or "")

    def _at(self, name: str, head: str) -> HubState:
        known = self._states.get(name)
        if not head:
            with self._lock:
                self._states.pop(name, None)
            return NOTHING
        if known is not None and known[1].head == head:
            state = known[1]
        else:
            state = read_state(self._client, self._repo(name), head)
        if state.newest:
            # Only what exists is remembered: anybody may ask for names that do not.
            with self._lock:
                self._states[name] = (time.monotonic(), state)
        return state

    def _heads(self) -> dict[str, str]:
        """Return the adapters that the Hub lists, with their heads."""
        start = f"{self._owner}/" + (f"{self._prefix}-" if self._prefix else "")
        heads: dict[str, str] = {}
        for repo_id, head in self._client.models(self._owner, TAG).items():
            name = repo_id[len(start) :]
            if repo_id.startswith(start) and _is_name(name):
                heads[name] = head
        return heads

    def _watch(self) -> None:
        """Renew what is in memory until the store is closed; the Hub may be away meanwhile."""
        while not self._stop.is_set():
            try:
                self._look()
            except LoraryError as error:
                if not self._trouble:
                    logger.warning("answering from memory: %s", error)
                self._trouble = str(error)
            else:
                if self._trouble:
                    logger.warning("the hub answers again")
                self._trouble = ""
            self._stop.wait(RENEW_S)

    def _look(self) -> None:
        heads = self._heads()
        with self._lock:
            known = {name: state.head for name, (_, state) in self._states.items()}
        for name, head in known.items():
            if heads.get(name) != head:
                # Lists may lag behind; the repository itself does not.
                self._renew(name)
        self._known = frozenset(heads) | frozenset(self._states)

    def _repo(self, name: str) -> str:
        """Return the repository of an adapter.

        Raises:
            InvalidRef: no repository can have that name.
        """
        if "/" in check_name(name):
            raise InvalidRef(
                f"adapter name '{name}' has a team; on a hub the owner is the team: use registry "
                f"hf://{name.partition('/')[0]} and '{name.partition('/')[2]}'"
            )
        if "--" in name or name.endswith(".git"):
            raise InvalidRef(f"adapter name '{name}' cannot name a repository: '--', '.git'")
        return f"{self._owner}/{f'{self._prefix}-' if self._prefix else ''}{name}"


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidRef:
        return False
    return "/" not in text


def _nobody(_: int) -> None:
    """Be told of progress and do nothing."""


def _cache_root() -> Path:
    home = os.environ.get("LORARY_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "lorary") / "hub"
