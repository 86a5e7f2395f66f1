"""Keep adapters as immutable, numbered, verified versions, with movable aliases. Imports no torch."""

from lorary.registry.base import BaseCard
from lorary.registry.manifest import Manifest
from lorary.registry.refs import AdapterRef, parse_ref

__all__ = ["AdapterRef", "BaseCard", "Manifest", "parse_ref"]
