"""What the shell offers after TAB: names of adapters, and what may follow their ``@``.

A registry that cannot be read offers nothing: completion is no place for errors.
"""

from __future__ import annotations

import os
from typing import Any

from lorary.errors import LoraryError
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.backend import Store, open_store
from lorary.registry.refs import LATEST


def complete_name(ctx: Any, incomplete: str) -> list[str]:
    """Offer the names of adapters."""
    try:
        return [name for name in _store(ctx).names() if name.startswith(incomplete)]
    except LoraryError:
        return []


def complete_ref(ctx: Any, incomplete: str) -> list[str]:
    """Offer names, and after an ``@`` the aliases and versions of that adapter, newest first."""
    name, at, selector = incomplete.partition("@")
    if not at:
        return complete_name(ctx, incomplete)
    try:
        found = _selectors(_store(ctx), name)
    except LoraryError:
        return []
    return [f"{name}@{one}" for one in found if one.startswith(selector)]


def complete_alias(ctx: Any, incomplete: str) -> list[str]:
    """Offer the aliases, to be moved, of the adapter that the line names before."""
    found = (one for one in _of_named(ctx) if one.startswith(incomplete))
    return [one for one in found if not one.isdigit() and one != LATEST]


def complete_selector(ctx: Any, incomplete: str) -> list[str]:
    """Offer the aliases and versions of the adapter that the line names before."""
    return [one for one in _of_named(ctx) if one.startswith(incomplete)]


def _of_named(ctx: Any) -> list[str]:
    named = ctx.params.get("name") or ctx.params.get("ref") or ""
    try:
        return _selectors(_store(ctx), str(named).partition("@")[0])
    except LoraryError:
        return []


def _selectors(store: Store, name: str) -> list[str]:
    deleted = store.marks(name).deleted
    versions = [v for v in range(store.newest(name), 0, -1) if v not in deleted]
    latest = [LATEST] if versions else []
    return [*sorted(store.alias_state(name)), *latest, *map(str, versions)]


def _store(ctx: Any) -> Store:
    # A shell asks while the line is typed: the environment's registry may not be read into the line yet.
    named = ctx.params.get("registry") or os.environ.get("LORARY_REGISTRY")
    return open_store(str(named or DEFAULT_REGISTRY))
