"""Take an adapter from any PEFT repository of a Hub, through the same checks as every push."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorary.errors import AdapterNotFound, CorruptArtifact, InvalidRef
from lorary.registry.base import BaseCard
from lorary.registry.blobs import Progress
from lorary.registry.folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    README_FILE,
    TENSORS_FILE,
)
from lorary.registry.hub_client import HubClient
from lorary.registry.manifest import Manifest
from lorary.registry.results import VersionInfo
from lorary.registry.store import Registry

_ID: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<revision>[^\s@]{1,200}))?"
)
_WANTED: Final = (CONFIG_FILE, TENSORS_FILE, README_FILE, MANIFEST_FILE)
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter in a repository, not fetched yet.

    Attributes:
        repo_id: ``owner/repo``.
        commit: the commit that its revision means now.
        files: what is taken.
        left_out: what is not.
    """

    repo_id: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def find(source: str) -> Found:
    """Look at a repository.

    Args:
        source: ``owner/repo``, or ``owner/repo@revision`` with a branch, tag or commit.

    Raises:
        InvalidRef: it is written otherwise.
        AdapterNotFound: there is no such repository or revision, or it holds no PEFT adapter.
        CorruptArtifact: its weights are there as a pickle only.
    """
    match = _ID.fullmatch(source)
    if match is None:
        raise InvalidRef(f"{source!a} is no repository; write owner/repo or owner/repo@revision")
    client = HubClient()
    repo_id, revision = match["repo"], match["revision"]
    commit = client.head(repo_id, revision)
    if commit is None:
        what = f"revision '{revision}' of {repo_id}" if revision else repo_id
        raise AdapterNotFound(f"{client.endpoint} has no {what}, or hides it from this token")
    there = client.files(repo_id, commit)
    pickles = [path for path in _PICKLES if path in there]
    if TENSORS_FILE not in there and pickles:
        raise CorruptArtifact(
            f"{repo_id} has {pickles[0]}, a pickle, which can run code when it is read; ask its owner for "
            f"{TENSORS_FILE}"
        )
    lacking = [path for path in (CONFIG_FILE, TENSORS_FILE) if path not in there]
    if lacking:
        raise AdapterNotFound(f"{repo_id} is no PEFT adapter: it has no {lacking[0]}")
    files = tuple(path for path in _WANTED if path in there)
    return Found(
        repo_id=repo_id,
        commit=commit,
        files=files,
        left_out=tuple(path for path in there if path not in files and path != ".gitattributes"),
    )


def download(found: Found, folder: Path, progress: Progress | None = None) -> Manifest | None:
    """Fetch an adapter into an empty folder; return its manifest if a registry wrote one.

    Raises:
        CorruptArtifact: the manifest is too large.
        StorageError: the folder cannot be written.
    """
    client = HubClient()
    manifest: Manifest | None = None
    for path in found.files:
        if path != MANIFEST_FILE:
            client.download(found.repo_id, path, found.commit, folder, progress or _nobody)
            continue
        raw = client.read(found.repo_id, path, found.commit, MAX_JSON_BYTES) or b""
        try:
            manifest = Manifest.from_json(raw)
        except CorruptArtifact:
            continue  # somebody else's file of that name
        (folder / MANIFEST_FILE).write_bytes(raw)
    return manifest


def push_imported(
    registry: Registry,
    found: Found,
    folder: Path,
    name: str,
    *,
    base: BaseCard,
    description: str = "",
    allow_zero: bool = False,
    progress: Progress | None = None,
) -> VersionInfo:
    """Push what was fetched; its origin is its description, unless that is given.

    Raises:
        LoraryError: see ``Registry.push``.
    """
    return registry.push(
        folder,
        name,
        base=base,
        description=description or f"imported from {found.repo_id}@{found.commit}",
        allow_zero=allow_zero,
        progress=progress,
    )


def _nobody(_: int) -> None:
    """Be told of progress and do nothing."""
