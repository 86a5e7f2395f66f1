"""Calls that tell routers which adapter they are about, before anybody reads the message."""

from __future__ import annotations

import random
from typing import Any

from lorary.affinity import HEADER, affinity_key
from lorary.errors import ConfigError

MAX_SPREAD = 64


def with_affinity(stub: Any, spread: int) -> Any:
    """Return a stub whose calls carry their adapter's name; as it is where ``spread`` is 0.

    Args:
        stub: a stub of ``lorary.v1``.
        spread: servers over which one adapter's calls may be spread. Above 1 the name gets a random
            one of so many endings, so that a ring of hashes knows it by several places.

    Raises:
        ConfigError: ``spread`` is out of its range.
    """
    if not 0 <= spread <= MAX_SPREAD:
        raise ConfigError(
            f"affinity is {spread}; it is 0 (servers take turns) to {MAX_SPREAD} (servers per adapter)."
        )
    return _Named(stub, spread) if spread else stub


class _Named:
    """A stub with the affinity key in the metadata of every call that has one."""

    def __init__(self, stub: Any, spread: int) -> None:
        self._stub = stub
        self._spread = spread

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub, method)

        def named(request: Any, *, metadata: tuple[tuple[str, str], ...] = (), **how: Any) -> Any:
            key = affinity_key(request)
            if key is not None:
                if self._spread > 1:
                    key = f"{key}#{random.randrange(self._spread)}"
                metadata = (*metadata, (HEADER, key))
            return call(request, metadata=metadata, **how)

        return named
