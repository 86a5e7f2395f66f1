"""A hub of one's own, called by the clients that people use: ``huggingface_hub``, ``hf``, PEFT."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import ConfigError, MissingDependency
from lorary.registry import Registry
from lorary.registry.localhub import uploads
from lorary.registry.localhub.auth import Tokens
from lorary.registry.localhub.objects import check_path, check_ref, check_repo_id
from lorary.registry.localhub.problems import HubProblem
from lorary.registry.localhub.repos import Repos
from lorary.registry.localhub.serve import make_server
from tests.registry.conftest import running_hub, use_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tests.registry.conftest import Forge, RunningHub


@pytest.fixture
def api(shared_hub: RunningHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    """The Hub's client, pointed at the shared hub; Xet is off."""
    from huggingface_hub import HfApi

    use_hub(monkeypatch, shared_hub.address, tmp_path / "home")
    return HfApi(endpoint=shared_hub.address)


@pytest.fixture
def repo(api: HfApi) -> str:
    """A new repository."""
    return str(api.create_repo(f"o{uuid.uuid4().hex[:12]}/model").repo_id)


def add(**files: bytes) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path.replace("_", "."), raw) for path, raw in files.items()]


def get(url: str, **headers: str) -> Any:
    """Any request but through the Hub's client, which would hide what the server says."""
    from huggingface_hub.utils import _http

    session: Any = _http.get_session()
    return session.get(url, headers=headers)


def send(method: str, url: str, **options: Any) -> Any:
    from huggingface_hub.utils import _http

    session: Any = _http.get_session()
    return session.request(method, url, **options)


# -- repositories -------------------------------------------------------------------------------


