"""The addresses at which ``hf_xet`` sends and asks for chunks (``xet`` says what they mean)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from lorary.registry.localhub.auth import Signer
from lorary.registry.localhub.problems import HubProblem
from lorary.registry.localhub.repos import Repo, Repos
from lorary.registry.localhub.requests import base_url, repo_id_of, whole_body
from lorary.registry.localhub.xet import (
    MAX_SHARD_BYTES,
    MAX_XORB_BYTES,
    TOKEN_SECONDS,
    XetFile,
    XetStore,
    read_shard,
)

_TOKEN: Final = re.compile(r"(read|write)-([0-9]{1,12})-([0-9a-f]{64})")
_JOINERS: Final = 4
_AT: Final = "/xet/{owner}/{name}/{made}"


class XetEndpoints:
    """The endpoints.

    Args:
        repos: where repositories are.
        signer: makes and checks the tokens.
    """

    def __init__(self, repos: Repos, signer: Signer) -> None:
        self._repos = repos
        self._signer = signer
        # Files of shards that are being put together just now: hf_xet asks for them from outside.
        self._waiting: dict[tuple[str, str], XetFile] = {}
        # Threads of their own: those of the framework must stay free to answer hf_xet meanwhile.
        self._joiners = ThreadPoolExecutor(_JOINERS, thread_name_prefix="hub-xet")

    def routes(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
        """Return method, path and endpoint of each."""
        return [
            ("POST", f"{_AT}/v1/xorbs/default/{{hash}}", self.put_xorb),
            ("POST", f"{_AT}/v1/shards", self.put_shard),
            ("GET", f"{_AT}/v1/reconstructions/{{hash}}", self.reconstruction),
            ("GET", f"{_AT}/xorbs/{{hash}}", self.get_xorb),
        ]

    def token(self, request: Request, repo: Repo, scope: str) -> Response:
        """Tell a client where to send chunks, and with which token.

        Raises:
            HubProblem: 501: ``hf_xet`` is not installed here.
        """
        if importlib.util.find_spec("hf_xet") is None:
            raise HubProblem(
                501, "This hub lacks hf_xet; upload with HF_HUB_DISABLE_XET=1, or install it there"
            )
        until = int(time.time()) + TOKEN_SECONDS
        token = self._token(repo, scope, until)
        url = f"{base_url(request)}{_path(repo)}"
        headers = {
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(until),
        }
        body = {"casUrl": url, "accessToken": token, "exp": until}
        return JSONResponse(body, headers=headers)

    async def put_xorb(self, request: Request) -> Response:
        """Take a xorb."""
        store = XetStore(self._repo(request, "write"))
        content = await whole_body(request, MAX_XORB_BYTES)
        is_new = await run_in_threadpool(store.keep_xorb, request.path_params["hash"], content)
        return JSONResponse({"was_inserted": is_new})

    async def put_shard(self, request: Request) -> Response:
        """Take a shard, and put its files together."""
        repo = self._repo(request, "write")
        files = read_shard(await whole_body(request, MAX_SHARD_BYTES))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            self._joiners, self._put_together, repo, files, _own_url(request)
        )
        return JSONResponse({"result": 1})

    async def reconstruction(self, request: Request) -> Response:
        """Say which chunks make up a file of a shard that was just sent."""
        repo = self._repo(request, "read")
        file = self._waiting.get((repo.id, request.path_params["hash"]))
        if file is None:
            raise HubProblem(404, "Files are downloaded from their resolve address")
        until = int(time.time()) + TOKEN_SECONDS
        token = quote(self._token(repo, "read", until))
        url = f"{_own_url(request)}{_path(repo)}/xorbs/{{hash}}?token={token}"
        return JSONResponse(await run_in_threadpool(XetStore(repo).reconstruction, file, url))

    async def get_xorb(self, request: Request) -> Response:
        """Send a range of a xorb."""
        repo = self._repo(request, "read")
        path = XetStore(repo).xorb(request.path_params["hash"])
        media = "application/octet-stream"
        return FileResponse(path, media_type=media, stat_result=os.stat(path))

    def _put_together(self, repo: Repo, files: list[XetFile], own_url: str) -> None:
        token = self._token(repo, "read", int(time.time()) + TOKEN_SECONDS)
        for file in files:
            key = (repo.id, file.hash)
            self._waiting[key] = file
            try:
                XetStore(repo).put_together(file, own_url + _path(repo), token)
            finally:
                self._waiting.pop(key, None)

    def _token(self, repo: Repo, scope: str, until: int) -> str:
        return f"{scope}-{until}-{self._signer.sign('xet', repo.id, _made(repo), scope, until)}"

    def _repo(self, request: Request, scope: str) -> Repo:
        """Return the repository that a token is for.

        Raises:
            HubProblem: 401, 403 or 404.
        """
        sent: Any = request.query_params.get("token") or request.headers.get("authorization", "")
        match = _TOKEN.fullmatch(sent.removeprefix("Bearer "))
        if match is None:
            raise HubProblem(401, "This needs a token that this hub gave")
        granted, until, signature = match.groups()
        repo_id, made = repo_id_of(request), request.path_params["made"]
        self._signer.check(signature, "xet", repo_id, made, granted, int(until))
        repo = self._repos.get(*repo_id.split("/"))
        if int(until) < time.time() or granted not in (scope, "write"):
            raise HubProblem(401, "The token has expired, or may not do this")
        if repo is None or _made(repo) != made:
            raise HubProblem(404, "The repository was deleted", code="RepoNotFound")
        return repo


def _made(repo: Repo) -> str:
    return re.sub(r"\D", "", repo.settings().created_at)


def _path(repo: Repo) -> str:
    return f"/xet/{repo.id}/{_made(repo)}"


def _own_url(request: Request) -> str:
    """Return where this process answers itself, whatever proxies are in front of it."""
    host, port = request.scope["server"]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
