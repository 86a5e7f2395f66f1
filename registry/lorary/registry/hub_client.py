"""The calls of the Hub's client that the registry makes, with its errors turned into ours.

Endpoint and token are those of the client: ``HF_ENDPOINT``, ``HF_TOKEN``, or what ``hf auth login`` kept.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from lorary.errors import CorruptArtifact
from lorary.registry.hub_errors import StaleHead, hub_errors, status_of

TIMEOUT_S: Final = 30.0
SLOW_S: Final = 300.0
"""For answers to large uploads: a hub hashes gigabytes before it gives one."""
_NOT_FOUND: Final = 404
_STALE: Final = 412
# Public names, which the package does not declare to type checkers.
_utils: Final[Any] = huggingface_hub.utils
_once = threading.Lock()
_is_prepared = False


class Counter:
    """Passes on how many bytes were sent, and keeps their sum. Thread-safe."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._sum = 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        """Tell of bytes."""
        with self._lock:
            self._sum += count
            self._told(count)

    def finish(self, total: int) -> None:
        """Tell of what is left of ``total``."""
        self(max(0, total - self._sum))


class _Add(CommitOperationAdd):
    """A file to be added that tells of its bytes as they are sent."""

    def __init__(self, path: str, content: Path | bytes, *, sent: Counter | None) -> None:
        super().__init__(path, content)
        self._sent = sent

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
        """Open the file; ``with_tqdm`` says that it is about to be sent."""
        if not with_tqdm or self._sent is None or isinstance(self.path_or_fileobj, bytes):
            with super().as_file() as file:
                yield file
        else:
            with _Told(io.FileIO(str(self.path_or_fileobj)), self._sent) as told:
                yield told


class _Told(io.BufferedReader):
    """A file that tells of what is read of it."""

    def __init__(self, raw: io.FileIO, sent: Counter) -> None:
        super().__init__(raw)
        self._sent = sent

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes, and tell of them."""
        found = super().read(size)
        self._sent(len(found))
        return found


