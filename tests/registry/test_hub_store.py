"""What is special about a registry on a hub: the repositories it makes, and what it does when the hub fails."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import (
    AccessDenied,
    AdapterNotFound,
    AlreadyExists,
    ConfigError,
    Conflict,
    CorruptArtifact,
    InvalidRef,
    InvalidRequest,
    LoraryError,
    RegistryUnavailable,
    StorageError,
    outcome,
)
from lorary.registry import Registry
from lorary.registry.hub_card import write_card
from lorary.registry.localhub.auth import Tokens
from lorary.registry.manifest import FileEntry, Interval, Metrics, Uncertainty
from tests.registry.conftest import running_hub, use_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tests.registry.conftest import Forge, RunningHub


def api_of(hub: RunningHub, token: str | None = None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.address, token=token or False)


def owner_of(url: str) -> str:
    return url.removeprefix("hf://").partition("/")[0]


def test_a_version_is_one_commit_and_a_tag(
    forge: Forge, hub_url: str, shared_hub: RunningHub
) -> None:
    registry, api = Registry.open(hub_url), api_of(shared_hub)
    first = forge.folder("one", seed=1)
    (first / "report").mkdir()
    (first / "report" / "loss.svg").write_text("<svg/>")
    registry.push(first, "a", base=forge.card)
    registry.push(forge.folder("two", seed=2), "a", base=forge.card, aliases=["prod"])
    repo = f"{owner_of(hub_url)}/a"
    titles = [commit.title.partition(":")[0] for commit in api.list_repo_commits(repo)]
    assert titles == ["alias prod to v2", "v2", "v1", "initial commit"]
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    assert tags == {f"v{n}": api.list_repo_commits(repo)[3 - n].commit_id for n in (1, 2)}
    at_root = {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"}
    assert at_root | {"report/loss.svg"} <= set(api.list_repo_files(repo, revision="v1"))
    assert "report/loss.svg" not in api.list_repo_files(repo, revision="v2")
    assert api.model_info(repo).private is True


def test_the_card_says_what_a_hub_can_be_searched_by(
    forge: Forge, hub_url: str, shared_hub: RunningHub
) -> None:
    import dataclasses

    manifest = dataclasses.replace(
        forge.manifest(),
        metrics=Metrics(primary="f1", num_examples=9, base={"f1": 0.1}, adapter={"f1": 0.9}),
        data={"source": "org/reviews", "license": "cc0-1.0"},
    )
    folder = forge.folder(manifest=manifest)
    (folder / "README.md").write_text("---\nlanguage: en\nlibrary_name: other\n---\n# My adapter\n")
    Registry.open(hub_url).push(folder, "a", base=forge.card)
    info = api_of(shared_hub).model_info(f"{owner_of(hub_url)}/a")
    card: Any = info.card_data
    assert (card.base_model, card.library_name, card.license) == ("org/tiny", "peft", "cc0-1.0")
    assert (card.language, card.datasets) == ("en", ["org/reviews"])
    assert info.pipeline_tag == "text-generation"
    (result,) = card.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "f1",
        0.9,
        "org/reviews",
    )
    found = api_of(shared_hub).list_models(
        author=owner_of(hub_url), filter=["base_model:adapter:org/tiny", "lorary"]
    )
    assert [model.id for model in found] == [f"{owner_of(hub_url)}/a"]


def test_the_card_shows_gains_and_the_pictures_of_the_report(forge: Forge) -> None:
    import dataclasses

    sure = Uncertainty(adapter=Interval(low=0.7, high=1), difference=Interval(low=0.6, high=0.9))
    files = ("report/loss_curve.png", "report/report.html", "report/metrics.json")
    manifest = dataclasses.replace(
        forge.manifest(),
        name="a",
        metrics=Metrics(
            primary="f1",
            num_examples=9,
            base={"f1": 0.1, "ece": 0.3},
            adapter={"f1": 0.9, "ece": 0.2},
            uncertainty={"f1": sure},
        ),
        files=tuple(FileEntry(path=path, size=1, sha256="ab" * 32) for path in files),
    )
    folder = forge.folder(manifest=manifest)
    card = write_card(folder, manifest, "acme/a").decode()
    assert "| f1 | 0.1 | 0.9 | +0.6 to +0.9 |\n" in card
    assert "| ece (lower is better) | 0.3 | 0.2 |  |\n" in card
    assert card.count("![") == 1
    assert "![loss curve](report/loss_curve.png)" in card
    assert "(report/report.html)" in card


def test_a_prefix_keeps_registries_of_one_owner_apart(forge: Forge, hub_url: str) -> None:
    one, two = Registry.open(f"{hub_url}/one"), Registry.open(f"{hub_url}/two")
    one.push(forge.folder("a", seed=1), "a", base=forge.card)
    two.push(forge.folder("b", seed=2), "a", base=forge.card)
    assert [info.digest for info in one.list()] != [info.digest for info in two.list()]
    assert Registry.open(hub_url).resolve("one-a").digest == one.resolve("a").digest


@pytest.mark.parametrize("address", ["hf://", "hf://a/b/c", "hf://a b", "hf://a--b", "hf://../x"])
def test_addresses_that_name_no_owner(address: str) -> None:
    with pytest.raises(ConfigError, match="hf://owner"):
        Registry.open(address)


def test_names_that_no_repository_can_have(forge: Forge, hub_url: str) -> None:
    registry = Registry.open(hub_url)
    for name, why in (("team/a", "the owner is the team"), ("a--b", "cannot name a repository")):
        with pytest.raises(InvalidRef, match=why):
            registry.push(forge.folder(name.replace("/", "-")), name, base=forge.card)
        with pytest.raises(InvalidRef, match=why):
            registry.resolve(name)


def test_a_repository_that_is_no_adapter_of_ours_is_left_alone(
    forge: Forge, hub_url: str, shared_hub: RunningHub
) -> None:
    api, repo = api_of(shared_hub), f"{owner_of(hub_url)}/a"
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="model.txt", repo_id=repo)
    registry = Registry.open(hub_url)
    with pytest.raises(AlreadyExists, match=r"model\.txt"):
        registry.push(forge.folder(), "a", base=forge.card)
    assert "model.txt" in api.list_repo_files(repo)
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")


def test_a_missing_or_moved_tag_is_made_up_for(
    forge: Forge,
    hub_url: str,
    shared_hub: RunningHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    registry, api = Registry.open(hub_url), api_of(shared_hub)
    repo = f"{owner_of(hub_url)}/a"
    for seed in (1, 2):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    right = api.model_info(repo, revision="v1").sha
    api.delete_tag(repo, tag="v1")
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "other-machine"))
    elsewhere = Registry.open(hub_url)
    digest = registry.resolve("a@1").digest
    assert elsewhere.manifest(elsewhere.resolve("a@1")).digest == digest
    api.create_tag(repo, tag="v1", revision="v2")
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "third-machine"))
    third = Registry.open(hub_url)
    assert (third.fetch(third.resolve("a@1")) / "manifest.json").exists()
    api.delete_tag(repo, tag="v1")
    third.push(forge.folder("again", seed=2), "a", base=forge.card)
    assert api.model_info(repo, revision="v1").sha == right


def test_a_version_whose_bytes_changed_on_the_hub_is_refused(
    forge: Forge,
    hub_url: str,
    shared_hub: RunningHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    registry = Registry.open(hub_url)
    registry.push(forge.folder(), "a", base=forge.card)
    manifest = registry.manifest(registry.resolve("a"))
    (entry,) = (e for e in manifest.files if e.path.endswith(".safetensors"))
    blob = next(shared_hub.root.rglob(f"*{owner_of(hub_url)}*/**/{entry.sha256}"))
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(raw)
    assert not registry.verify().is_ok
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "other-machine"))
    elsewhere = Registry.open(hub_url)
    with pytest.raises(CorruptArtifact, match="not what its manifest says"):
        elsewhere.pull("a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_fetched_is_checked_and_fetched_again_when_it_rots(
    forge: Forge, hub_url: str
) -> None:
    registry = Registry.open(hub_url)
    registry.push(forge.folder(), "a", base=forge.card)
    resolved = registry.resolve("a")
    tensors = registry.fetch(resolved) / "adapter_model.safetensors"
    good = tensors.read_bytes()
    tensors.chmod(0o644)
    tensors.write_bytes(b"\0" * len(good))
    assert (registry.fetch(resolved) / "adapter_model.safetensors").read_bytes() == good


def test_a_push_that_died_before_its_tag_can_be_repeated(
    forge: Forge, hub_url: str, shared_hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.registry.hub_client import HubClient

    registry, folder = Registry.open(hub_url), forge.folder()

    def die(*_: object) -> None:
        raise RegistryUnavailable("killed")

    with monkeypatch.context() as patched:
        patched.setattr(HubClient, "tag", die)
        with pytest.raises(RegistryUnavailable):
            registry.push(folder, "a", base=forge.card)
    assert Registry.open(hub_url).resolve("a").version == 1
    assert registry.push(folder, "a", base=forge.card).version == 1
    tags = api_of(shared_hub).list_repo_refs(f"{owner_of(hub_url)}/a").tags
    assert [tag.name for tag in tags] == ["v1"]


def test_equal_moves_at_one_moment_have_one_winner(forge: Forge, hub_url: str) -> None:
    """The client leaves out files that the head has: two equal changes must not both seem to win."""
    registry = Registry.open(hub_url)
    registry.push(forge.folder(), "a", base=forge.card)
    barrier = threading.Barrier(4)
    said: list[str] = []

    def move() -> None:
        mine = Registry.open(hub_url)
        barrier.wait()
        try:
            mine.set_alias("a", "prod", 1, expect=None, actor="ada")
            said.append("won")
        except Conflict:
            said.append("lost")

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["lost"] * 3 + ["won"]
    assert len(Registry.open(hub_url).log("a")) == 1


def test_a_watching_registry_answers_from_memory(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lorary.registry.hub_repos.RENEW_S", 0.05)
    with running_hub(tmp_path / "hub") as hub:
        use_hub(monkeypatch, hub.address, tmp_path / "home")
        writer = Registry.open("hf://acme")
        writer.push(forge.folder("1", seed=1), "a", base=forge.card, aliases=["prod"])
        server = Registry.open("hf://acme", watch=True)
        assert server.resolve("a@prod").version == 1
        digest = writer.push(forge.folder("2", seed=2), "a", base=forge.card).digest
        writer.set_alias("a", "prod", 2)
        writer.push(forge.folder("3", seed=3), "b", base=forge.card)
        wait_for(lambda: server.resolve("a@prod").digest == digest)
        wait_for(lambda: "b" in (server._store._repos._known or ()))  # type: ignore[attr-defined]
        with caplog.at_level(logging.WARNING):
            assert server.resolve("b").version == 1
    wait_for(lambda: "answering from memory" in caplog.text)
    connecting: list[int] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        connecting.append(threading.get_ident())
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    for _ in range(100):
        assert server.resolve("a@prod").digest == digest
        with pytest.raises(AdapterNotFound):
            server.resolve("unknown@prod")
    wait_for(lambda: connecting)  # who watches goes on asking for the hub, which is gone
    assert threading.get_ident() not in connecting
    assert server.fetch(server.resolve("b")).exists()
    assert [(info.name, info.version) for info in server.list()] == [("a", 1), ("a", 2), ("b", 1)]
    server._store.close()  # type: ignore[attr-defined]


def wait_for(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            if is_so():
                return
        except LoraryError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- refusals and failures ----------------------------------------------------------------------

WRITE, READ = "writers-token-0123", "readers-token-0123"


@pytest.fixture
def guarded_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningHub]:
    """A hub with tokens; the client has none yet."""
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    file.write_text(f"# people\nada write {WRITE}\n\nci read {READ}\n")
    with running_hub(tmp_path / "hub", tokens=Tokens.read(file)) as hub:
        use_hub(monkeypatch, hub.address, tmp_path / "home")
        yield hub


def test_tokens_decide_who_may_do_what(
    forge: Forge, guarded_hub: RunningHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = forge.folder()
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        Registry.open("hf://acme").push(folder, "a", base=forge.card)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    Registry.open("hf://acme").push(folder, "a", base=forge.card, aliases=["prod"])
    monkeypatch.setenv("HF_TOKEN", READ)
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "reader"))
    reader = Registry.open("hf://acme")
    assert reader.fetch(reader.resolve("a@prod")).exists()
    with pytest.raises(AccessDenied, match="may only read"):
        reader.set_alias("a", "prod", None)
    with pytest.raises(AccessDenied, match="may only read"):
        reader.push(forge.folder("b", seed=2), "a", base=forge.card)
    monkeypatch.setenv("HF_TOKEN", "nobodys-token-0123")
    with pytest.raises(AccessDenied, match="401"):
        Registry.open("hf://acme").resolve("a")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessDenied, match="does not exist, or"):
        Registry.open("hf://acme").resolve("a")
    assert Registry.open("hf://acme").list() == []


def test_a_gated_repository_says_so(
    forge: Forge, guarded_hub: RunningHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE)
    Registry.open("hf://acme").push(forge.folder(), "a", base=forge.card)
    api_of(guarded_hub, WRITE).update_repo_settings("acme/a", gated="manual")
    monkeypatch.setenv("HF_TOKEN", READ)
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "reader"))
    with pytest.raises(AccessDenied, match="gated"):
        Registry.open("hf://acme").resolve("a")


@contextmanager
def answering(
    status: int, body: Any = None, headers: dict[str, str] | None = None
) -> Iterator[str]:
    """A hub that answers everything alike; 0 does not answer at all."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if not status:
                time.sleep(1.5)
                return
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            raw = json.dumps(body if body is not None else {"error": "so it is"}).encode()
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - the server's names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


