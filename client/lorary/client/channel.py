"""How both clients connect: retries before the first message, quick reconnects, keepalive."""

from __future__ import annotations

import json
import time

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 120.0
MAX_MESSAGE_BYTES = 64 * 2**20

# UNAVAILABLE before the first message is always safe to repeat: nothing was answered yet.
_SERVICE_CONFIG = {
    # Of several addresses (a headless service's pods) each call takes the next one that is ready.
    "loadBalancingConfig": [{"round_robin": {}}],
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


def channel_options() -> list[tuple[str, str | int]]:
    """Return the channel options of a client."""
    return [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # gRPC's own pause between two attempts grows to minutes; a server that starts is met sooner.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
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
