"""Who is at work, for the logs."""

from __future__ import annotations

import getpass
import os


def current_user() -> str:
    """Return the system's name for who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        return f"uid-{os.getuid()}"
