"""Calls that tell routers which adapter they are about, before anybody reads the message."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from lorary.affinity import HEADER, affinity_key
from lorary.client.metadata import WithMetadata
from lorary.errors import ConfigError

if TYPE_CHECKING:
    from lorary.client.metadata import Metadata

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
    if not spread:
        return stub

    def named(request: Any) -> Metadata:
        key = affinity_key(request)
        if key is None:
            return ()
        return ((HEADER, f"{key}#{random.randrange(spread)}" if spread > 1 else key),)

    return WithMetadata(stub, named)
