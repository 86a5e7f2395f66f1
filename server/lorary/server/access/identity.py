"""Whom the current call is made for; seen by whatever runs within the call's task."""

from __future__ import annotations

from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lorary.errors import AccessDenied

if TYPE_CHECKING:
    from lorary.server.access.grants import Tenant

current: ContextVar[Tenant | None] = ContextVar("lorary_tenant", default=None)
"""The call's tenant; None where the server knows no tenants, and outside of a call."""


def tenant_name() -> str:
    """Return the name of the current call's tenant; ``""`` when there is none."""
    tenant = current.get()
    return "" if tenant is None else tenant.name


def is_admin() -> bool:
    """Whether the current call may see and change what concerns all tenants."""
    tenant = current.get()
    return tenant is None or tenant.role == "admin"


def may_use(adapter: str) -> bool:
    """Whether the current call may see an adapter of this name."""
    tenant = current.get()
    return tenant is None or any(fnmatchcase(adapter, glob) for glob in tenant.adapters)


def check_base() -> None:
    """Check that the current call may use the bare base.

    Raises:
        AccessDenied: it may not.
    """
    tenant = current.get()
    if tenant is not None and not tenant.base:
        raise AccessDenied(
            f"tenant '{tenant.name}' may not call the bare base on this server; name an adapter."
        )
