"""What was fetched from a Hub stays within its bytes, goes by last use, and never under a reader's hands."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import RegistryUnavailable, StorageError
from lorary.registry import Registry
from lorary.registry import cache_budget as module
from lorary.registry.hub_client import HubClient

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.conftest import Forge


@pytest.fixture
def library(forge: Forge, hub_url: str) -> list[str]:
    """Four adapters on a hub, none of them on this machine."""
    registry = Registry.open(hub_url)
    names = [f"a{k}" for k in range(4)]
    for seed, name in enumerate(names):
        registry.push(forge.folder(name, seed=seed), name, base=forge.card)
    budget = registry._store._versions._budget  # type: ignore[attr-defined]
    for folder in unpacked(registry):
        age(folder, 3600)
    budget.free(1 << 40)
    assert unpacked(registry) == []
    return names


def unpacked(registry: Registry) -> list[Path]:
    store: Any = registry._store
    return sorted((store._versions.cache.root / "unpacked").iterdir())


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def size_of(registry: Registry, name: str) -> int:
    return sum(e.size for e in registry.manifest(registry.resolve(name)).files)


def test_the_longest_unused_goes_and_comes_back(library: list[str], hub_url: str) -> None:
    probe = Registry.open(hub_url)
    each = max(size_of(probe, name) for name in library)
    manifests = probe._store._versions._budget.num_bytes()  # type: ignore[attr-defined]
    limit = manifests + int(2.5 * each)
    registry = Registry.open(hub_url, cache_bytes=limit)
    folders = {}
    for step, name in enumerate(library[:2]):
        folders[name] = registry.fetch(registry.resolve(name))
        age(folders[name], 3600 - step)
    # a0 is used again: a1 is now the longest unused.
    registry.fetch(registry.resolve("a0"))
    age(folders["a0"], 600)
    registry.fetch(registry.resolve("a2"))
    assert folders["a0"].exists()
    assert not folders["a1"].exists()
    assert registry._store._versions._budget.num_bytes() <= limit  # type: ignore[attr-defined]
    assert registry.fetch(registry.resolve("a1")).exists()


def test_what_was_just_used_stays_over_the_budget(library: list[str], hub_url: str) -> None:
    registry = Registry.open(hub_url, cache_bytes=1)
    folders = [registry.fetch(registry.resolve(name)) for name in library]
    assert all(folder.exists() for folder in folders)


def test_a_full_disk_makes_room_once_and_leaves_nothing_half_done(
    library: list[str], hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S26: the first write finds no space; with something to evict the fetch succeeds, else it is said."""
    registry = Registry.open(hub_url)
    download = HubClient.download
    full = [True]

    def fill_up(*arguments: Any, **options: Any) -> Any:
        if full:
            full.pop()
            raise StorageError("cannot write") from OSError(errno.ENOSPC, "No space left on device")
        return download(*arguments, **options)

    monkeypatch.setattr(HubClient, "download", fill_up)
    with pytest.raises(StorageError, match="cannot write"):
        registry.fetch(registry.resolve("a0"))
    assert unpacked(registry) == []
    old = registry.fetch(registry.resolve("a0"))
    age(old, 3600)
    full.append(True)
    assert registry.fetch(registry.resolve("a1")).exists()
    assert not old.exists()


def test_what_was_evicted_is_unavailable_while_the_hub_is_away(
    library: list[str], hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S23: what is on disk is served, what is not says so."""
    registry = Registry.open(hub_url)
    here, gone = (registry.resolve(name) for name in library[:2])
    folder = registry.fetch(here)
    registry.manifest(gone)
    from huggingface_hub import constants

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    offline = Registry.open(hub_url)
    offline._store._repos._states = registry._store._repos._states  # type: ignore[attr-defined]
    offline._store._repos._watches = True  # type: ignore[attr-defined]
    assert offline.fetch(here) == folder
    assert offline.manifest(gone).name == "a1"
    with pytest.raises(RegistryUnavailable):
        offline.fetch(gone)


def test_two_processes_on_one_folder_never_see_a_torn_version(
    library: list[str], hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S27: another process fetches within a tiny budget and no grace, as fast as it can, and so do we."""
    monkeypatch.setattr(module, "GRACE_S", 0.0)
    code = textwrap.dedent(
        f"""
        import random, sys
        from lorary.registry import Registry
        from lorary.registry import cache_budget
        cache_budget.GRACE_S = 0.0
        registry = Registry.open({hub_url!r}, cache_bytes=1)
        for step in range(8):
            registry.fetch(registry.resolve(random.Random(step).choice({library!r})))
        """
    )
    registry = Registry.open(hub_url, cache_bytes=1)
    problems: list[BaseException] = []

    def fetch_all() -> None:
        try:
            for step in range(8):
                # fetch itself reads and checks every byte of what it returns
                registry.fetch(registry.resolve(library[step % 4]))
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            problems.append(error)

    with subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) as other:
        threads = [threading.Thread(target=fetch_all) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert other.wait(120) == 0
    assert problems == []
    root = registry._store._versions.cache.root  # type: ignore[attr-defined]
    assert not [p for p in (root / "tmp").iterdir() if p.name.startswith(("evicted", "unpack"))]
