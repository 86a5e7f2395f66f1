"""How both clients connect: retries before the first message, quick reconnects, keepalive, affinity."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from lorary.affinity import HEADER
from lorary.pings import ping_options

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 120.0
MAX_MESSAGE_BYTES = 64 * 2**20
KEEPALIVE_MS, PING_TIMEOUT_MS = 30_000, 10_000
"""A connection with calls that was silent for so long is pinged, and an answer waited for so long."""

# Of several addresses (a headless service's pods) each call takes the next one that is ready.
_IN_TURN: dict[str, Any] = {"round_robin": {}}
# Or the one whose place on a ring of hashes follows its adapter's: gRPC's proposals A42 and A76.
_RING_SIZE = 65_536
_BY_ADAPTER: dict[str, Any] = {
    "ring_hash_experimental": {
        "requestHashHeader": HEADER,
        # With 1,000 servers each has 65 places, and so 12 % more or less than its share.
        "minRingSize": _RING_SIZE,
        "maxRingSize": _RING_SIZE,
    }
}
# gRPC reads a header for the ring only where its process says so.
_RING_HASH_SWITCH = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"

# UNAVAILABLE before the first message is always safe to repeat: nothing was answered yet.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "lorary.v1.Inference"}, {"service": "lorary.v1.Control"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


def channel_options(*, affinity: int = 0) -> list[tuple[str, str | int]]:
    """Return the channel options of a client.

    Args:
        affinity: 0 takes servers in turn; else calls go by the metadata that ``affinity`` adds. gRPC
            must be told so by an environment variable of the process, which this sets.
    """
    if affinity:
        os.environ.setdefault(_RING_HASH_SWITCH, "true")
    balancing = {"loadBalancingConfig": [_BY_ADAPTER if affinity else _IN_TURN]}
    return [
        ("grpc.service_config", json.dumps({**balancing, **_SERVICE_CONFIG})),
        ("grpc.lb.ring_hash.ring_size_cap", _RING_SIZE),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # gRPC's own pause between two attempts grows to minutes; a server that starts is met sooner.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        *ping_options(KEEPALIVE_MS, PING_TIMEOUT_MS),
    ]


class Deadline:
    """A point in time: ``timeout_s`` seconds from when it was made."""

    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether it has passed."""
        return self.remaining_s == 0.0
