"""Find the base that a command line names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.errors import LoraryError, MissingDependency

if TYPE_CHECKING:
    from lorary.registry.base import BaseCard

BaseOption = Annotated[str, typer.Option("--base", help="Folder or name of the base.")]


def base_folder_and_card(name: str) -> tuple[Path, BaseCard]:
    """Return folder and card of the base in a folder, or of the one with this name or Hub id.

    Raises:
        BaseNotFound: there is none.
        MissingDependency: it is no folder, and what finds bases by name is not installed.
    """
    from lorary.registry.base import BaseCard

    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder, BaseCard.from_folder(folder)
    try:
        # Not a dependency of the registry: the command uses it when it is installed.
        found = importlib.import_module("lorary.bases").find_base(name)
    except LoraryError:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"base '{name}' is no folder, and finding it by name needs {error.name or error}: "
            "pip install 'lorary[model]', or give a folder with --base"
        ) from error
    if not isinstance(found.card, BaseCard):
        raise TypeError(f"lorary.bases gave {type(found.card).__name__} for base '{name}'")
    return Path(found.path), found.card
