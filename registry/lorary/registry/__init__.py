"""Keep adapters as immutable, numbered, verified versions, with movable aliases. Imports no torch."""

from lorary.registry.aliases import UNSET, AliasMove
from lorary.registry.base import BaseCard
from lorary.registry.manifest import Manifest
from lorary.registry.refs import AdapterRef, parse_ref
from lorary.registry.results import Resolved, VerifyReport, VersionCheck, VersionInfo
from lorary.registry.store import Registry

__all__ = [
    "UNSET",
    "AdapterRef",
    "AliasMove",
    "BaseCard",
    "Manifest",
    "Registry",
    "Resolved",
    "VerifyReport",
    "VersionCheck",
    "VersionInfo",
    "parse_ref",
]
