"""Waiting for a version on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.server.engine.request import Lease

POLL_S = 0.01
"""How often a lease is looked at; loads take tens of milliseconds."""


async def arrived(lease: Lease) -> None:
    """Return once a version that is held is on the device.

    Raises:
        LoraryError: why its load failed.
    """
    while not lease.is_ready:
        if lease.error is not None:
            raise lease.error
        await asyncio.sleep(POLL_S)
