"""What deleting a version does to a repository, and who wins against whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RevisionNotFoundError

from lorary.errors import AdapterNotFound, Refused
from lorary.registry import Registry
from lorary.registry.hub_client import Counter, HubClient

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


@pytest.fixture
def hub(forge: Forge, hub_url: str) -> Registry:
    """``a`` with versions 1 and 2."""
    registry = Registry.open(hub_url)
    for seed in (1, 2):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    return registry


def test_the_head_holds_the_newest_that_is_left(hub: Registry, forge: Forge) -> None:
    repo_id, api = f"{hub.url.removeprefix('hf://')}/a", HfApi()
    digest = hub.resolve("a@1").digest
    hub.delete("a@2")
    head = json.loads(Path(hf_hub_download(repo_id, "manifest.json")).read_bytes())
    assert (head["version"], head["digest"]) == (1, digest)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo_id, revision="v2")
    assert api.model_info(repo_id, revision="v1").sha
    hub.delete("a@1")
    files = {f for f in api.list_repo_files(repo_id) if not f.startswith(".")}
    assert files == {"README.md"}
    assert "All versions were deleted" in Path(hf_hub_download(repo_id, "README.md")).read_text()
    assert hub.store.names() == ["a"]
    assert (hub.list(), hub.aliases("a")) == ([], {})
    with pytest.raises(AdapterNotFound, match="version 2 of adapter 'a' was deleted"):
        hub.resolve("a")
    api.create_tag(repo_id, tag="v2")  # as if whoever deleted it had died before the tag was gone
    assert hub.push(forge.folder("3", seed=3), "a", base=forge.card).version == 3
    assert [tag.name for tag in api.list_repo_refs(repo_id).tags] == ["v3"]
    assert hub.verify().is_ok


def test_a_version_cannot_go_while_an_alias_comes(
    hub: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the commit somebody points an alias at it: the commit is refused, and the
    second look finds the alias."""
    other, real, is_first = Registry.open(hub.url), HubClient.commit, True

    def commit(self: HubClient, *args: Any, **options: Any) -> str:
        nonlocal is_first
        if is_first:
            is_first = False
            other.set_alias("a", "prod", 1)
        return real(self, *args, **options)

    monkeypatch.setattr(HubClient, "commit", commit)
    with pytest.raises(Refused, match="in use: prod points at it"):
        hub.delete("a@1")
    assert Registry.open(hub.url).aliases("a") == {"latest": 2, "prod": 1}


def test_an_upload_tells_of_its_bytes_while_they_travel(
    hub: Registry, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    real = Counter.finish

    def finish(self: Counter, total: int) -> None:
        sent.append(self._sum)
        real(self, total)

    monkeypatch.setattr(Counter, "finish", finish)
    told: list[int] = []
    size = hub.push(
        forge.folder("3", seed=3), "a", base=forge.card, progress=told.append
    ).size_bytes
    tensors = next(e for e in hub.manifest(hub.resolve("a")).files if "safetensors" in e.path)
    assert sent == [tensors.size]  # by LFS; the small files travel in the commit
    assert sum(told) == pytest.approx(2 * size, rel=0.3)
