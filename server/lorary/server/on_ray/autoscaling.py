"""How many replicas Serve should run: by what runs and what waits for a place, not by what waits for an adapter.

An answer that waits for its adapter would wait for it on a new replica as well, which would have to load
its base first; a storm of loads must not look like a need for machines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_COUNTED = ("running", "waiting_for_place")


def by_waiting(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's ``policy_function``: return the replicas wanted, and no state.

    Each gets ``target_ongoing_requests`` of the answers that run or wait for a place, in its queue or before
    the router. Serve applies the delays, factors and bounds of its configuration to it.
    """
    reported = context.aggregated_metrics or {}
    counted = [reported[name] for name in _COUNTED if name in reported]
    if len(counted) < len(_COUNTED):
        # Nobody has reported yet: Serve's own count of calls, whatever they wait for.
        wanted = context.total_num_requests
    else:
        wanted = sum(sum(by_replica.values()) for by_replica in counted)
        wanted += context.total_queued_requests
    target: float = context.config.target_ongoing_requests
    return wanted / target, {}
