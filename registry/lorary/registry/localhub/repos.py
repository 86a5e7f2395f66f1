"""Repositories in a folder: files, commits, branches and tags, safe between processes.

::

    <root>/
      hub.json                    {"format_version": 1, "kind": "lorary-hub"}
      repos/<owner>%2F<name>/
        settings.json             {"private": true, "gated": false, "created_at": …}
        objects/sha256/5e/5e1f…   every file's bytes (blobs)
        commits/<sha>.json        written once: parent, texts, and the entry of every file
        refs/heads/main           a branch: a file that holds a commit's name, replaced in one step
        refs/tags/v3              a tag: the same, created once
        lock                      held while a reference moves
      tmp/                        work in progress

Bytes come first, then the commit, then the branch: a process that dies anywhere has changed nothing that
is seen. A repository has its own bytes, so that knowing a hash gives nobody another's file, and deleting a
repository frees its space.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from lorary.errors import ConfigError
from lorary.registry.blobs import Blobs
from lorary.registry.durable import (
    link_new,
    locked,
    make_folder,
    replace,
    storage_errors,
    sync_folder,
    unused_name,
    write_new,
)
from lorary.registry.localhub.objects import (
    SHA1,
    Commit,
    Entry,
    check_ref,
    check_repo_id,
    new_commit,
    read_commit,
    small_entry,
)
from lorary.registry.localhub.problems import HubProblem
from lorary.registry.strict_json import parse_json, show

MAIN: Final = "main"
LEFT_AFTER_S: Final = 86_400
"""Seconds after which an upload under way counts as interrupted."""
_MARKER: Final = "hub.json"
_MARKER_CONTENT: Final = b'{"format_version": 1, "kind": "lorary-hub"}\n'
_ATTRIBUTES: Final = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_STALE: Final = "A commit has happened since. Please refresh and try again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Who may see a repository.

    Attributes:
        private: only callers with a token.
        gated: ``"auto"`` or ``"manual"``: files only for those who may write; ``False``: not gated.
        created_at: UTC.
    """

    private: bool
    gated: str | bool
    created_at: str


