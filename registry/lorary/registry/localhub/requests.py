"""What is read from every request in the same way."""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.requests import Request

from lorary.registry.localhub.problems import HubProblem

MAX_BODY_BYTES: Final = 128 << 20


def repo_id_of(request: Request) -> str:
    """Return the repository that the address names."""
    return f"{request.path_params['owner']}/{request.path_params['name']}"


def revision_of(request: Request) -> str:
    """Return the revision that the address names; ``main`` if it names none."""
    return str(request.path_params.get("rev", "main")).replace("%2F", "/")


def base_url(request: Request) -> str:
    """Return the hub's address as the caller knows it."""
    return str(request.base_url).rstrip("/")


def number_of(request: Request, key: str, default: int) -> int:
    """Return a number from the query.

    Raises:
        HubProblem: 400: it is none.
    """
    text = request.query_params.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise HubProblem(400, f"{key} is no number")
    return int(text)


async def whole_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """Return the body.

    Raises:
        HubProblem: 413: it has more than ``limit`` bytes.
    """
    chunks, count = [], 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > limit:
            raise HubProblem(413, f"This request may have up to {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def json_body(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """Return the body, which is a JSON object; ``optional`` takes no body as an empty one.

    Raises:
        HubProblem: 400: it is none.
    """
    raw = await whole_body(request)
    if optional and not raw:
        return {}
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        raise HubProblem(400, "The request is no JSON") from None
    if not isinstance(parsed, dict):
        raise HubProblem(400, "The request is no JSON object")
    return parsed


def objects_in(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return a list of objects from a body.

    Raises:
        HubProblem: 400: it is something else.
    """
    found = body.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise HubProblem(400, f"{key} is no list of objects")
    return found
