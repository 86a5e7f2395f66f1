"""Which adapter a call is about, as one word: what a fleet of servers is asked to bring together.

Calls with the same key belong on the same server, where their adapter is loaded already. The key is the
adapter's name without version or alias, so that a canary meets its predecessor on the device, and two
aliases of one version share its copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = "lorary-affinity"
"""The key of request metadata that carries it, for routers that do not read messages."""

# Longer than any name that a registry takes; what is longer is refused by every server alike.
_MAX_CHARS = 256


def affinity_key(request: Any) -> str | None:
    """Return the key of a call, from its message of ``lorary.v1``.

    None where any server will do: the bare base, a message without an adapter, and names that no
    registry has. A composition counts as its first adapter, whose template it uses.
    """
    ref: str = getattr(request, "adapter", "")
    parts: Sequence[Any] = getattr(request, "adapters", [])
    if not ref and parts:
        ref = parts[0].adapter
    name = ref.partition("@")[0]
    is_header = name.isascii() and name.isprintable() and " " not in name
    return name if is_header and 0 < len(name) <= _MAX_CHARS else None