class HubClient:
    """A Hub, as far as registries need it. Thread-safe."""

    def __init__(self) -> None:
        _prepare()
        self._api = HfApi(library_name="lorary")

    @property
    def api(self) -> HfApi:
        """The client itself."""
        return self._api

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return str(self._api.endpoint)

    def models(self, owner: str, tag: str) -> dict[str, str]:
        """Return an owner's repositories that carry a tag, with the commits of their heads."""
        # Not `HfApi.list_models`: it retries for half a minute before it says that a hub is away.
        found: dict[str, str] = {}
        url: str | None = f"{self.endpoint}/api/models"
        query: Any = {"author": owner, "filter": tag, "expand": ["sha"]}
        with hub_errors(f"list the models of {owner}"):
            headers = _utils.build_hf_headers(library_name="lorary")
            while url is not None:
                response = _utils.get_session().get(
                    url, params=query, headers=headers, timeout=TIMEOUT_S
                )
                _utils.hf_raise_for_status(response)
                found.update({model["id"]: model.get("sha") or "" for model in response.json()})
                url, query = response.links.get("next", {}).get("url"), None
        return {repo_id: sha for repo_id, sha in found.items() if sha}

    def head(self, repo_id: str, revision: str | None = None) -> str | None:
        """Return the commit of the head, or of a revision; ``None`` if there is none."""
        with hub_errors(f"look at {repo_id}"):
            try:
                info = self._api.model_info(
                    repo_id, revision=revision, expand=["sha"], timeout=TIMEOUT_S
                )
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                if status_of(error) == _NOT_FOUND:
                    return None
                raise
            return info.sha

    def read(self, repo_id: str, path: str, commit: str, limit: int) -> bytes | None:
        """Return a small file at a commit; ``None`` if there is no such file.

        Raises:
            CorruptArtifact: it has more than ``limit`` bytes.
        """
        with hub_errors(f"read {path} of {repo_id}"):
            url = hf_hub_url(repo_id, path, revision=commit, endpoint=self.endpoint)
            session = _utils.get_session()
            headers = _utils.build_hf_headers(library_name="lorary")
            with session.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
                try:
                    _utils.hf_raise_for_status(response)
                except EntryNotFoundError:
                    return None
                content = b""
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > limit:
                        raise CorruptArtifact(
                            f"{path} of {repo_id} is larger than {limit} bytes; it cannot be right"
                        )
                return content

    def files(self, repo_id: str, commit: str) -> list[str]:
        """Return the paths of all files at a commit."""
        with hub_errors(f"list the files of {repo_id}"):
            return list(self._api.list_repo_files(repo_id, revision=commit))

    def download(
        self, repo_id: str, path: str, commit: str, folder: Path, told: Callable[[int], None]
    ) -> Path:
        """Fetch a file into ``folder``, going on where an interrupted fetch of it stopped."""
        with hub_errors(f"fetch {path} of {repo_id}"):
            found = huggingface_hub.hf_hub_download(
                repo_id,
                path,
                revision=commit,
                local_dir=folder,
                endpoint=self.endpoint,
                library_name="lorary",
                tqdm_class=_teller(told),
            )
        return Path(found)

    def create(self, repo_id: str) -> None:
        """Create a private repository, unless there is one."""
        with hub_errors(f"create {repo_id}"):
            self._api.create_repo(repo_id, private=True, exist_ok=True)

    def commit(
        self,
        repo_id: str,
        *,
        parent: str,
        title: str,
        add: Mapping[str, Path | bytes],
        delete: Iterable[str] = (),
        told: Callable[[int], None] | None = None,
    ) -> str:
        """Change files in one step and return the new head; ``told`` is told of bytes sent.

        Raises:
            StaleHead: ``parent`` is no longer the head; nothing was changed.
        """
        sent = Counter(told) if told is not None else None
        operations: list[Any] = [
            *(CommitOperationDelete(path, is_folder=False) for path in delete),
            *(_Add(path, content, sent=sent) for path, content in add.items()),
        ]
        with hub_errors(f"commit to {repo_id}"):
            try:
                info = self._api.create_commit(
                    repo_id, operations, commit_message=title, parent_commit=parent
                )
            except HfHubHTTPError as error:
                if status_of(error) == _STALE:
                    raise StaleHead(repo_id) from error
                raise
            if sent is not None:
                # What a hub has already is not sent, and Xet says nothing on its way.
                sent.finish(sum(p.stat().st_size for p in add.values() if isinstance(p, Path)))
            return str(info.oid)

    def tags(self, repo_id: str) -> dict[str, str]:
        """Return all tags with their commits."""
        with hub_errors(f"list the tags of {repo_id}"):
            refs = self._api.list_repo_refs(repo_id)
            return {ref.name: ref.target_commit for ref in refs.tags}

    def tag(self, repo_id: str, name: str, commit: str) -> None:
        """Tag a commit, unless there is a tag of that name."""
        with hub_errors(f"tag {repo_id}"):
            self._api.create_tag(repo_id, tag=name, revision=commit, exist_ok=True)

    def untag(self, repo_id: str, name: str) -> None:
        """Remove a tag, if there is one."""
        with hub_errors(f"remove tag {name} of {repo_id}"):
            try:
                self._api.delete_tag(repo_id, tag=name)
            except (RevisionNotFoundError, HfHubHTTPError) as error:
                if status_of(error) != _NOT_FOUND:
                    raise

    def titles(self, repo_id: str) -> list[tuple[str, str]]:
        """Return commit and title of the whole history, newest first."""
        return [(commit, title) for commit, title, _, _ in self.history(repo_id)]

    def history(self, repo_id: str) -> list[tuple[str, str, str, str]]:
        """Return commit, title, author and time (UTC) of the whole history, newest first."""
        with hub_errors(f"read the history of {repo_id}"):
            return [
                (c.commit_id, c.title, ", ".join(c.authors), f"{c.created_at:%Y-%m-%dT%H:%M:%SZ}")
                for c in self._api.list_repo_commits(repo_id)
            ]


def log_in(token: str) -> tuple[str, str]:
    """Check a token and keep it where the Hub's client looks; return the endpoint and the user.

    Raises:
        AccessDenied: the hub does not know the token.
        RegistryUnavailable: the hub cannot be reached.
    """
    client = HubClient()
    with hub_errors(f"log in to {client.endpoint}"):
        user = str(client.api.whoami(token=token)["name"])
        huggingface_hub.login(token=token)
    return client.endpoint, user


def _teller(told: Callable[[int], None]) -> Any:
    """Return a progress bar that shows nothing and passes on what it is told."""

    class Teller(_utils.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            told(int(n or 0))
            return None

    return Teller


def _prepare() -> None:
    """Give the Hub's client what it lacks: an end to waiting, and silence where nobody looks."""
    global _is_prepared
    with _once:
        if _is_prepared:
            return
        _is_prepared = True
        _utils.disable_progress_bars()  # ours say the same, and two would share a line
        # A program that made its own client (a proxy, certificates) keeps it.
        private: Any = _http
        default = private.default_client_factory
        if private._GLOBAL_CLIENT_FACTORY is default:

            def with_timeout() -> Any:
                client: Any = default()
                client.timeout = type(client.timeout)(TIMEOUT_S, read=SLOW_S)
                return client

            huggingface_hub.set_client_factory(with_timeout)
