"""Calls that carry more than their message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Metadata: TypeAlias = tuple[tuple[str, str], ...]


class WithMetadata:
    """A stub with more metadata in every call, behind what the call has.

    Args:
        stub: of any service.
        more: what a call carries, by its request.
    """

    def __init__(self, stub: Any, more: Callable[[Any], Metadata]) -> None:
        self._stub = stub
        self._more = more

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub, method)

        def carrying(request: Any, *, metadata: Metadata = (), **how: Any) -> Any:
            return call(request, metadata=(*metadata, *self._more(request)), **how)

        return carrying