REFUSALS: list[tuple[int, dict[str, str], type[LoraryError], int, str]] = [
    (400, {}, InvalidRequest, 2, "so it is"),
    (401, {}, AccessDenied, 7, "hf auth login"),
    (403, {}, AccessDenied, 7, "the token may not"),
    (403, {"X-Error-Code": "GatedRepo"}, AccessDenied, 7, "gated"),
    (404, {"X-Error-Code": "RepoNotFound"}, AdapterNotFound, 3, "not in the registry"),
    (409, {}, Conflict, 4, "so it is"),
    (429, {"Retry-After": "17"}, RegistryUnavailable, 6, "after 17 s"),
    (429, {"RateLimit": '"api";r=0;t=55'}, RegistryUnavailable, 6, "after 55 s"),
    (500, {}, RegistryUnavailable, 6, "answered 500"),
    (503, {}, RegistryUnavailable, 6, "answered 503"),
    (507, {}, StorageError, 8, "no room"),
    (0, {}, RegistryUnavailable, 6, "Check HF_ENDPOINT"),
]


@pytest.mark.parametrize(("status", "headers", "error", "code", "text"), REFUSALS)
def test_what_a_hub_answers_becomes_an_exit_code(
    status: int,
    headers: dict[str, str],
    error: type[LoraryError],
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if not status:
        monkeypatch.setattr("lorary.registry.hub_client.TIMEOUT_S", 0.5)
    with answering(status, headers=headers) as address:
        use_hub(monkeypatch, address, tmp_path / "home")
        with pytest.raises(error, match=text) as raised:
            Registry.open("hf://acme").resolve("a")
    assert outcome(raised.value).exit_code == code


def test_no_hub_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as deaf:  # nobody listens there, and nobody else can
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        for address in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
            use_hub(monkeypatch, address, tmp_path / "home")
            with pytest.raises(RegistryUnavailable, match="HF_ENDPOINT"):
                Registry.open("hf://acme").resolve("a")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RegistryUnavailable, match="HF_HUB_OFFLINE"):
        Registry.open("hf://acme").resolve("a")


def test_the_command_takes_a_hub(
    forge: Forge, hub_url: str, tiny_base: Path, tmp_path: Path
) -> None:
    def command(*args: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "lorary.registry", *map(str, args), "--registry", hub_url]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    pushed = command("push", forge.folder(), "a", "--base", tiny_base, "--alias", "prod", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["aliases"] == ["prod"]
    pulled = command("pull", "a@prod", tmp_path / "out", "--json")
    assert pulled.returncode == 0, pulled.stderr
    missing = command("show", "b")
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)


def test_only_a_hub_needs_its_client() -> None:
    code = (
        "import sys, tempfile\n"
        "from lorary.registry import cli, cli_options\n"
        "print(sorted({'numpy', 'starlette', 'huggingface_hub'} & set(sys.modules)))\n"
        "cli_options.open_registry(tempfile.mkdtemp() + '/r', create=True).list()\n"
        "print(sorted({'starlette', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"