class Repo:
    """One repository."""

    def __init__(self, repo_id: str, folder: Path, tmp: Path) -> None:
        self.id = repo_id
        self.blobs = Blobs(folder / "objects")
        self.tmp = tmp
        self.folder = folder

    def settings(self) -> Settings:
        """Return who may see it."""
        return Settings(**_read_json(self.folder / "settings.json"))

    def change_settings(self, **changes: Any) -> None:
        """Change who may see it."""
        with locked(self.folder / "lock"), storage_errors(f"write settings of {self.id}"):
            found = _read_json(self.folder / "settings.json") | changes
            staged = unused_name(self.tmp, "settings")
            write_new(staged, json.dumps(found).encode())
            replace(staged, self.folder / "settings.json")

    def head(self, branch: str = MAIN) -> str:
        """Return the newest commit's name.

        Raises:
            HubProblem: 404: no such branch.
        """
        return self._required(self._ref("heads", branch), branch)

    def refs(self, kind: str) -> dict[str, str]:
        """Return all ``heads`` or ``tags`` with the commits they point at."""
        folder = self.folder / "refs" / kind
        found = {unquote(entry.name): _read_ref(Path(entry.path)) for entry in os.scandir(folder)}
        return {name: sha for name, sha in sorted(found.items()) if sha is not None}

    def find(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or a commit's name means.

        Raises:
            HubProblem: 404: nothing is called so.
        """
        for start, kind in (("refs/heads/", "heads"), ("refs/tags/", "tags")):
            if revision.startswith(start):
                name = revision.removeprefix(start)
                return self.commit_of(self._required(self._ref(kind, name), revision))
        if SHA1.fullmatch(revision):
            return self.commit_of(revision)
        for kind in ("heads", "tags"):
            sha = _read_ref(self._ref(kind, revision))
            if sha is not None:
                return self.commit_of(sha)
        raise _no_revision(revision)

    def commit_of(self, sha: str) -> Commit:
        """Return a commit by its name.

        Raises:
            HubProblem: 404: there is none.
        """
        return _load_commit(self.folder / "commits" / f"{sha}.json", sha)

    def history(self, commit: Commit) -> list[Commit]:
        """Return a commit and its ancestors, newest first."""
        found = [commit]
        while (parent := found[-1].parent) is not None:
            found.append(self.commit_of(parent))
        return found

    def commit(
        self,
        branch: str,
        changes: Mapping[str, Entry | None],
        *,
        parent: str | None,
        title: str,
        message: str,
        author: str,
    ) -> Commit:
        """Change files in one step; their bytes are there already.

        Args:
            branch: which moves.
            changes: path to its new entry; ``None`` deletes a file, or a folder when the path ends in '/'.
            parent: what the head must be, in full or its beginning; ``None`` takes any.
            title: first line.
            message: the rest.
            author: who.

        Raises:
            HubProblem: 412 when the head is another, 404 when a file to be deleted does not exist.
        """
        with locked(self.folder / "lock"), storage_errors(f"commit to {self.id}"):
            head = self.commit_of(self.head(branch))
            if parent is not None and not head.sha.startswith(parent.lower()):
                raise HubProblem(412, _STALE)
            made = new_commit(
                parent=head.sha,
                title=title,
                message=message,
                author=author,
                date=utc_now_ms(),
                files=_changed(head.files, changes),
            )
            self._write_commit(made)
            self._point(self._ref("heads", branch), made.sha)
        return made

    def add_ref(self, kind: str, name: str, revision: str) -> None:
        """Create a branch or tag.

        Raises:
            HubProblem: 409: the name is taken; 404: no such revision; 400: it cannot be a name.
        """
        sha = self.find(revision).sha
        target = self._ref(kind, check_ref(name))
        with locked(self.folder / "lock"), storage_errors(f"create {kind} {name}"):
            staged = unused_name(self.tmp, "ref")
            write_new(staged, f"{sha}\n".encode())
            is_new = link_new(staged, target)
            staged.unlink()
        if not is_new:
            raise HubProblem(409, f"Reference {name} already exists")

    def delete_ref(self, kind: str, name: str) -> None:
        """Delete a branch or tag.

        Raises:
            HubProblem: 404: there is none; 403: it is the main branch.
        """
        if (kind, name) == ("heads", MAIN):
            raise HubProblem(403, "The main branch cannot be deleted")
        target = self._ref(kind, name)
        with locked(self.folder / "lock"), storage_errors(f"delete {kind} {name}"):
            self._required(target, name)
            target.unlink()
            sync_folder(target.parent)

    def start(self, *, private: bool) -> None:
        """Fill a new repository's folder with its first commit."""
        for folder in ("objects", "commits", "refs/heads", "refs/tags"):
            make_folder(self.folder / folder)
        settings = {"private": private, "gated": False, "created_at": utc_now_ms()}
        write_new(self.folder / "settings.json", json.dumps(settings).encode())
        attributes = self.keep(_ATTRIBUTES)
        first = new_commit(
            parent=None,
            title="initial commit",
            message=os.urandom(8).hex(),
            author="lorary",
            date=utc_now_ms(),
            files={".gitattributes": attributes},
        )
        self._write_commit(first)
        self._point(self._ref("heads", MAIN), first.sha)

    def keep(self, content: bytes) -> Entry:
        """Keep a small file's bytes and return its entry."""
        entry = small_entry(content)
        staged = unused_name(self.tmp, "small")
        with storage_errors(f"store a file of {self.id}"):
            write_new(staged, content)
            self.blobs.put(staged, entry.sha256)
            staged.unlink(missing_ok=True)
        return entry

    def _ref(self, kind: str, name: str) -> Path:
        return self.folder / "refs" / kind / quote(name, safe="")[:250]

    def _required(self, ref: Path, name: str) -> str:
        sha = _read_ref(ref)
        if sha is None:
            raise _no_revision(name)
        return sha

    def _write_commit(self, commit: Commit) -> None:
        staged = unused_name(self.tmp, "commit")
        write_new(staged, commit.to_json())
        replace(staged, self.folder / "commits" / f"{commit.sha}.json")

    def _point(self, ref: Path, sha: str) -> None:
        staged = unused_name(self.tmp, "ref")
        write_new(staged, f"{sha}\n".encode())
        replace(staged, ref)


class Repos:
    """All repositories under one folder.

    Args:
        root: an empty folder, one that does not exist, or one that was made so.

    Raises:
        ConfigError: the folder holds something else.
        StorageError: it cannot be read or made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.tmp = self.root / "tmp"
        self._open()

    def sweep(self) -> None:
        """Remove what interrupted uploads left; what is younger than a day may still be under way."""
        before = time.time() - LEFT_AFTER_S
        with storage_errors(f"clear {self.tmp}"):
            for entry in os.scandir(self.tmp):
                if entry.stat(follow_symlinks=False).st_mtime >= before:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink(missing_ok=True)

    def get(self, owner: str, name: str) -> Repo | None:
        """Return a repository, ``None`` if there is none."""
        repo_id = check_repo_id(owner, name)
        folder = self._folder(repo_id)
        return Repo(repo_id, folder, self.tmp) if folder.is_dir() else None

    def ids(self) -> list[str]:
        """Return the names of all repositories."""
        with storage_errors(f"list {self.root}"):
            return sorted(unquote(entry.name) for entry in os.scandir(self.root / "repos"))

    def create(self, owner: str, name: str, *, private: bool) -> bool:
        """Create a repository with its first commit; tell whether it is new."""
        repo_id = check_repo_id(owner, name)
        staged = unused_name(self.tmp, "repo")
        with storage_errors(f"create repository {repo_id}"):
            staged.mkdir()
            Repo(repo_id, staged, self.tmp).start(private=private)
            try:
                staged.rename(self._folder(repo_id))
            except OSError as error:
                shutil.rmtree(staged)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return False
            sync_folder(self.root / "repos")
        return True

    def delete(self, repo: Repo) -> None:
        """Delete a repository and its bytes."""
        gone = unused_name(self.tmp, "deleted")
        with storage_errors(f"delete repository {repo.id}"):
            self._folder(repo.id).rename(gone)
            sync_folder(self.root / "repos")
        shutil.rmtree(gone, ignore_errors=True)

    def move(self, repo: Repo, owner: str, name: str) -> bool:
        """Rename a repository; tell whether the new name was free."""
        target = self._folder(check_repo_id(owner, name))
        with storage_errors(f"rename repository {repo.id}"):
            try:
                self._folder(repo.id).rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return False
            sync_folder(target.parent)
        return True

    def _folder(self, repo_id: str) -> Path:
        return self.root / "repos" / quote(repo_id, safe="")

    def _open(self) -> None:
        with storage_errors(f"open hub {self.root}"):
            make_folder(self.root)
            found = {entry.name for entry in self.root.iterdir()}
            if _MARKER not in found and found - {"repos", "tmp"}:
                raise ConfigError(
                    f"{self.root} is not a hub: it has files, but no {_MARKER}. Name an empty folder."
                )
            for folder in ("repos", "tmp"):
                make_folder(self.root / folder)
            marker = self.root / _MARKER
            if not marker.exists():
                staged = unused_name(self.tmp, "marker")
                write_new(staged, _MARKER_CONTENT)
                link_new(staged, marker)
                staged.unlink()
            if _read_json(marker) != json.loads(_MARKER_CONTENT):
                raise ConfigError(f"{marker} is of another version; upgrade lorary")


def utc_now_ms() -> str:
    """Return the time as the Hub writes it: ``2026-11-22T10:00:00.000Z``."""
    now = datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"


def _changed(files: Mapping[str, Entry], changes: Mapping[str, Entry | None]) -> dict[str, Entry]:
    result = dict(files)
    for path, entry in changes.items():
        if entry is not None:
            result[path] = entry
            continue
        gone = [p for p in result if p == path or (path.endswith("/") and p.startswith(path))]
        if not gone:
            raise HubProblem(
                404, f"A file with this name doesn't exist: {show(path)}", code="EntryNotFound"
            )
        for found in gone:
            del result[found]
    folders = {path[:i] for path in result for i, c in enumerate(path) if c == "/"}
    both = sorted(folders & result.keys())
    if both:
        raise HubProblem(400, f"{show(both[0])} would be a file and a folder")
    return result


def _load_commit(path: Path, sha: str) -> Commit:
    with storage_errors(f"read commit {sha}"):
        try:
            return read_commit(path.read_bytes(), sha)
        except FileNotFoundError:
            raise _no_revision(sha) from None


def _read_ref(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    with storage_errors(f"read {path}"):
        return parse_json(path.read_bytes(), str(path))


def _no_revision(revision: str) -> HubProblem:
    return HubProblem(404, f"Invalid rev id: {show(revision)}", code="RevisionNotFound")
