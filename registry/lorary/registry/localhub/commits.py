"""What a client wants to change, read from the lines it sends: one JSON object each.

::

    {"key": "header", "value": {"summary": …, "description": …, "parentCommit": …}}
    {"key": "file", "value": {"path": …, "content": …, "encoding": "base64"}}
    {"key": "lfsFile", "value": {"path": …, "algo": "sha256", "oid": …, "size": …}}
    {"key": "deletedFile" | "deletedFolder", "value": {"path": …}}
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

from lorary.registry.localhub.cards import read_metadata
from lorary.registry.localhub.objects import SHA256, Entry, check_path, large_entry
from lorary.registry.localhub.problems import HubProblem
from lorary.registry.localhub.repos import Repo
from lorary.registry.strict_json import show


@dataclass
class Request:
    """A commit as it was asked for."""

    title: str = ""
    message: str = ""
    parent: str | None = None
    changes: dict[str, Entry | None] = field(default_factory=dict)


def read_request(repo: Repo, body: bytes) -> Request:
    """Read the lines; keep the bytes of small files; look whether large ones were uploaded.

    Raises:
        HubProblem: 400: a line is not right, or a large file is not there.
    """
    request = Request()
    lines = [line for line in body.split(b"\n") if line.strip()]
    if not lines:
        raise HubProblem(400, "The commit is empty")
    for number, line in enumerate(lines):
        key, value = _parse(line)
        if (key == "header") != (number == 0):
            raise HubProblem(400, "The first line of a commit, and no other, is its header")
        if key == "header":
            request.title = _text(value, "summary")[:1024]
            request.message = _text(value, "description", "")
            request.parent = _text(value, "parentCommit", "") or None
        elif key == "file":
            path = check_path(value.get("path"))
            request.changes[path] = repo.keep(_content(path, value))
        elif key == "lfsFile":
            path = check_path(value.get("path"))
            request.changes[path] = _uploaded(repo, path, value)
        elif key == "deletedFile":
            request.changes.setdefault(check_path(value.get("path")), None)
        elif key == "deletedFolder":
            request.changes[check_path(_text(value, "path").rstrip("/")) + "/"] = None
        else:
            raise HubProblem(400, f"A commit has no lines of the kind {show(str(key))}")
    return request


def _parse(line: bytes) -> tuple[Any, dict[str, Any]]:
    try:
        parsed = json.loads(line)
        key, value = parsed["key"], parsed["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HubProblem(400, "A line of the commit is no JSON with a key and a value") from None
    if not isinstance(value, dict):
        raise HubProblem(400, "A line of the commit has a value that is no object")
    return key, value


def _content(path: str, value: dict[str, Any]) -> bytes:
    text = _text(value, "content")
    try:
        encoded = value.get("encoding") == "base64"
        content = base64.b64decode(text, validate=True) if encoded else text.encode()
        if path == "README.md":
            read_metadata(content.decode())
    except (binascii.Error, ValueError) as error:
        raise HubProblem(400, f"{show(path)}: {error}") from error
    return content


def _uploaded(repo: Repo, path: str, value: dict[str, Any]) -> Entry:
    oid = _text(value, "oid")
    if value.get("algo") != "sha256" or not SHA256.fullmatch(oid):
        raise HubProblem(400, f"{show(path)} is named by no sha256")
    blob = repo.blobs.path(oid)
    if not blob.is_file() or value.get("size", blob.stat().st_size) != blob.stat().st_size:
        raise HubProblem(400, f"{show(path)} (sha256 {oid}) was not uploaded to {repo.id}")
    return large_entry(oid, blob.stat().st_size)


def _text(value: dict[str, Any], key: str, default: str | None = None) -> str:
    found = value.get(key, default)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise HubProblem(400, f"{key} is no text")
    return found
