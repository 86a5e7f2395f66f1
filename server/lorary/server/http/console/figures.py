"""The figures that the console draws: a few families of ``/metrics``, as JSON, now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

FAMILIES = frozenset(
    {
        "lorary_adapter_bytes",
        "lorary_kv_tokens_capacity",
        "lorary_kv_tokens_used",
        "lorary_requests_running",
        "lorary_requests_waiting",
        "lorary_step_distinct_adapters",
        "lorary_time_to_first_token_seconds",
        "lorary_tokens",
    }
)


def read_figures(registry: CollectorRegistry) -> dict[str, Any]:
    """Return the samples of ``FAMILIES``: name, labels and value of each; may take milliseconds.

    ``at_s`` is a clock's that does not jump, to divide differences by.
    """
    samples = [
        [sample.name, sample.labels, sample.value]
        for family in registry.collect()
        if family.name in FAMILIES
        for sample in family.samples
    ]
    return {"at_s": time.monotonic(), "samples": samples}
