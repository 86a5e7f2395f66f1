from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lorary.server.targets import Targets
from tests.edge.fakes import FINGERPRINT, FakeRegistry, FakeResolved

if TYPE_CHECKING:
    import pytest


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
