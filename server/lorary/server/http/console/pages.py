"""The files of the console, read once, served under a policy that lets them run nothing but themselves."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.requests import Request

INDEX = "index.html"
KINDS = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""What is served, by how its name ends."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Names and answers are strangers' words: text that became markup or a script ends in an error.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for each time and sent only when changed: a new server never meets an old page.
    "cache-control": "no-cache",
}


class Pages:
    """Serves the files of one folder of this package, and nothing else.

    A path is looked up among the names that were there at the start; none is ever put together.
    """

    def __init__(self) -> None:
        folder = files(__package__) / "site"
        self._files = {
            file.name: file.read_bytes()
            for file in folder.iterdir()
            if file.name.rpartition(".")[2] in KINDS
        }

    @property
    def names(self) -> set[str]:
        """The files."""
        return set(self._files)

    async def redirect(self, _: Request) -> Response:
        """Answer ``/console``: relative links need the slash, and a proxy may have put a prefix before."""
        return RedirectResponse("console/", headers=HEADERS)

    async def file(self, request: Request) -> Response:
        """Answer ``/console/{file}``; the empty name is the page itself."""
        name = request.path_params["file"] or INDEX
        content = self._files.get(name)
        if content is None:
            raise HTTPException(404)
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=KINDS[name.rpartition(".")[2]], headers=headers)