def test_the_life_of_a_repository(api: HfApi, repo: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    assert api.whoami(token="any")["name"] == "local"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    assert api.repo_exists(repo)
    api.update_repo_settings(repo, private=True, gated="auto")
    info = api.model_info(repo)
    assert (info.private, info.gated) == (True, "auto")
    moved = repo.replace("model", "renamed")
    api.move_repo(repo, moved)
    assert api.repo_exists(moved)
    assert not api.repo_exists(repo)
    api.delete_repo(moved)
    assert not api.repo_exists(moved)
    api.delete_repo(moved, missing_ok=True)


def test_files_come_back_as_they_were_sent(api: HfApi, repo: str, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    large, small = os.urandom(300_000), b"{}"
    api.create_commit(
        repo,
        [*add(m_safetensors=large, config_json=small, empty_txt=b"")],
        commit_message="all",
        commit_description="with a text",
    )
    folder = Path(snapshot_download(repo, endpoint=api.endpoint, local_dir=tmp_path / "out"))
    assert (folder / "m.safetensors").read_bytes() == large
    assert (folder / "config.json").read_bytes() == small
    assert (folder / "empty.txt").read_bytes() == b""
    commit = api.list_repo_commits(repo)[0]
    assert (commit.title, commit.message, commit.authors) == ("all", "with a text", ["local"])
    (lfs,) = api.get_paths_info(repo, ["m.safetensors"])
    assert getattr(lfs, "lfs", None) is not None
    again = api.create_commit(repo, add(m_safetensors=large), commit_message="no change")
    assert again.oid == commit.commit_id


def test_a_large_file_travels_in_parts(
    api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 100_000)
    raw = os.urandom(350_001)
    api.create_commit(repo, add(m_safetensors=raw), commit_message="parts")
    url = f"{api.endpoint}/{repo}/resolve/main/m.safetensors"
    assert get(url).content == raw


def test_branches_tags_and_trees(api: HfApi, repo: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    first = api.create_commit(repo, add(a_txt=b"1"), commit_message="one").oid
    api.create_tag(repo, tag="v1", tag_message="first")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="dev/x", revision="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="b/c.txt", repo_id=repo, revision="dev/x")
    api.delete_file("a.txt", repo, revision="dev/x")
    assert api.list_repo_files(repo, revision="dev/x") == [".gitattributes", "b/c.txt"]
    assert api.list_repo_files(repo, revision="refs/tags/v1") == [".gitattributes", "a.txt"]
    top = {item.path for item in api.list_repo_tree(repo, revision="dev/x")}
    assert top == {".gitattributes", "b"}
    assert [f.path for f in api.list_repo_tree(repo, "b", revision="dev/x")] == ["b/c.txt"]
    refs = api.list_repo_refs(repo)
    assert [ref.name for ref in refs.branches] == ["dev/x", "main"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    api.delete_folder("b", repo, revision="dev/x")
    api.delete_branch(repo, branch="dev/x")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(repo, branch="main")


def test_of_commits_on_one_parent_exactly_one_wins(api: HfApi, repo: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    parent = api.model_info(repo).sha
    said: list[Any] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        try:
            done = api.create_commit(
                repo,
                add(**{f"f{number}_txt": b"x"}),
                commit_message=str(number),
                parent_commit=parent,
            )
            said.append(done.oid)
        except HfHubHTTPError as error:
            said.append(error.response.status_code)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [one for one in said if one != 412]
    assert winners == [api.model_info(repo).sha]
    assert len(api.list_repo_commits(repo)) == 2


def test_models_are_found_by_owner_name_and_tag(api: HfApi, repo: str) -> None:
    owner = repo.partition("/")[0]
    card = b"---\nlibrary_name: peft\nbase_model: org/base\ntags: [odd]\nlicense: mit\n---\n"
    api.create_commit(repo, add(README_md=card), commit_message="card")
    for number in range(4):
        api.create_repo(f"{owner}/other-{number}")

    def found(**query: Any) -> list[str]:
        return [model.id.partition("/")[2] for model in api.list_models(author=owner, **query)]

    assert found() == ["model", *(f"other-{n}" for n in range(4))]
    for tag in ("odd", "peft", "base_model:adapter:org/base", "license:mit"):
        assert found(filter=tag) == ["model"]
    assert found(filter=["odd", "none"]) == []
    assert found(search="OTHER-2") == ["other-2"]
    page = get(f"{api.endpoint}/api/models?author={owner}&limit=2")
    assert len(page.json()) == 2
    assert 'rel="next"' in page.headers["Link"]
    rest = get(page.links["next"]["url"])
    assert [row["id"].partition("/")[2] for row in rest.json()] == ["other-1", "other-2"]


def test_parts_of_files_and_what_their_headers_say(api: HfApi, repo: str) -> None:
    raw = bytes(range(256)) * 10
    sha = api.create_commit(repo, add(m_bin=raw), commit_message="m").oid
    url = f"{api.endpoint}/{repo}/resolve/main/m.bin"
    whole = get(url)
    assert whole.headers["X-Repo-Commit"] == sha
    assert whole.headers["ETag"] == whole.headers["X-Linked-Etag"]
    part = get(url, Range="bytes=10-19")
    assert (part.status_code, part.content) == (206, raw[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(raw)}"
    assert get(url, Range=f"bytes={len(raw)}-").status_code == 416
    missing = get(f"{api.endpoint}/{repo}/resolve/main/none")
    assert missing.status_code == 404
    assert missing.headers["X-Error-Code"] == "EntryNotFound"
    assert missing.headers["X-Repo-Commit"] == sha
    unknown = get(f"{api.endpoint}/{repo}/resolve/v9/m.bin")
    assert unknown.headers["X-Error-Code"] == "RevisionNotFound"


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", "/a", "../a", "a/../b", "a//b", "a/", ".git/config", "a/.GIT/b", "a\0b", "a\nb", "a\\b",
     "\u202eb", "x" * 1025, 3, None],
)  # fmt: skip
def test_paths_that_leave_or_fool(path: Any) -> None:
    with pytest.raises(HubProblem):
        check_path(path)


def test_paths_that_are_right() -> None:
    for path in ("a", ".gitattributes", "a/b.c/d-e_f", "größe.txt", ".lorary/nonce"):
        assert check_path(path) == path


@pytest.mark.parametrize(
    "name", ["", "a..b", "-a", "a/", "/a", "a//b", "a.lock", "x" * 201, "a b", "0" * 40, "é"]
)
def test_references_that_cannot_be(name: str) -> None:
    with pytest.raises(HubProblem):
        check_ref(name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [("", "a"), ("a", ""), ("..", "a"), ("a", ".."), ("a", "b--c"), ("a", "b.git"), ("a b", "c"),
     ("a", "x" * 97), ("a", "é"), ("a", "b/c"), ("a", "b\0")],
)  # fmt: skip
def test_repositories_that_cannot_be(owner: str, name: str) -> None:
    with pytest.raises(HubProblem):
        check_repo_id(owner, name)


def test_addresses_that_climb_reach_nothing(api: HfApi, repo: str, shared_hub: RunningHub) -> None:
    import http.client

    (shared_hub.root / "secret").write_text("secret")
    host = shared_hub.address.removeprefix("http://")
    for path in (
        f"/{repo}/resolve/main/../../../secret",
        f"/{repo}/resolve/main/%2e%2e/%2e%2e/%2e%2e/secret",
        f"/{repo}/resolve/..%2f..%2f..%2fsecret/a",
        f"/{repo}/resolve/main/..%2f..%2fsecret",
        "/..%2f/secret/resolve/main/a",
        "/../secret",
        "/%00/a/resolve/main/b",
    ):
        connection = http.client.HTTPConnection(host)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status in (400, 404), path
        assert b"secret\n" not in answer.read()
        connection.close()


def test_commits_that_are_no_commits(api: HfApi, repo: str) -> None:
    url = f"{api.endpoint}/api/models/{repo}/commit/main"
    header = b'{"key":"header","value":{"summary":"s"}}\n'
    oid = "0" * 64
    for body in (
        b"",
        b"[]",
        b"not json",
        b'{"key":"file"}',
        b'{"key":"file","value":{"path":"a","content":"","encoding":"base64"}}',
        header + header,
        header + b'{"key":"file","value":{"path":"../a","content":""}}',
        header + b'{"key":"file","value":{"path":"a","content":"%%%","encoding":"base64"}}',
        header + b'{"key":"file","value":{"path":"a","content":3}}',
        header + b'{"key":"file","value":{"path":"README.md","content":"---\\n- a\\n---\\n"}}',
        header
        + f'{{"key":"lfsFile","value":{{"path":"a","algo":"sha256","oid":"{oid}"}}}}'.encode(),
        header + b'{"key":"lfsFile","value":{"path":"a","algo":"sha256","oid":"../../x"}}',
        header + b'{"key":"deletedFile","value":{"path":"none"}}',
        header + b'{"key":"other","value":{}}',
        header + b'{"key":"file","value":{"path":".gitattributes/b","content":""}}',
    ):
        answer = send("POST", url, content=body)
        assert answer.status_code in (400, 404), (body, answer.text)
        assert answer.json()["error"]
    assert len(api.list_repo_commits(repo)) == 1


def test_uploads_need_a_signature_and_the_right_bytes(
    api: HfApi, repo: str, shared_hub: RunningHub
) -> None:
    oid = "1" * 64
    batch = f"{api.endpoint}/{repo}.git/info/lfs/objects/batch"
    asked = {"operation": "upload", "objects": [{"oid": oid, "size": 5}], "transfers": ["basic"]}
    (row,) = send("POST", batch, json=asked).json()["objects"]
    url = row["actions"]["upload"]["href"]
    assert send("PUT", url.partition("?")[0], content=b"12345").status_code == 403
    assert send("PUT", url.replace("size=5", "size=6"), content=b"12345").status_code == 403
    assert send("PUT", url.replace(oid, "2" * 64), content=b"12345").status_code == 403
    assert send("PUT", url, content=b"123456").status_code == 413
    wrong = send("PUT", url, content=b"12345")
    assert (wrong.status_code, "not 5 bytes" in wrong.text) == (400, True)
    assert send("POST", row["actions"]["verify"]["href"], json={}).status_code == 404
    assert not list(shared_hub.root.rglob(oid))
    assert not [p for p in (shared_hub.root / "tmp").iterdir() if p.name.startswith("upload")]


def test_one_repository_cannot_claim_the_bytes_of_another(api: HfApi, repo: str) -> None:
    import hashlib

    from huggingface_hub.errors import BadRequestError

    secret = os.urandom(1000)
    api.create_commit(repo, add(m_bin=secret), commit_message="m")
    thief = api.create_repo(f"{repo}-thief").repo_id
    oid = hashlib.sha256(secret).hexdigest()
    line = f'{{"key":"lfsFile","value":{{"path":"m.bin","algo":"sha256","oid":"{oid}"}}}}'
    body = b'{"key":"header","value":{"summary":"s"}}\n' + line.encode()
    answer = send("POST", f"{api.endpoint}/api/models/{thief}/commit/main", content=body)
    assert (answer.status_code, "was not uploaded" in answer.text) == (400, True)
    with pytest.raises(BadRequestError):
        api.create_commit(thief, add(a_txt=b"1"), commit_message="m", create_pr=True)


# -- starting -----------------------------------------------------------------------------------


def test_tokens_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    for text in (
        "",
        "# nobody",
        "ada write short",
        "ada admin 0123456789abcdef",
        "ada write 0123456789abcdef more",
        "a/b write 0123456789abcdef",
        "ada write 0123456789abcdef\nbob read 0123456789abcdef",
    ):
        file.write_text(text)
        with pytest.raises(ConfigError):
            Tokens.read(file)
    file.write_text("ada write 0123456789abcdef")
    assert Tokens.read(file).caller("Bearer 0123456789abcdef").may_write
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Tokens.read(file)


def test_an_open_hub_listens_on_loopback_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokens"):
        make_server(tmp_path, host="0.0.0.0", port=0, tokens=Tokens(), ready=print)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_something_else(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError, match="not a hub"):
        Repos(Path(registry.url.removeprefix("file://")))


def test_what_interrupted_uploads_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    repos = Repos(tmp_path / "hub")
    parts, upload, young = (repos.tmp / name for name in ("parts-x", "upload-x", "upload-y"))
    parts.mkdir()
    for path in (parts / "1", upload, young):
        path.write_bytes(b"half a file")
    long_ago = time.time() - 2 * 86_400
    for path in (parts, upload):
        os.utime(path, (long_ago, long_ago))
    repos.sweep()
    assert sorted(repos.tmp.iterdir()) == [young]


def test_a_port_in_use(tmp_path: Path, shared_hub: RunningHub) -> None:
    port = int(shared_hub.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match="--port"):
        make_server(tmp_path, host="127.0.0.1", port=port, tokens=Tokens(), ready=print)


def test_without_its_extra_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingDependency, match=r"lorary\[hub\]"):
        make_server(tmp_path, host="127.0.0.1", port=0, tokens=Tokens(), ready=print)


# -- the programs that people use ---------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, str]]:
    """``registry serve`` in a process of its own; yields an environment with HF_ENDPOINT alone."""
    command = [
        sys.executable,
        "-m",
        "lorary.registry",
        "serve",
        str(tmp_path / "hub"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    match = re.fullmatch(r"HF_ENDPOINT=(http://127\.0\.0\.1:\d+)\n", said)
    assert match is not None, said
    home = {"HF_HOME": str(tmp_path / "hf"), "LORARY_HOME": str(tmp_path / "lorary")}
    yield os.environ | home | {"HF_ENDPOINT": match[1], "HF_HUB_OFFLINE": "0"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    process.stdout.close()


def hf(environment: dict[str, str], *words: object) -> str:
    program = Path(sys.executable).parent / "hf"
    done = subprocess.run(
        [program, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, *refs = sys.argv[1:]
for ref in refs:
    repo, _, revision = ref.partition("@")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, repo, revision=revision or None)
    with torch.no_grad():
        print(model(torch.arange(3, 23)[None]).logits.double().sum().item())
"""


def test_hf_and_peft_take_pushed_versions_by_hf_endpoint_alone(
    forge: Forge, served: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    no_xet = served | {"HF_HUB_DISABLE_XET": "1"}
    for seed in (1, 2):
        words = ["push", forge.folder(f"v{seed}", seed=seed), "a", "--base", tiny_base]
        command = [sys.executable, "-m", "lorary.registry", *map(str, words)]
        subprocess.run([*command, "--registry", "hf://acme"], env=no_xet, check=True)
    hf(no_xet, "download", "acme/a", "--revision", "v1", "--local-dir", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / ".cache")
    local = Registry.open(tmp_path / "folder", create=True)
    first = local.push(tmp_path / "one", "a", base=forge.card)  # what a hub adds is left out
    second = local.push(forge.folder("two", seed=2), "a", base=forge.card)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_base), "acme/a@v1", "acme/a@v2", "acme/a",
         str(local.fetch(local.resolve(f"a@{first.version}"))),
         str(local.fetch(local.resolve(f"a@{second.version}")))],
        env=no_xet, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    v1, v2, newest, local1, local2 = map(float, done.stdout.split())
    assert (v1, v2, newest) == (local1, local2, v2)
    assert v1 != v2


def test_hf_uploads_and_downloads(served: dict[str, str], tmp_path: Path) -> None:
    no_xet = served | {"HF_HUB_DISABLE_XET": "1"}
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "w.safetensors").write_bytes(os.urandom(100_000))
    hf(no_xet, "repos", "create", "acme/model", "--private")
    hf(no_xet, "upload", "acme/model", folder)
    hf(no_xet, "download", "acme/model", "--local-dir", tmp_path / "out")
    for path in ("config.json", "sub/w.safetensors"):
        assert (tmp_path / "out" / path).read_bytes() == (folder / path).read_bytes()
    assert "acme/model" in hf(no_xet, "models", "ls", "--author", "acme", "--format", "json")


def test_what_was_uploaded_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    raw = os.urandom(1000)
    for attempt in range(2):
        with running_hub(tmp_path / "hub") as hub:
            use_hub(monkeypatch, hub.address, tmp_path / "home")
            api = HfApi(endpoint=hub.address)
            if not attempt:
                api.create_repo("acme/a")
                api.create_commit("acme/a", add(m_bin=raw), commit_message="m")
            assert get(f"{hub.address}/acme/a/resolve/main/m.bin").content == raw


ODD: list[Any] = [
    None, [], 3, "x", {}, {"files": 3}, {"files": [3]}, {"files": [{}]}, {"objects": 3},
    {"files": [{"path": "a", "size": "x"}]}, {"operation": "upload"},
    {"operation": "upload", "objects": 3}, {"operation": "upload", "objects": [3]},
    {"operation": "upload", "objects": [{"oid": 3, "size": []}], "transfers": 3},
    {"parts": 3}, {"parts": [3]}, {"parts": [{"partNumber": "x"}]}, {"tag": [1]}, {"paths": 3},
    {"paths": [[1]]}, {"name": {}, "organization": []}, {"content": 3}, {"fromRepo": 1, "toRepo": 2},
    {"startingPoint": {}}, {"visibility": 3, "gated": []}, {"gated": {}},
]  # fmt: skip


def test_odd_requests_are_answered_and_never_with_500(api: HfApi, repo: str) -> None:
    import json

    at = f"/api/models/{repo}"
    batch = {"operation": "upload", "objects": [{"oid": "3" * 64, "size": 9}]}
    link = f"{api.endpoint}/{repo}.git/info/lfs/objects/batch"
    (row,) = send("POST", link, json=batch).json()["objects"]
    upload = row["actions"]["upload"]["href"].removeprefix(api.endpoint)
    addresses = [
        ("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"), ("POST", "/api/repos/move"),
        ("POST", "/api/validate-yaml"), ("PUT", f"{at}/settings"), ("POST", f"{at}/preupload/main"),
        ("POST", f"{at}/commit/main"), ("POST", f"{at}/tag/main"), ("POST", f"{at}/branch/x"),
        ("POST", f"{at}/paths-info/main"), ("POST", f"/{repo}.git/info/lfs/objects/batch"),
        ("POST", upload.replace("?", "/join?")), ("POST", upload.replace("?", "/verify?")),
        ("POST", upload.replace("size=9", "size=x")), ("GET", "/api/models?limit=-1"),
        ("GET", "/api/models?skip=1e9"), ("GET", f"{at}/tree/%ff"), ("PATCH", at),
    ]  # fmt: skip
    for method, address in addresses:
        bodies = [json.dumps(odd).encode() for odd in ODD] + [b"", b"{", b"\xff\xfe", b"[" * 9999]
        for body in bodies:
            headers = {"Content-Type": "application/json"}
            answer = send(method, api.endpoint + address, content=body, headers=headers)
            assert answer.status_code < 500, (method, address, body[:80], answer.text)
    assert api.repo_exists(repo)


# Dies at the n-th call that changes the disk, for every n, and looks at the hub each time.
EVERY_STEP = """
import functools, os, signal, sys
from pathlib import Path
from lorary.registry.localhub.repos import Repos

root = Path(sys.argv[1])
left = 0

def counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def change(repos, number):
    repos.create("acme", "a", private=True)
    repo = repos.get("acme", "a")
    entry = repo.keep(b"content %d" % number)
    made = repo.commit("main", {"a.txt": entry}, parent=repo.head(), title="t", message="", author="x")
    repo.add_ref("tags", f"v{number}", made.sha)

names = ("link", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod")
steps = 0
while True:
    steps += 1
    child = os.fork()
    if child == 0:
        repos = Repos(root)
        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        left = steps
        change(repos, steps)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    repo = Repos(root).get("acme", "a")
    if repo is not None:
        head = repo.find("main")
        for commit in repo.history(head):
            for entry in commit.files.values():
                repo.blobs.check(entry.sha256, entry.size)
        assert set(repo.refs("tags").values()) <= {commit.sha for commit in repo.history(head)}
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
assert repo.refs("tags")[f"v{steps}"] == head.sha
print(steps)
"""


def test_a_hub_killed_at_any_step_of_a_change_stays_sound(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERY_STEP, str(tmp_path / "hub")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
