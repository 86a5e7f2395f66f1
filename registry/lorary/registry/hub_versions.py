"""Versions of a Hub on this machine: fetched by their tag's commit, checked, and kept by their sha256."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Final

from lorary.errors import CorruptArtifact, StorageError
from lorary.home import lorary_home
from lorary.registry.blobs import Progress, Reader, check_file
from lorary.registry.cache_budget import CacheBudget, is_full
from lorary.registry.durable import locked, make_folder, storage_errors, unused_name, write_new
from lorary.registry.folder import MANIFEST_FILE, MAX_JSON_BYTES
from lorary.registry.gc import GC_LOCK
from lorary.registry.hub_client import HubClient
from lorary.registry.hub_repos import HubRepos
from lorary.registry.manifest import FileEntry, Manifest
from lorary.registry.unpacked import VersionFolders
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)

_TITLE: Final = re.compile(r"v([1-9][0-9]*): ")


class HubVersions:
    """The files of versions.

    Args:
        client: of the Hub.
        repos: which repository an adapter has.
        cache_bytes: what was fetched is kept within so many bytes; 0 sets no limit.

    Attributes:
        cache: what is on this machine.

    Raises:
        StorageError: the folder for what is fetched cannot be made.
    """

    def __init__(self, client: HubClient, repos: HubRepos, *, cache_bytes: int) -> None:
        self._client = client
        self._repos = repos
        self.cache = VersionFolders(lorary_home() / "hub")
        self.cache.create()
        self._budget = CacheBudget(self.cache, cache_bytes)

    def manifest(self, name: str, pointer: Pointer) -> Manifest:
        """Return a version's manifest, from this machine or from the Hub."""
        try:
            return self.cache.manifest(pointer)
        except CorruptArtifact:
            _, raw = self._find(name, pointer)
            self._keep_manifest(raw, pointer)
            return self.cache.manifest(pointer)

    def fetch(
        self,
        name: str,
        pointer: Pointer,
        progress: Progress | None = None,
        reader: Reader | None = None,
    ) -> Path:
        """Return a folder with the version's files, fetched if they are not here, whole and checked."""
        if not self.cache.has(pointer):
            self._budget.admit(self._size(name, pointer))
        try:
            folder = self._fetch(name, pointer, progress, reader)
        except StorageError as error:
            # A full disk: what was not used for long makes way, once.
            if not is_full(error) or not self._budget.free(self._size(name, pointer)):
                raise
            folder = self._fetch(name, pointer, progress, reader)
        self._budget.used(folder)
        return folder

    def _fetch(
        self, name: str, pointer: Pointer, progress: Progress | None, reader: Reader | None
    ) -> Path:
        with self._budget.reading():
            if self.cache.has(pointer):
                try:
                    return self.cache.fetch(pointer, progress, reader)
                except CorruptArtifact as error:
                    logger.warning("fetching %s@%d again: %s", name, pointer.version, error)
                    self.cache.drop(pointer)
            self._download(name, pointer, progress or _nobody)
            return self.cache.fetch(pointer, reader=reader)

    def _size(self, name: str, pointer: Pointer) -> int:
        return sum(entry.size for entry in self.manifest(name, pointer).files)

    def locate(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Path:
        """Return a folder with the version's files, fetched if they are not here, not checked."""
        if not self.cache.has(pointer):
            self._download(name, pointer, progress or _nobody)
        return self.cache.locate(pointer)

    def check(self, name: str, pointer: Pointer, progress: Progress | None = None) -> Manifest:
        """Fetch every file anew and compare it; return the manifest."""
        repo_id = self._repos.repo(name)
        commit, raw = self._find(name, pointer)
        manifest = Manifest.from_json(raw)
        with self.cache.staging() as folder:
            for entry in manifest.files:
                path = self._client.download(
                    repo_id, entry.path, commit, folder, progress or _nobody
                )
                check_file(path, entry.sha256, entry.size)
        return manifest

    def keep(self, staged: Path, manifest: Manifest, pointer: Pointer) -> None:
        """Keep what was just pushed, so that this machine need not fetch it; a full disk is no error."""
        try:
            with locked(self.cache.root / GC_LOCK, shared=True), self._budget.reading():
                for entry in manifest.files:
                    self.cache.blobs.put(staged / entry.path, entry.sha256)
                self.cache.blobs.put(staged / MANIFEST_FILE, pointer.manifest_sha256)
                self.cache.unpack(pointer)
        except StorageError as error:
            logger.warning("the push is done, but %s is not kept here: %s", pointer.digest, error)

    def _download(self, name: str, pointer: Pointer, told: Progress) -> None:
        repo_id = self._repos.repo(name)
        commit, raw = self._find(name, pointer)
        manifest = Manifest.from_json(raw)
        # The folder's name is the content's, so that a fetch goes on where a killed one stopped.
        folder = self.cache.root / "tmp" / f"fetch-{pointer.manifest_sha256}"
        with (
            locked(self.cache.root / "tmp" / f"{folder.name}.lock"),
            locked(self.cache.root / GC_LOCK, shared=True),
        ):
            if self.cache.has(pointer):
                return
            self._keep_manifest(raw, pointer)
            with storage_errors(f"write to {folder}"):
                make_folder(folder)
            for entry in manifest.files:
                self._fetch_file(repo_id, commit, entry, folder, told)
            self.cache.unpack(pointer)
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch_file(
        self, repo_id: str, commit: str, entry: FileEntry, folder: Path, told: Progress
    ) -> None:
        blobs = self.cache.blobs
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
        staged = unused_name(self.cache.root / "tmp", "manifest")
        with storage_errors("store a manifest"):
            write_new(staged, raw)
            self.cache.blobs.put(staged, pointer.manifest_sha256)
            staged.unlink(missing_ok=True)

    def _find(self, name: str, pointer: Pointer) -> tuple[str, bytes]:
        """Return the commit that holds a version, and its manifest's bytes.

        That is the tag's; a tag that is missing or was moved is made up for by the history.

        Raises:
            CorruptArtifact: no commit holds it as it was pushed.
        """
        repo_id = self._repos.repo(name)
        tagged = self._client.head(repo_id, f"v{pointer.version}")
        found = self._holding(repo_id, [tagged] if tagged else [], pointer)
        if found is None:
            commits = self.commits_by_version(repo_id).get(pointer.version, [])
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

    def commits_by_version(self, repo_id: str) -> dict[int, list[str]]:
        """Return the commits whose titles are those of a push, newest first."""
        found: dict[int, list[str]] = {}
        for commit, title in self._client.titles(repo_id):
            match = _TITLE.match(title)
            if match is not None:
                found.setdefault(int(match[1]), []).append(commit)
        return found


def _nobody(_: int) -> None:
    """Be told of progress and do nothing."""
