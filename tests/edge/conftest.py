"""A server around fakes, on real sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from tests.edge.fakes import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.edge.fakes import Edge


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with serving() as running:
        yield running
