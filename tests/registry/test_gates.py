"""Rules hold when many act at once: what a gate looked at is what its move follows on."""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from lorary.errors import AdapterNotFound, Refused
from lorary.registry import Registry
from lorary.registry.manifest import Metrics

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

NUM_VERSIONS = 8


@pytest.fixture
def graded(forge: Forge, registry: Registry) -> Registry:
    """``a`` with versions 1 to 8 of accuracy 0.1 to 0.8."""
    for version in range(1, NUM_VERSIONS + 1):
        metrics = Metrics(
            primary="accuracy", num_examples=9, base={}, adapter={"accuracy": version / 10}
        )
        manifest = dataclasses.replace(forge.manifest(), metrics=metrics)
        folder = forge.folder(str(version), seed=version, manifest=manifest)
        registry.push(folder, "a", base=forge.card)
    return registry


@pytest.fixture
def eager() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("eager")
def test_an_alias_that_may_only_rise_only_rises(graded: Registry) -> None:
    def climb(seed: int) -> None:
        mine = Registry.open(graded.url)
        versions = list(range(1, NUM_VERSIONS + 1))
        random.Random(seed).shuffle(versions)
        for version in versions:
            try:
                mine.set_alias("a", "prod", version, require=["accuracy>prod"])
            except Refused:
                continue

    together([functools.partial(climb, seed) for seed in range(4)])
    held = [move.to_version or 0 for move in graded.log("a")]
    assert held == sorted(set(held))
    assert held[-1] == NUM_VERSIONS
    for before, move in zip([None, *held], graded.log("a"), strict=False):
        (figure,) = move.figures
        assert (figure.holder, figure.is_met) == (before, True)


@pytest.mark.usefixtures("eager")
def test_no_alias_is_left_at_a_deleted_version(graded: Registry) -> None:
    refused: list[str] = []

    def point(version: int) -> None:
        try:
            Registry.open(graded.url).set_alias("a", f"at-{version}", version)
        except AdapterNotFound:
            refused.append("point")

    def delete(version: int) -> None:
        try:
            Registry.open(graded.url).delete(f"a@{version}")
        except Refused:
            refused.append("delete")

    calls: list[Callable[[], None]] = []
    for version in range(1, NUM_VERSIONS + 1):
        calls += [functools.partial(point, version), functools.partial(delete, version)]
    random.Random(0).shuffle(calls)
    together(calls)
    assert len(refused) == NUM_VERSIONS  # of every two, one
    deleted = graded.marks("a").deleted
    assert not set(graded.aliases("a").values()) & deleted.keys()
    assert len(deleted) == refused.count("point")
