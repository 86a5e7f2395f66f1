"""A server comes back with what was hot: hottest first, within free memory, and never by trusting a file."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from lorary.errors import AdapterNotFound, ConfigError, CorruptArtifact
from lorary.server.adapters.warm_start import FILE, StateFolder, WarmStart
from tests.server.test_residency import World, ref, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BASE = "sha256:base"


@pytest.fixture
def make() -> Iterator[Callable[[], World]]:
    made: list[World] = []

    def new() -> World:
        made.append(World())
        return made[-1]

    yield new
    for world in made:
        world.registry.gate.set()
        world.residency.close()


def run(world: World, folder: Path, base: str = BASE) -> None:
    """Start warm, wait for it, and write the state at the end."""
    warm = WarmStart(StateFolder(folder), world.residency, fingerprint=base)
    warm.start()
    warm.wait()
    warm.close()


def test_the_hottest_come_back_in_order_with_their_pins(
    make: Callable[[], World], tmp_path: Path
) -> None:
    first = make()
    for number, uses in ((1, 1), (2, 5), (3, 3)):
        first.residency.load(ref(number), pin=number == 1)
        for _ in range(uses):
            first.residency.acquire(ref(number)).release()
    run(first, tmp_path)
    second = make()
    run(second, tmp_path)
    assert second.registry.calls == [ref(n).digest for n in (2, 3, 1)]
    assert [r.pinned for r in second.residency.snapshot()] == [True, False, False]
    assert [h.uses for h in second.residency.hottest_first()] == [6, 4, 2]


def test_only_what_fits_beside_what_callers_asked_for_is_loaded(
    make: Callable[[], World], tmp_path: Path
) -> None:
    first = make()
    for number in (1, 2, 3):
        first.residency.load(ref(number))
    run(first, tmp_path)
    second = make()
    for number in (7, 8):
        second.residency.load(ref(number))
    run(second, tmp_path)
    assert [r.version for r in second.residency.snapshot()] == [3, 7, 8]
    assert second.observer.evictions == []


def test_what_is_gone_or_broken_is_passed_over(
    make: Callable[[], World], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    for number in (1, 2, 3):
        first.residency.load(ref(number))
    run(first, tmp_path)
    second = make()
    load = second.residency._load
    errors = {ref(3).digest: AdapterNotFound("gone"), ref(2).digest: CorruptArtifact("rotten")}

    def load_or_fail(resolved: object) -> object:
        error = errors.get(resolved.digest)  # type: ignore[attr-defined]
        if error is not None:
            raise error
        return load(resolved)  # type: ignore[arg-type]

    second.residency._load = load_or_fail  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        run(second, tmp_path)
    assert [r.version for r in second.residency.snapshot()] == [1]
    assert "gone" in caplog.text
    assert "rotten" in caplog.text


def test_a_run_that_ends_while_it_restores_forgets_nothing(
    make: Callable[[], World], tmp_path: Path
) -> None:
    first = make()
    for number in (1, 2, 3):
        first.residency.load(ref(number))
    run(first, tmp_path)
    second = make()
    second.registry.gate.clear()
    warm = WarmStart(StateFolder(tmp_path), second.residency, fingerprint=BASE)
    warm.start()
    wait_for(lambda: second.registry.calls)
    warm._stop.set()
    second.registry.gate.set()
    warm.close()
    kept = json.loads((tmp_path / FILE).read_text())["adapters"]
    assert {one["version"] for one in kept} == {1, 2, 3}
    assert list(tmp_path.glob("*.tmp*")) == []


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"[]", b'{"format_version": 2}', b'{"format_version": 1}']
)
def test_a_file_that_is_none_is_left_aside(
    make: Callable[[], World], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / FILE).write_bytes(content)
    run(make(), tmp_path)


def test_another_base_and_another_server(make: Callable[[], World], tmp_path: Path) -> None:
    first = make()
    first.residency.load(ref(1))
    run(first, tmp_path)
    other = make()
    run(other, tmp_path, base="sha256:other")
    assert other.registry.calls == []
    held = StateFolder(tmp_path)
    with pytest.raises(ConfigError, match="another server"):
        StateFolder(tmp_path)
    held.close()
    StateFolder(tmp_path).close()
