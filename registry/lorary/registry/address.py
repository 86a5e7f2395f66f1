"""Where a registry is: ``file:///path``, ``file://~/path``, or a plain path."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from lorary.errors import ConfigError

DEFAULT_REGISTRY: Final = "file://~/.local/share/lorary/registry"
"""Used by the command line; the environment variable LORARY_REGISTRY names another."""


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
        raise ConfigError(f"registry {address!r} is not a folder; write file:///path, or a path")
    return Path(address).expanduser()
