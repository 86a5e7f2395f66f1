"""What a call needs of whoever made it: gRPC's context is one such caller, an HTTP request another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Facts(Protocol):
    """Where facts about an answer are kept until they are told beside it."""

    def trailing_metadata(self) -> Any:
        """What ``set_trailing_metadata`` was given last; nothing before."""
        ...

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]], /) -> None:
        """Keep these, which are ASCII, and no others."""
        ...


class Waiting(Facts, Protocol):
    """Somebody who waits for one whole answer."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None where there is none."""
        ...


class Caller(Waiting, Protocol):
    """The part of ``grpc.aio.ServicerContext`` that the service uses."""

    async def write(self, message: Any, /) -> None:
        """Send one event of a stream; waits for callers that read slowly."""
        ...
