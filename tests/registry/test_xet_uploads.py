"""Uploads by Xet to a hub of one's own, with the client's own ``hf_xet``."""

from __future__ import annotations

import os
import random
import struct
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorary.registry.localhub import xet
from lorary.registry.localhub.problems import HubProblem
from tests.registry.conftest import running_hub, use_hub
from tests.registry.test_local_hub import add, get, send

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tests.registry.conftest import RunningHub


@pytest.fixture
def api(shared_hub: RunningHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    """The Hub's client with Xet on."""
    from huggingface_hub import HfApi

    use_hub(monkeypatch, shared_hub.address, tmp_path / "home", xet=True)
    return HfApi(endpoint=shared_hub.address)


@pytest.fixture
def repo(api: HfApi) -> str:
    return str(api.create_repo(f"o{uuid.uuid4().hex[:12]}/model").repo_id)


def weights(count: int, seed: int = 0) -> bytes:
    raw: bytes = np.random.default_rng(seed).standard_normal(count).astype(np.float32).tobytes()
    return raw


def test_files_of_every_kind_arrive(api: HfApi, repo: str, shared_hub: RunningHub) -> None:
    files = {
        "weights": weights(500_000),  # several chunks, compressed
        "noise": random.Random(0).randbytes(300_000),  # several chunks, as they are
        "zeros": bytes(400_000),  # one chunk many times
        "tiny": b"1",
    }
    operations = add(**{f"{name}_safetensors": raw for name, raw in files.items()})
    api.create_commit(repo, operations, commit_message="all")
    assert list(shared_hub.root.glob(f"repos/{repo.replace('/', '%2F')}/xorbs/*"))
    for name, raw in files.items():
        assert get(f"{api.endpoint}/{repo}/resolve/main/{name}.safetensors").content == raw


def test_only_what_changed_travels(api: HfApi, repo: str, shared_hub: RunningHub) -> None:
    def stored() -> int:
        folder = shared_hub.root / "repos" / repo.replace("/", "%2F") / "xorbs"
        return sum(file.stat().st_size for file in folder.iterdir())

    first = weights(1_000_000)
    second = first[:2_000_000] + b"changed" + first[2_000_000:]
    api.create_commit(repo, add(a_safetensors=first), commit_message="one")
    before = stored()
    api.create_commit(repo, add(a_safetensors=second), commit_message="two")
    assert stored() - before < len(first) // 8
    assert get(f"{api.endpoint}/{repo}/resolve/main/a.safetensors").content == second


def test_a_repository_made_again_gets_everything_again(api: HfApi, repo: str) -> None:
    """The client remembers what it has sent to an address, and that address is gone."""
    raw = weights(200_000, seed=7)
    for _ in range(2):
        api.create_commit(repo, add(a_safetensors=raw), commit_message="one")
        assert get(f"{api.endpoint}/{repo}/resolve/main/a.safetensors").content == raw
        api.delete_repo(repo)
        api.create_repo(repo)


def token_of(api: HfApi, repo: str, scope: str) -> Any:
    return get(f"{api.endpoint}/api/models/{repo}/xet-{scope}-token/main").json()


def test_chunks_need_the_right_token(api: HfApi, repo: str) -> None:
    name = "ab" * 32
    write, read = token_of(api, repo, "write"), token_of(api, repo, "read")
    at = f"{write['casUrl']}/v1/xorbs/default/{name}"

    def status(token: str, url: str = at) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        answer = send("POST", url, content=b"not a xorb", headers=headers)
        return int(answer.status_code)

    assert status(write["accessToken"]) == 400  # allowed, and no xorb
    assert status(read["accessToken"]) == 401
    assert status("none") == 401
    assert status(write["accessToken"].replace("write", "read")) == 403
    assert status(write["accessToken"][:-1] + "x") == 401
    other = api.create_repo(f"{repo}-other").repo_id
    assert status(token_of(api, str(other), "write")["accessToken"]) == 403
    climbing = at.replace(name, "..%2f..%2fsettings.json")
    assert status(write["accessToken"], climbing) == 400


def test_a_shard_that_lies_about_a_file_is_refused(
    api: HfApi, repo: str, shared_hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks are those that were sent; the sha256 they are to have is another."""
    read_shard = xet.read_shard
    lie = "ab" * 32

    def lying(shard: bytes) -> list[xet.XetFile]:
        return [xet.XetFile(hash=f.hash, sha256=lie, terms=f.terms) for f in read_shard(shard)]

    monkeypatch.setattr("lorary.registry.localhub.xet_app.read_shard", lying)
    with pytest.raises(Exception, match="400"):
        api.create_commit(repo, add(a_safetensors=weights(50_000, 3)), commit_message="one")
    assert not list(shared_hub.root.rglob(lie))
    assert len(api.list_repo_commits(repo)) == 1


def test_without_hf_xet_the_hub_says_what_to_do(
    api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    answer = get(f"{api.endpoint}/api/models/{repo}/xet-write-token/main")
    assert (answer.status_code, "HF_HUB_DISABLE_XET=1" in answer.text) == (501, True)


def test_uploads_survive_a_restart_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    raw = weights(100_000, seed=5)
    for attempt in range(2):
        with running_hub(tmp_path / "hub") as hub:
            use_hub(monkeypatch, hub.address, tmp_path / "home", xet=True)
            api = HfApi(endpoint=hub.address)
            api.create_repo("acme/a", exist_ok=True)
            grown = raw + os.urandom(1000) * attempt
            api.create_commit("acme/a", add(a_safetensors=grown), commit_message=str(attempt))
            assert get(f"{hub.address}/acme/a/resolve/main/a.safetensors").content == grown


# -- what nobody's client sends -----------------------------------------------------------------


def chunk(raw: bytes, *, version: int = 0, length: int | None = None) -> bytes:
    size = (len(raw) if length is None else length).to_bytes(3, "little")
    return bytes([version]) + size + b"\0" + len(raw).to_bytes(3, "little") + raw


def test_the_chunks_of_a_xorb_are_walked_through() -> None:
    assert xet.boundaries(chunk(b"abc") + chunk(b"")) == [0, 11, 19]
    assert xet.boundaries(chunk(b"abc") + b"XETBLOB and an index") == [0, 11]


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0", b"XETBLOB", chunk(b"abc")[:-1], chunk(b"abc", version=1), chunk(b"a", length=99),
     chunk(b"a") + b"\0\0", chunk(b"a") + b"trailing"],
)  # fmt: skip
def test_what_is_no_xorb(raw: bytes) -> None:
    with pytest.raises(HubProblem, match="no xorb"):
        xet.boundaries(raw)


def row(raw: bytes, flags: int, count: int) -> bytes:
    return struct.pack("<32sIIQ", raw, flags, count, 0)


HEADER, END = bytes(48), row(b"\xff" * 32, 0, 0)


def test_a_shard_with_and_without_rows_to_verify() -> None:
    term = struct.pack("<32sIIII", b"\x01" * 32, 0, 5, 0, 1)
    sha256 = row(b"\x02" * 32, 0, 0)
    plain = row(b"\x03" * 32, 1 << 30, 1) + term + sha256
    verified = row(b"\x03" * 32, 3 << 30, 1) + term + bytes(48) + sha256
    one, two = xet.read_shard(HEADER + plain + verified + END)
    assert one == two
    assert (one.size, one.sha256) == (5, "02" * 32)


@pytest.mark.parametrize(
    "raw",
    [b"", HEADER, HEADER + END[:-1], HEADER + row(b"\x03" * 32, 1 << 30, 2**32 - 1) + END,
     HEADER + row(b"\x03" * 32, 1 << 30, 1) + END, HEADER + row(b"\x03" * 32, 0, 0) + END],
)  # fmt: skip
def test_what_is_no_shard(raw: bytes) -> None:
    with pytest.raises(HubProblem):
        xet.read_shard(raw)
