"""What a call needs of whoever made it: gRPC's context is one such caller, an HTTP request another."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(slots=True)
class PartOfCall:
    """One of the calls that a caller's call becomes: it waits as long, and its facts are told beside the same answer."""

    whole: Waiting

    def time_remaining(self) -> float | None:
        """Seconds until the whole call's deadline; None where there is none."""
        return self.whole.time_remaining()

    def trailing_metadata(self) -> Any:
        """What the parts have told so far."""
        return self.whole.trailing_metadata()

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]], /) -> None:
        """Keep these for the whole call."""
        self.whole.set_trailing_metadata(metadata)
