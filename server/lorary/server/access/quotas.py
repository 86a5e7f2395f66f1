"""How much each tenant may ask for: calls at once, and calls a minute."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorary.server.access.grants import Tenant

BURST_S = 10.0
"""What a tenant may use at once of a rate: what it is worth in this time, one call at least."""


@dataclass(slots=True)
class _Use:
    num_calls: int = 0
    tokens: float = 0.0
    filled_s: float = 0.0


class Quotas:
    """What every tenant uses now; the event loop's alone.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def held(self, tenant: Tenant) -> Iterator[None]:
        """Count a call while it runs.

        Raises:
            QuotaExceeded: it is one too many; says when another may be let through.
        """
        use = self._uses.get(tenant.name)
        if use is None:
            use = self._uses[tenant.name] = _Use(tokens=_burst(tenant), filled_s=self._clock())
        if tenant.max_calls and use.num_calls >= tenant.max_calls:
            raise QuotaExceeded(
                f"tenant '{tenant.name}' has {use.num_calls} calls in flight, and may have "
                f"{tenant.max_calls}. Wait for one to end; retrying is safe.",
                subject=f"tenant:{tenant.name}/calls",
            )
        self._take(tenant, use)
        use.num_calls += 1
        try:
            yield
        finally:
            use.num_calls -= 1

    def _take(self, tenant: Tenant, use: _Use) -> None:
        """Take one call out of the tenant's bucket, which fills by its rate."""
        if not tenant.calls_per_minute:
            return
        per_s = tenant.calls_per_minute / 60
        now = self._clock()
        use.tokens = min(_burst(tenant), use.tokens + per_s * (now - use.filled_s))
        use.filled_s = now
        if use.tokens < 1:
            wait_s = (1 - use.tokens) / per_s
            raise QuotaExceeded(
                f"tenant '{tenant.name}' may make {tenant.calls_per_minute:g} calls a minute, and has. "
                f"The next one is let through in {wait_s:.1f} s.",
                subject=f"tenant:{tenant.name}/calls_per_minute",
                retry_after_s=wait_s,
            )
        use.tokens -= 1


def _burst(tenant: Tenant) -> float:
    return max(1.0, tenant.calls_per_minute * BURST_S / 60)
