"""What the Hub says about repositories and files, as its clients expect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lorary.errors import CorruptArtifact
from lorary.registry.localhub.auth import Caller
from lorary.registry.localhub.cards import MAX_CARD_BYTES, read_metadata, tags_of
from lorary.registry.localhub.objects import Commit, Entry, pointer_text
from lorary.registry.localhub.repos import Repo

CARD: Final = "README.md"


def whoami(caller: Caller) -> dict[str, Any]:
    """Answer who has this token."""
    role = "write" if caller.may_write else "read"
    return {
        "type": "user",
        "id": caller.name,
        "name": caller.name,
        "fullname": caller.name,
        "isPro": False,
        "orgs": [],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": caller.name, "role": role},
        },
    }


def model(repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """Describe a repository at a commit; ``blobs`` adds sizes and hashes of files."""
    settings = repo.settings()
    metadata = _metadata(repo, commit)
    return {
        "_id": commit.sha[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": settings.created_at,
        "private": settings.private,
        "gated": settings.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(metadata),
        "library_name": metadata.get("library_name"),
        "pipeline_tag": metadata.get("pipeline_tag"),
        "cardData": metadata or None,
        "siblings": [_sibling(p, e, blobs=blobs) for p, e in sorted(commit.files.items())],
        "spaces": [],
    }


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """List files and folders below ``folder``; ``None`` if there is no such folder."""
    start = f"{folder}/" if folder else ""
    below = {path: entry for path, entry in commit.files.items() if path.startswith(start)}
    if not below and folder:
        return None
    rows: dict[str, dict[str, Any]] = {}
    for path, entry in below.items():
        parts = path.removeprefix(start).split("/")
        folders = [start + "/".join(parts[:i]) for i in range(1, len(parts))]
        for name in folders if recursive else folders[:1]:
            rows[name] = {"type": "directory", "path": name, "oid": commit.sha, "size": 0}
        if recursive or len(parts) == 1:
            rows[path] = file_row(path, entry)
    return [rows[path] for path in sorted(rows)]


def paths_info(commit: Commit, paths: list[str]) -> list[dict[str, Any]]:
    """Describe the files and folders of ``paths`` that exist."""
    rows = []
    for path in paths:
        entry = commit.files.get(path)
        if entry is not None:
            rows.append(file_row(path, entry))
        elif any(known.startswith(f"{path}/") for known in commit.files):
            rows.append({"type": "directory", "path": path, "oid": commit.sha, "size": 0})
    return rows


def file_row(path: str, entry: Entry) -> dict[str, Any]:
    """Describe a file in a tree."""
    row: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.is_lfs:
        row["lfs"] = {
            "oid": entry.sha256,
            "size": entry.size,
            "pointerSize": len(pointer_text(entry.sha256, entry.size)),
        }
    return row


def refs(heads: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, Any]:
    """List branches and tags."""

    def rows(found: Mapping[str, str], start: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": start + name, "targetCommit": sha} for name, sha in found.items()
        ]

    return {
        "branches": rows(heads, "refs/heads/"),
        "tags": rows(tags, "refs/tags/"),
        "converts": [],
        "pullRequests": [],
    }


def commit_row(commit: Commit) -> dict[str, Any]:
    """Describe a commit."""
    return {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author, "avatar": ""}],
        "date": commit.date,
    }


def _sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path}
    if blobs:
        row |= {"size": entry.size, "blobId": entry.oid}
        if entry.is_lfs:
            pointer_size = len(pointer_text(entry.sha256, entry.size))
            row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size}
    return row


def _metadata(repo: Repo, commit: Commit) -> dict[str, Any]:
    """Return a card's metadata; a card that does not parse says nothing."""
    entry = commit.files.get(CARD)
    if entry is None or entry.size > MAX_CARD_BYTES:
        return {}
    try:
        raw = repo.blobs.check(entry.sha256, entry.size).read_bytes()
        return read_metadata(raw.decode())
    except (CorruptArtifact, ValueError):
        return {}
