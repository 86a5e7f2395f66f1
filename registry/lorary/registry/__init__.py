"""Keep adapters as immutable, numbered, verified versions, with movable aliases. Imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lorary.registry.aliases import UNSET, AliasMove
    from lorary.registry.base import BaseCard
    from lorary.registry.manifest import Manifest
    from lorary.registry.marks import Mark
    from lorary.registry.refs import AdapterRef, parse_ref
    from lorary.registry.results import Freed, Resolved, VerifyReport, VersionCheck, VersionInfo
    from lorary.registry.store import Registry

__all__ = [
    "UNSET",
    "AdapterRef",
    "AliasMove",
    "BaseCard",
    "Freed",
    "Manifest",
    "Mark",
    "Registry",
    "Resolved",
    "VerifyReport",
    "VersionCheck",
    "VersionInfo",
    "parse_ref",
]

# Imported when asked for: a command that only prints its help needs no NumPy.
_HOMES: Final = {
    "UNSET": "lorary.registry.aliases",
    "AdapterRef": "lorary.registry.refs",
    "AliasMove": "lorary.registry.aliases",
    "BaseCard": "lorary.registry.base",
    "Freed": "lorary.registry.results",
    "Manifest": "lorary.registry.manifest",
    "Mark": "lorary.registry.marks",
    "Registry": "lorary.registry.store",
    "Resolved": "lorary.registry.results",
    "VerifyReport": "lorary.registry.results",
    "VersionCheck": "lorary.registry.results",
    "VersionInfo": "lorary.registry.results",
    "parse_ref": "lorary.registry.refs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
