"""Files, commits and the names of both, as git and the Hub have them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lorary.registry.localhub.problems import HubProblem
from lorary.registry.strict_json import parse_json, show

_OWNER_OR_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,198}[A-Za-z0-9_])?")
SHA1: Final = re.compile(r"[0-9a-f]{40}")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\\]")
_MAX_PATH_BYTES: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a commit.

    Attributes:
        size: bytes.
        sha256: of its bytes.
        oid: git's name of the blob: of its bytes, or of the LFS pointer to them.
        is_lfs: whether git would hold a pointer.
    """

    size: int
    sha256: str
    oid: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        """What downloaders compare: sha256 of a large file, git's name of a small one."""
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A state of a repository; never changed."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]

    def to_json(self) -> bytes:
        """Return the content of the commit's file, and what its name is the sha1 of."""
        fields = dataclasses.asdict(self)
        del fields["sha"]
        return json.dumps(fields, sort_keys=True).encode()


def new_commit(**fields: Any) -> Commit:
    """Return a commit with its name."""
    unnamed = Commit(sha="", **fields)
    sha = hashlib.sha1(unnamed.to_json(), usedforsecurity=False).hexdigest()
    return dataclasses.replace(unnamed, sha=sha)


def read_commit(raw: bytes, sha: str) -> Commit:
    """Parse a commit's file.

    Raises:
        CorruptArtifact: it is no commit.
    """
    fields = parse_json(raw, f"commit {sha}")
    files = {path: Entry(**entry) for path, entry in fields.pop("files").items()}
    return Commit(sha=sha, files=files, **fields)


def small_entry(content: bytes) -> Entry:
    """Return the entry of a file that travels inside a commit."""
    return Entry(
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        oid=_git_oid(content),
        is_lfs=False,
    )


def large_entry(sha256: str, size: int) -> Entry:
    """Return the entry of a file that was uploaded before its commit."""
    return Entry(size=size, sha256=sha256, oid=_git_oid(pointer_text(sha256, size)), is_lfs=True)


def pointer_text(sha256: str, size: int) -> bytes:
    """Return what git holds instead of a large file."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


def _git_oid(content: bytes) -> str:
    raw = b"blob %d\0" % len(content) + content
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()


def check_repo_id(owner: str, name: str) -> str:
    """Return ``owner/name`` if it can name a repository.

    Raises:
        HubProblem: 400.
    """
    for part in (owner, name):
        if not _OWNER_OR_NAME.fullmatch(part) or "--" in part or ".." in part:
            raise HubProblem(400, f"{show(part)} cannot be (part of) a repository's name")
    if name.endswith(".git"):
        raise HubProblem(400, "a repository's name cannot end in .git")
    return f"{owner}/{name}"


def check_ref(name: str) -> str:
    """Return ``name`` if it can name a branch or a tag.

    Raises:
        HubProblem: 400.
    """
    wrong = ("..", "//", "@{", ".lock", "/.", "./")
    if not _REF.fullmatch(name) or any(part in name for part in wrong) or SHA1.fullmatch(name):
        raise HubProblem(400, f"{show(name)} cannot be the name of a branch or tag")
    return name


def check_path(path: Any) -> str:
    """Return ``path`` if it can be a file's path in a repository.

    Raises:
        HubProblem: 400: it is absolute, leaves the repository, or has control characters.
    """
    if not isinstance(path, str) or len(path.encode(errors="replace")) > _MAX_PATH_BYTES:
        raise HubProblem(400, "a path is not a text, or is too long")
    parts = path.split("/")
    if (
        _CONTROL.search(path)
        or not path.isprintable()
        or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
    ):
        raise HubProblem(400, f"{show(path)} cannot be a path in a repository")
    return path
