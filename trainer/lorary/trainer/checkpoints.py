"""Checkpoints that can be trusted: whole, unchanged, and of the same run.

A checkpoint is written beside its place, synced and renamed, so ``checkpoint-30`` is there with
everything in it or not at all. ``lorary.json``, written last, says what the run was (recipe, base, data)
and holds the digest of every file; a checkpoint whose files differ is passed over::

    {"format_version": 2, "step": 30, "identity": "sha256:…", "files": {"optimizer.json": "sha256:…"}}
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorary.errors import IncompatibleAdapter, InvalidRecipe
from lorary.registry.blobs import hash_file
from lorary.registry.durable import sync_file, sync_folder
from lorary.trainer.recipe_file import recipe_dict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorary.trainer.recipe import Recipe
    from lorary.trainer.tasks.recipe import TasksRecipe

MARKER = "lorary.json"
_FORMAT_VERSION = 2
_DRAFT = ".draft-"
# Keys of a recipe that do not change what is trained.
_FREE_KEYS = ("name", "description", "evaluation", "search")
_FREE_TRAINING_KEYS = ("trackers",)


def run_identity(
    recipe: Recipe | TasksRecipe,
    base_fingerprint: str,
    data_fingerprint: str,
    num_processes: int = 1,
) -> str:
    """Return ``sha256:`` over everything that decides the loss curve."""
    decisive: dict[str, Any] = {
        key: value for key, value in recipe_dict(recipe).items() if key not in _FREE_KEYS
    }
    for key in _FREE_TRAINING_KEYS:
        del decisive["training"][key]
    for task in decisive.get("tasks", {}).values():
        del task["metric"]
    decisive |= {
        "base": base_fingerprint,
        "data": data_fingerprint,
        "num_processes": num_processes,
    }
    canonical = json.dumps(decisive, sort_keys=True).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"checkpoint-{step}"


def draft_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written; the same in every process of a run."""
    return folder / f"{_DRAFT}{step}"


@contextmanager
def new_checkpoint(folder: Path, step: int, identity: str) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes its place when everything in it is on the disk.

    Raises:
        OSError: the disk is full or read-only; nothing is left but the checkpoints before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_drafts(folder)  # of a process that was killed
    draft, place = draft_path(folder, step), checkpoint_path(folder, step)
    draft.mkdir()
    try:
        yield draft
        _seal(draft, step, identity)
        if place.exists():  # of a run that was resumed from before it
            shutil.rmtree(place)
        draft.rename(place)
        sync_folder(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def newest_checkpoint(folder: Path, identity: str, *, allow_other: bool = False) -> Path:
    """Return the newest whole checkpoint of this very run.

    Args:
        folder: where the checkpoints are.
        identity: what ``run_identity`` returned.
        allow_other: take one of another recipe, base or data, too.

    Raises:
        InvalidRecipe: there is none.
        IncompatibleAdapter: the newest is of another recipe, base or data.
    """
    candidates = sorted(folder.glob(f"checkpoint-*/{MARKER}"), key=_step_in_name, reverse=True)
    for path in candidates:
        marker = _read_marker(path)
        if marker is None or not _has_its_files(path.parent, marker):
            continue
        if marker["identity"] != identity and not allow_other:
            raise IncompatibleAdapter(
                f"checkpoint '{path.parent}' is of another recipe, base or data, so going on from it "
                "would give neither run's result. Undo the change, run without --resume to start "
                "anew, or add --force to go on all the same."
            )
        return path.parent
    raise InvalidRecipe(
        f"--resume was given, but '{folder}' holds no whole checkpoint. Run without --resume."
    )


def identity_of(checkpoint: Path) -> str:
    """Return the identity of the run that wrote a whole checkpoint."""
    marker = _read_marker(checkpoint / MARKER)
    assert marker is not None, "only whole checkpoints are asked"
    return str(marker["identity"])


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _step_in_name(marker: Path) -> int:
    number = marker.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _seal(draft: Path, step: int, identity: str) -> None:
    """Bring every file to the disk, then write the marker."""
    files = {path.name: _digest(path) for path in sorted(draft.iterdir())}
    marker = {
        "format_version": _FORMAT_VERSION,
        "step": step,
        "identity": identity,
        "files": files,
    }
    (draft / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    for name in (*files, MARKER):
        sync_file(draft / name)


def _digest(path: Path) -> str:
    return f"sha256:{hash_file(path)}"


def _has_its_files(checkpoint: Path, marker: dict[str, Any]) -> bool:
    """Whether every file of a checkpoint is what it was when it was written."""
    return all(
        (checkpoint / name).is_file() and _digest(checkpoint / name) == digest
        for name, digest in marker["files"].items()
    )


def _remove_drafts(folder: Path) -> None:
    for path in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(path)


def _read_marker(path: Path) -> dict[str, Any] | None:
    """Return a marker of this format, or None when it is damaged or of another one."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(marker, dict) and marker.get("format_version") == _FORMAT_VERSION
    has_all = is_ours and all(key in marker for key in ("step", "identity", "files"))
    return marker if has_all and isinstance(marker["files"], dict) else None
