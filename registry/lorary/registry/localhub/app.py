"""The addresses of the Hub's API, and what happens at each."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lorary.errors import CorruptArtifact, StorageError
from lorary.registry.localhub import answers, uploads
from lorary.registry.localhub.auth import (
    Caller,
    Signer,
    Tokens,
    check_files,
    check_read,
    check_write,
    may_see,
)
from lorary.registry.localhub.cards import read_metadata
from lorary.registry.localhub.commits import read_request
from lorary.registry.localhub.objects import SHA256, check_path, check_repo_id
from lorary.registry.localhub.problems import Code, HubProblem, repo_not_found
from lorary.registry.localhub.repos import Repo, Repos
from lorary.registry.localhub.requests import (
    base_url,
    json_body,
    number_of,
    objects_in,
    repo_id_of,
    revision_of,
    whole_body,
)
from lorary.registry.localhub.xet_app import XetEndpoints
from lorary.registry.strict_json import show

logger = logging.getLogger(__name__)

SMALL_BYTES: Final = 1 << 20
PAGE: Final = 1000
LINK_SECONDS: Final = 24 * 3600
_LARGE_SUFFIXES: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".zip", ".npz")
_ERROR_CODE: Final = "X-Error-Code"

Endpoint = Callable[[Request], Awaitable[Response]]


class Hub:
    """The endpoints.

    Args:
        repos: where repositories are.
        tokens: who may do what.
    """

    def __init__(self, repos: Repos, tokens: Tokens) -> None:
        self._repos = repos
        self._tokens = tokens
        self._signer = Signer(secrets.token_bytes(32))
        self._xet = XetEndpoints(repos, self._signer)

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        model = "/api/models/{owner}/{name}"
        git = "/{owner}/{name}.git/info/lfs/objects"
        routes: list[tuple[str, str, Endpoint]] = [
            ("GET", "/health", self.health),
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("POST", "/api/repos/create", self.create_repo),
            ("DELETE", "/api/repos/delete", self.delete_repo),
            ("POST", "/api/repos/move", self.move_repo),
            ("GET", "/api/models", self.list_models),
            ("GET", model, self.model_info),
            ("GET", f"{model}/revision/{{rev}}", self.model_info),
            ("PUT", f"{model}/settings", self.settings),
            ("GET", f"{model}/auth-check", self.auth_check),
            ("GET", f"{model}/refs", self.refs),
            ("GET", f"{model}/commits/{{rev}}", self.commits),
            ("GET", f"{model}/tree/{{rev}}", self.tree),
            ("GET", f"{model}/tree/{{rev}}/{{path:path}}", self.tree),
            ("POST", f"{model}/paths-info/{{rev}}", self.paths_info),
            ("POST", f"{model}/preupload/{{rev}}", self.preupload),
            ("POST", f"{model}/commit/{{rev}}", self.commit),
            ("POST", f"{model}/tag/{{rev}}", self.add_tag),
            ("DELETE", f"{model}/tag/{{rev}}", self.delete_tag),
            ("POST", f"{model}/branch/{{rev}}", self.add_branch),
            ("DELETE", f"{model}/branch/{{rev}}", self.delete_branch),
            ("GET", f"{model}/xet-write-token/{{rev}}", self.xet_write_token),
            ("GET", f"{model}/xet-read-token/{{rev}}", self.xet_read_token),
            *self._xet.routes(),
            ("POST", f"{git}/batch", self.lfs_batch),
            ("PUT", f"{git}/{{oid}}", self.lfs_put),
            ("POST", f"{git}/{{oid}}/join", self.lfs_join),
            ("POST", f"{git}/{{oid}}/verify", self.lfs_verify),
            ("GET", "/{owner}/{name}/resolve/{rev}/{path:path}", self.resolve),
        ]
        table = [Route(path, _guarded(call), methods=[method]) for method, path, call in routes]
        handlers: dict[Any, Any] = {HTTPException: _no_such_address}
        return _KeepSlashes(Starlette(routes=table, exception_handlers=handlers))

    # -- callers and repositories -------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Say that the process answers."""
        return JSONResponse({"status": "ok"})

    async def whoami(self, request: Request) -> Response:
        """Say whose token was sent."""
        caller = self._caller(request)
        if caller.is_anonymous:
            raise HubProblem(401, "Invalid username or password.")
        return JSONResponse(answers.whoami(caller))

    async def validate_yaml(self, request: Request) -> Response:
        """Look whether a model card's metadata can be read."""
        content = str((await json_body(request)).get("content", ""))
        try:
            read_metadata(content)
        except ValueError as error:
            body = {"errors": [{"message": str(error)}], "warnings": []}
            return JSONResponse(body, HTTPStatus.BAD_REQUEST)
        return JSONResponse({"errors": [], "warnings": []})

    async def create_repo(self, request: Request) -> Response:
        """Create a repository."""
        caller, body = self._caller(request), await json_body(request)
        check_write(caller)
        if body.get("type") not in (None, "model"):
            raise HubProblem(400, "This hub keeps models only")
        owner, name = str(body.get("organization") or caller.name), str(body.get("name"))
        repo_id = check_repo_id(owner, name)
        private = body.get("visibility") == "private" or body.get("private") is True
        url = f"{base_url(request)}/{repo_id}"
        answer = {"url": url, "name": repo_id}
        if not await run_in_threadpool(self._repos.create, owner, name, private=private):
            message = "You already created this model repo"
            return JSONResponse({"error": message, **answer}, HTTPStatus.CONFLICT)
        return JSONResponse(answer)

    async def delete_repo(self, request: Request) -> Response:
        """Delete a repository."""
        caller, body = self._caller(request), await json_body(request)
        check_write(caller)
        repo = self._named(caller, f"{body.get('organization') or caller.name}/{body.get('name')}")
        await run_in_threadpool(self._repos.delete, repo)
        return JSONResponse({})

    async def move_repo(self, request: Request) -> Response:
        """Rename a repository."""
        caller, body = self._caller(request), await json_body(request)
        check_write(caller)
        repo = self._named(caller, str(body.get("fromRepo")))
        owner, _, name = str(body.get("toRepo")).partition("/")
        if not await run_in_threadpool(self._repos.move, repo, owner, name):
            raise HubProblem(409, "A repository of that name exists")
        return JSONResponse({})

    async def settings(self, request: Request) -> Response:
        """Change who may see a repository."""
        repo, body = self._writable(request), await json_body(request)
        changes: dict[str, Any] = {}
        if body.get("visibility") in ("private", "public"):
            changes["private"] = body["visibility"] == "private"
        elif "private" in body:
            changes["private"] = body["private"] is True
        if body.get("gated") in ("auto", "manual", False):
            changes["gated"] = body["gated"]
        if not changes:
            raise HubProblem(400, "Nothing to change: send visibility, or gated")
        await run_in_threadpool(repo.change_settings, **changes)
        return JSONResponse(changes)

    async def list_models(self, request: Request) -> Response:
        """List repositories by author, tags and a part of the name, in pages."""
        rows = await run_in_threadpool(self._found, self._caller(request), request)
        skip = number_of(request, "skip", 0)
        limit = min(number_of(request, "limit", PAGE), PAGE)
        headers = {}
        if skip + limit < len(rows):
            query = [(k, v) for k, v in request.query_params.multi_items() if k != "skip"]
            more = urlencode([*query, ("skip", skip + limit)])
            headers["Link"] = f'<{base_url(request)}/api/models?{more}>; rel="next"'
        return JSONResponse(rows[skip : skip + limit], headers=headers)

    async def model_info(self, request: Request) -> Response:
        """Describe a repository."""
        repo = self._readable(request)
        wants_blobs = request.query_params.get("blobs", "").lower() in ("1", "true")

        def describe() -> dict[str, Any]:
            return answers.model(repo, repo.find(revision_of(request)), blobs=wants_blobs)

        return JSONResponse(await run_in_threadpool(describe))

    async def auth_check(self, request: Request) -> Response:
        """Say whether the caller may read files."""
        check_files(self._caller(request), self._readable(request))
        return JSONResponse({})

    # -- history and trees --------------------------------------------------------------------

    async def refs(self, request: Request) -> Response:
        """List branches and tags."""
        repo = self._readable(request)
        return JSONResponse(answers.refs(repo.refs("heads"), repo.refs("tags")))

    async def commits(self, request: Request) -> Response:
        """List commits, newest first."""
        repo = self._readable(request)
        found = await run_in_threadpool(lambda: repo.history(repo.find(revision_of(request))))
        return JSONResponse([answers.commit_row(commit) for commit in found])

    async def tree(self, request: Request) -> Response:
        """List files and folders."""
        commit = self._readable(request).find(revision_of(request))
        recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
        folder = request.path_params.get("path", "").strip("/")
        rows = answers.tree(commit, folder, recursive=recursive)
        if rows is None:
            raise _no_entry(folder, commit.sha)
        return JSONResponse(rows)

    async def paths_info(self, request: Request) -> Response:
        """Describe named files."""
        commit = self._readable(request).find(revision_of(request))
        if request.headers.get("content-type", "").startswith("application/json"):
            asked = (await json_body(request)).get("paths")
            paths = [str(path) for path in asked] if isinstance(asked, list) else []
        else:
            body = (await whole_body(request)).decode(errors="replace")
            paths = [value for key, value in parse_qsl(body) if key == "paths"]
        return JSONResponse(answers.paths_info(commit, paths))

    async def resolve(self, request: Request) -> Response:
        """Send a file, or a part of it."""
        repo = self._readable(request)
        check_files(self._caller(request), repo)
        commit = repo.find(revision_of(request))
        path = request.path_params["path"]
        entry = commit.files.get(path)
        if entry is None:
            raise _no_entry(path, commit.sha)
        blob = repo.blobs.path(entry.sha256)
        headers = {
            "X-Repo-Commit": commit.sha,
            "ETag": f'"{entry.etag}"',
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
            "Cache-Control": "no-cache",
            # Whatever the file claims to be, a browser must not run it in the hub's name.
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "X-Content-Type-Options": "nosniff",
        }
        if entry.is_lfs:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        if not blob.is_file():
            raise CorruptArtifact(f"{blob} is missing; upload {path} to {repo.id} again")
        media = "application/octet-stream" if entry.is_lfs else "text/plain; charset=utf-8"
        return FileResponse(blob, headers=headers, media_type=media, stat_result=os.stat(blob))

    # -- changes ------------------------------------------------------------------------------

    async def preupload(self, request: Request) -> Response:
        """Say how each file is to travel: inside the commit, or before it."""
        repo, body = self._writable(request), await json_body(request)
        commit = repo.find(revision_of(request))
        rows = []
        for file in objects_in(body, "files"):
            path = check_path(file.get("path"))
            known = commit.files.get(path)
            row = {"path": path, "uploadMode": _mode(file, path), "shouldIgnore": False}
            if known is not None:
                row["oid"] = known.etag
            rows.append(row)
        return JSONResponse({"files": rows})

    async def commit(self, request: Request) -> Response:
        """Change files in one step."""
        repo, caller = self._writable(request), self._caller(request)
        if request.query_params.get("create_pr"):
            raise HubProblem(400, "This hub has no pull requests; commit to a branch")
        body = await whole_body(request)
        branch = revision_of(request).removeprefix("refs/heads/")

        def change() -> str:
            asked = read_request(repo, body)
            made = repo.commit(
                branch,
                asked.changes,
                parent=asked.parent,
                title=asked.title,
                message=asked.message,
                author=caller.name,
            )
            return made.sha

        sha = await run_in_threadpool(change)
        url = f"{base_url(request)}/{repo.id}/commit/{sha}"
        return JSONResponse({"commitOid": sha, "commitUrl": url, "hookOutput": "", "success": True})

    async def add_tag(self, request: Request) -> Response:
        """Create a tag."""
        repo, body = self._writable(request), await json_body(request)
        tag = str(body.get("tag"))
        await run_in_threadpool(repo.add_ref, "tags", tag, revision_of(request))
        return JSONResponse({})

    async def delete_tag(self, request: Request) -> Response:
        """Delete a tag."""
        await run_in_threadpool(self._writable(request).delete_ref, "tags", revision_of(request))
        return JSONResponse({})

    async def add_branch(self, request: Request) -> Response:
        """Create a branch."""
        repo, body = self._writable(request), await json_body(request, optional=True)
        start = str(body.get("startingPoint") or "main")
        await run_in_threadpool(repo.add_ref, "heads", revision_of(request), start)
        return JSONResponse({})

    async def delete_branch(self, request: Request) -> Response:
        """Delete a branch."""
        await run_in_threadpool(self._writable(request).delete_ref, "heads", revision_of(request))
        return JSONResponse({})

    # -- large files --------------------------------------------------------------------------

    async def xet_write_token(self, request: Request) -> Response:
        """Say where chunks are to be sent."""
        return self._xet.token(request, self._writable(request), "write")

    async def xet_read_token(self, request: Request) -> Response:
        """Say where chunks can be read."""
        repo = self._readable(request)
        check_files(self._caller(request), repo)
        return self._xet.token(request, repo, "read")

    async def lfs_batch(self, request: Request) -> Response:
        """Say where to send each large file that is not there yet."""
        repo, body = self._writable(request), await json_body(request)
        if body.get("operation") != "upload":
            raise HubProblem(422, "Download files from their resolve address")
        transfers = body.get("transfers")
        multipart = isinstance(transfers, list) and "multipart" in transfers
        rows = [
            self._lfs_row(request, repo, file, multipart=multipart)
            for file in objects_in(body, "objects")
        ]
        kinds = {"multipart" for row in rows if "chunk_size" in _headers_of(row)}
        transfer = kinds.pop() if kinds else "basic"
        media = "application/vnd.git-lfs+json"
        return JSONResponse({"transfer": transfer, "objects": rows}, media_type=media)

    async def lfs_put(self, request: Request) -> Response:
        """Take a large file, or a part of one."""
        repo, oid, size, part = self._signed(request)
        if part:
            etag = await uploads.receive_part(repo, oid, part, request.stream())
        else:
            await uploads.receive(repo, oid, size, request.stream())
            etag = oid
        return Response(headers={"ETag": f'"{etag}"'})

    async def lfs_join(self, request: Request) -> Response:
        """Make a large file of its parts."""
        repo, oid, size, _ = self._signed(request)
        etags = []
        for part in objects_in(await json_body(request), "parts"):
            number = part.get("partNumber")
            if type(number) is not int:
                raise HubProblem(400, "A part has no number")
            etags.append((number, str(part.get("etag"))))
        await run_in_threadpool(uploads.join_parts, repo, oid, size, etags)
        return JSONResponse({})

    async def lfs_verify(self, request: Request) -> Response:
        """Say whether a large file has arrived."""
        repo, oid, size, _ = self._signed(request)
        if not uploads.is_kept(repo, oid, size):
            raise HubProblem(404, f"sha256 {oid} was not uploaded")
        return JSONResponse({})

    def _lfs_row(
        self, request: Request, repo: Repo, file: dict[str, Any], *, multipart: bool
    ) -> dict[str, Any]:
        oid, size = file.get("oid"), file.get("size")
        row = {"oid": oid, "size": size}
        if not isinstance(oid, str) or not SHA256.fullmatch(oid) or type(size) is not int:
            return row | {"error": {"code": 422, "message": "oid is no sha256, or size no number"}}
        if not 0 <= size <= uploads.MAX_FILE_BYTES:
            message = f"files may have up to {uploads.MAX_FILE_BYTES} bytes"
            return row | {"error": {"code": 413, "message": message}}
        if uploads.is_kept(repo, oid, size):
            return row
        actions = {"verify": {"href": self._link(request, repo, oid, size, kind="/verify")}}
        if multipart and size > uploads.PART_BYTES:
            count = -(-size // uploads.PART_BYTES)
            parts = {
                str(n): self._link(request, repo, oid, size, part=n) for n in range(1, count + 1)
            }
            header = {"chunk_size": str(uploads.PART_BYTES), **parts}
            join = self._link(request, repo, oid, size, kind="/join")
            return row | {"actions": actions | {"upload": {"href": join, "header": header}}}
        return row | {
            "actions": actions | {"upload": {"href": self._link(request, repo, oid, size)}}
        }

    def _link(
        self, request: Request, repo: Repo, oid: str, size: int, *, part: int = 0, kind: str = ""
    ) -> str:
        until = int(time.time()) + LINK_SECONDS
        signature = self._signer.sign(repo.id, oid, size, part, until)
        query = urlencode({"size": size, "part": part, "until": until, "signature": signature})
        return f"{base_url(request)}/{repo.id}.git/info/lfs/objects/{oid}{kind}?{query}"

    def _signed(self, request: Request) -> tuple[Repo, str, int, int]:
        """Return repository, sha256, size and part of a signed address."""
        repo_id, oid = repo_id_of(request), request.path_params["oid"]
        size, part = number_of(request, "size", 0), number_of(request, "part", 0)
        until = number_of(request, "until", 0)
        signature = request.query_params.get("signature", "")
        self._signer.check(signature, repo_id, oid, size, part, until)
        if until < time.time():
            raise HubProblem(403, "This address is not signed, or its signature has expired")
        repo = self._repos.get(*repo_id.split("/"))
        if repo is None:
            raise repo_not_found(repo_id, is_anonymous=False)
        return repo, oid, size, part

    # -- helpers ------------------------------------------------------------------------------

    def _caller(self, request: Request) -> Caller:
        return self._tokens.caller(request.headers.get("authorization", ""))

    def _readable(self, request: Request) -> Repo:
        return self._named(self._caller(request), repo_id_of(request))

    def _writable(self, request: Request) -> Repo:
        caller = self._caller(request)
        repo = self._named(caller, repo_id_of(request))
        check_write(caller)
        return repo

    def _named(self, caller: Caller, repo_id: str) -> Repo:
        owner, _, name = repo_id.partition("/")
        return check_read(caller, self._repos.get(owner, name), repo_id)

    def _found(self, caller: Caller, request: Request) -> list[dict[str, Any]]:
        query = request.query_params
        author, search = query.get("author"), query.get("search", "").lower()
        wanted = [tag for value in query.getlist("filter") for tag in value.split(",") if tag]
        wanted += query.getlist("pipeline_tag")
        rows = []
        for repo_id in self._repos.ids():
            owner, _, name = repo_id.partition("/")
            if (author and owner.lower() != author.lower()) or search not in repo_id.lower():
                continue
            repo = self._repos.get(owner, name)
            if repo is None or not may_see(caller, repo):
                continue
            row = answers.model(repo, repo.find("main"))
            if all(tag in row["tags"] for tag in wanted):
                rows.append(row)
        return rows


class _KeepSlashes:
    """Keep ``%2F`` in a path as it is: a revision such as ``refs/heads/x`` is one part of an address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = scope["raw_path"].decode("latin-1").partition("?")[0]
            parts = (unquote(part).replace("/", "%2F") for part in raw.split("/"))
            scope = {**scope, "path": "/".join(parts)}
        await self._app(scope, receive, send)


def _guarded(call: Endpoint) -> Endpoint:
    """Turn what an endpoint raises into the Hub's answers."""

    async def guarded(request: Request) -> Response:
        try:
            return await call(request)
        except HubProblem as problem:
            return _refusal(problem)
        except (CorruptArtifact, StorageError) as error:
            logger.exception("%s %s failed", request.method, request.url.path)
            status = 507 if isinstance(error, StorageError) else 500
            return _refusal(HubProblem(status, "The hub's storage failed; its log has the details"))

    return guarded


def _refusal(problem: HubProblem) -> Response:
    text = problem.message.encode("ascii", errors="replace").decode()
    headers = {"X-Error-Message": " ".join(text.split())} | problem.headers
    if problem.code:
        headers[_ERROR_CODE] = problem.code
    return JSONResponse({"error": problem.message}, problem.status, headers=headers)


async def _no_such_address(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = f"This hub has nothing at {show(request.url.path)}; it keeps models only"
    code: Code = "RepoNotFound" if status == HTTPStatus.NOT_FOUND else ""
    return _refusal(HubProblem(status, text, code=code))


def _no_entry(path: str, sha: str) -> HubProblem:
    return HubProblem(
        404, f"{show(path)} does not exist", code="EntryNotFound", headers={"X-Repo-Commit": sha}
    )


def _mode(file: dict[str, Any], path: str) -> str:
    size = file.get("size")
    is_large = type(size) is not int or size > SMALL_BYTES or path.endswith(_LARGE_SUFFIXES)
    return "lfs" if is_large else "regular"


def _headers_of(row: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = row.get("actions", {}).get("upload", {}).get("header", {})
    return found
