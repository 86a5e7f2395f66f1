"""Checkpoints that can be trusted: whole, and of the same run.

A checkpoint counts only once ``lorary.json`` is in it, which is written last. It says what the run
was (recipe, base, data), and resuming another run from it is refused::

    {"format_version": 1, "step": 30, "identity": "sha256:…"}
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from lorary.errors import IncompatibleAdapter, InvalidRecipe
from lorary.trainer.recipe_file import recipe_dict

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

MARKER = "lorary.json"
_FORMAT_VERSION = 1
# Keys of a recipe that do not change what is trained.
_FREE_KEYS = ("name", "description", "evaluation")


def run_identity(recipe: Recipe, base_fingerprint: str, data_fingerprint: str) -> str:
    """Return ``sha256:`` over everything that decides the loss curve."""
    decisive: dict[str, Any] = {
        key: value for key, value in recipe_dict(recipe).items() if key not in _FREE_KEYS
    }
    decisive |= {"base": base_fingerprint, "data": data_fingerprint}
    canonical = json.dumps(decisive, sort_keys=True).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def mark_complete(checkpoint: Path, *, step: int, identity: str) -> None:
    """Declare a checkpoint whole; call when all its other files are written."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    draft = checkpoint / f"{MARKER}.tmp-{os.getpid()}"
    marker = {"format_version": _FORMAT_VERSION, "step": step, "identity": identity}
    draft.write_text(json.dumps(marker) + "\n", encoding="utf-8")
    draft.rename(checkpoint / MARKER)


def newest_checkpoint(folder: Path, identity: str) -> Path:
    """Return the newest whole checkpoint of this very run.

    Raises:
        InvalidRecipe: there is none.
        IncompatibleAdapter: the newest is of another recipe, base or data.
    """
    markers = {path.parent: _read_marker(path) for path in folder.glob(f"checkpoint-*/{MARKER}")}
    whole = {path: marker for path, marker in markers.items() if marker is not None}
    if not whole:
        raise InvalidRecipe(
            f"--resume was given, but '{folder}' holds no whole checkpoint. Run without --resume."
        )
    newest = max(whole, key=lambda path: int(whole[path]["step"]))
    if whole[newest]["identity"] != identity:
        raise IncompatibleAdapter(
            f"checkpoint '{newest}' is of another recipe, base or data, so going on from it would "
            "give neither run's result. Undo the change, or run with --force to start anew."
        )
    return newest


def _read_marker(path: Path) -> dict[str, Any] | None:
    """Return a marker of this format, or None when it is damaged or of another one."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    is_ours = isinstance(marker, dict) and marker.get("format_version") == _FORMAT_VERSION
    has_all = is_ours and type(marker.get("step")) is int and "identity" in marker
    return marker if has_all else None
