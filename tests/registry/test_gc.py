"""A collection takes nothing that anybody needs, or may be about to need."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import CorruptArtifact
from lorary.registry import Registry
from lorary.registry.local import LocalStore
from lorary.registry.marks import Mark
from lorary.registry.results import Freed

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

NOTHING = Freed(num_blobs=0, num_folders=0, num_left_overs=0, num_bytes=0)
LONG_AGO = Mark(at="2026-01-01T00:00:00Z", actor="ada", kind="delete", version=1)


def root(registry: Registry) -> Path:
    return Path(registry.url.removeprefix("file://"))


def age(registry: Registry) -> None:
    """Make everything two days old."""
    past = time.time() - 2 * 86400
    for path in root(registry).rglob("*"):
        os.utime(path, (past, past), follow_symlinks=False)


def test_what_is_young_stays(forge: Forge, registry: Registry) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    registry.store.mark("a", LONG_AGO)
    assert registry.gc() == NOTHING
    age(registry)
    (root(registry) / "tmp" / "push-1").mkdir()
    (root(registry) / "tmp" / "push-1" / "half").write_bytes(b"x" * 1000)
    freed = registry.gc(is_dry=True)
    assert (freed.num_blobs, freed.num_folders, freed.num_left_overs) == (3, 1, 0)
    sizes = [p.stat().st_size for p in (root(registry) / "blobs").rglob("*") if p.is_file()]
    assert freed.num_bytes == sum(sizes)
    age(registry)
    assert registry.gc() == dataclasses.replace(
        freed, num_left_overs=1, num_bytes=freed.num_bytes + 1000
    )
    assert registry.gc() == NOTHING
    assert not [p for p in (root(registry) / "blobs").rglob("*") if p.is_file()]


def test_a_file_that_another_version_shares_stays(forge: Forge, registry: Registry) -> None:
    one = registry.push(forge.folder("one"), "a", base=forge.card)
    registry.push(forge.folder("two"), "b", base=forge.card)
    registry.store.mark("a", LONG_AGO)
    age(registry)
    assert registry.gc().num_blobs == 1  # the manifest alone is its own
    assert registry.resolve("b").digest == one.digest
    assert registry.verify().is_ok


def test_a_version_that_cannot_be_read_stops_everything(forge: Forge, registry: Registry) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    pointer = registry.store.pointer("a", 1)
    assert pointer is not None
    manifest = root(registry) / "blobs/sha256" / pointer.manifest_sha256[:2]
    (manifest / pointer.manifest_sha256).unlink()
    age(registry)
    with pytest.raises(CorruptArtifact, match="nothing was removed"):
        registry.gc()
    assert len([p for p in (root(registry) / "blobs").rglob("*") if p.is_file()]) == 2


def test_a_push_that_relies_on_old_blobs_is_waited_for(
    forge: Forge, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blobs are there and nothing needs them: a push finds them, and they must not go before its
    version points at them."""
    registry.push(forge.folder("one"), "a", base=forge.card)
    registry.store.mark("a", LONG_AGO)
    age(registry)
    freed: list[Freed] = []
    collector = threading.Thread(target=lambda: freed.append(registry.gc()))
    real = LocalStore._take_next

    def take_next(*args: Any) -> Any:
        collector.start()
        collector.join(0.3)
        assert collector.is_alive()
        return real(*args)

    monkeypatch.setattr(LocalStore, "_take_next", take_next)
    info = registry.push(forge.folder("two"), "a", base=forge.card)
    collector.join()
    assert info.version == 2
    assert freed[0].num_blobs == 1  # the first one's manifest
    assert registry.verify().is_ok
