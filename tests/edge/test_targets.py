from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from lorary.errors import InvalidRequest
from lorary.server.access import identity
from lorary.server.access.grants import Tenant
from lorary.server.targets import MAX_CACHED_CHARS, MAX_CACHED_LABELS, Prompts, Targets
from tests.edge.fakes import FINGERPRINT, FakePrompts, FakeRegistry, FakeResolved

if TYPE_CHECKING:
    from collections.abc import Iterator


class Deprecating(FakeRegistry):
    def resolve(self, ref: str) -> FakeResolved:
        return dataclasses.replace(
            super().resolve(ref), deprecated="on Monday by ada: wrong labels"
        )


async def test_a_deprecated_version_is_served_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    targets = Targets(Deprecating(), base="tiny", fingerprint=FINGERPRINT)
    try:
        for _ in range(3):
            assert (await targets.resolve("alpha")).version == 1
    finally:
        targets.close()
    assert caplog.messages == [
        "serving alpha@1, which was deprecated on Monday by ada: wrong labels"
    ]


class CountingPrompts(FakePrompts):
    def __init__(self) -> None:
        self.asked: list[str] = []

    def label_ids(self, label: str, *, field: str = "labels") -> tuple[int, ...]:
        self.asked.append(label)
        return super().label_ids(label, field=field)


@pytest.fixture
def builder() -> CountingPrompts:
    return CountingPrompts()


@pytest.fixture
def prompts(builder: CountingPrompts) -> Iterator[Prompts]:
    found = Prompts(builder, str)
    yield found
    found.close()


async def test_labels_are_read_once(builder: CountingPrompts, prompts: Prompts) -> None:
    for _ in range(2):
        assert await prompts.label_ids(["3", "4"]) == ((3,), (4,))
        assert await prompts.label_ids(("4", "3")) == ((4,), (3,))
    assert builder.asked == ["3", "4", "4", "3"]


async def test_labels_that_others_use_do_not_show(
    builder: CountingPrompts, prompts: Prompts
) -> None:
    for name in ("ada", "bob", "ada"):
        token = identity.current.set(Tenant(name=name))
        try:
            await prompts.label_ids(["3"])
        finally:
            identity.current.reset(token)
    assert builder.asked == ["3", "3"]


async def test_only_so_many_labels_are_remembered(
    builder: CountingPrompts, prompts: Prompts
) -> None:
    long = "1" * (MAX_CACHED_CHARS + 1)
    for label in (long, long, *map(str, range(MAX_CACHED_LABELS + 1)), "1", "0"):
        await prompts.label_ids([label])
    assert builder.asked.count(long) == 2
    assert (builder.asked.count("1"), builder.asked.count("0")) == (1, 2)


async def test_bad_labels_are_bad_every_time(prompts: Prompts) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="has the same tokens as another"):
            await prompts.label_ids(["3", "03"])
