"""How gRPC finds out that a peer is gone without a word."""

from __future__ import annotations


def ping_options(silent_ms: int, answer_ms: int) -> tuple[tuple[str, int], ...]:
    """Return the options of a channel or a server that notices within the sum of both.

    How long an answer is waited for has two names: today's core goes by the second alone, a minute if it
    is not said.

    Args:
        silent_ms: a connection that was silent for so long is pinged.
        answer_ms: so long an answer to that is waited for.
    """
    return (
        ("grpc.keepalive_time_ms", silent_ms),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),
    )
