"""The folder for what can be made or fetched again, and for what must outlive a process."""

from __future__ import annotations

import os
from pathlib import Path


def lorary_home() -> Path:
    """Return ``$LORARY_HOME``, or ``~/.cache/lorary``; it need not exist yet."""
    configured = os.environ.get("LORARY_HOME", "").strip()
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "lorary"
