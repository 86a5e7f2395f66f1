"""Where a registry is: ``file:///path``, ``file://~/path``, a plain path, or ``hf://owner[/prefix]``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from lorary.errors import ConfigError

DEFAULT_REGISTRY: Final = "file://~/.local/share/lorary/registry"
"""Used by the command line; the environment variable LORARY_REGISTRY names another."""


_HUB: Final = "hf://"
_PART: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")


def is_hub(address: str | Path) -> bool:
    """Tell whether an address names a Hub."""
    return isinstance(address, str) and address.startswith(_HUB)


def hub_owner(address: str) -> tuple[str, str]:
    """Return owner and prefix of ``hf://owner[/prefix]``; the prefix may be empty.

    Raises:
        ConfigError: it is written otherwise.
    """
    owner, slash, prefix = address.removeprefix(_HUB).removesuffix("/").partition("/")
    parts = (owner, prefix) if slash else (owner,)
    if not all(_PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts):
        raise ConfigError(
            f"registry {address!r} does not name an owner on a Hub; write hf://owner, or "
            "hf://owner/prefix for repositories whose names begin with 'prefix-'"
        )
    return owner, prefix


def local_path(address: str | Path) -> Path:
    """Return the folder that ``file:///path``, ``file://~/path`` or a plain path names.

    Raises:
        ConfigError: it names something that is no folder of this machine.
    """
    if isinstance(address, Path):
        return address.expanduser()
    parts = urlsplit(address)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost", "~"):
            raise ConfigError(
                f"registry {address!r} names the machine {parts.netloc!r}; write file:///path, with "
                "three slashes"
            )
        path = Path("~" if parts.netloc == "~" else "/") / unquote(parts.path).lstrip("/")
        return path.expanduser()
    if "://" in address or not address:
        raise ConfigError(
            f"registry {address!r} is not a folder; write file:///path, a path, or hf://owner"
        )
    return Path(address).expanduser()
