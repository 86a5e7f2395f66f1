"""The whole corpus: list it, write it to a folder, and run a loader over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorary.errors import AlreadyExists
from lorary.registry.base import BaseCard
from lorary.registry.durable import storage_errors
from lorary.registry.poison import configs, content, files, header
from lorary.registry.poison.attack import Attack, Victim
from lorary.registry.poison.names import HOSTILE_NAMES

HONEST: Final = "honest"
INDEX_FILE: Final = "attacks.json"
NAMES_FILE: Final = "names.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a loader did with one folder.

    Attributes:
        attack: what was given to it; ``None`` for the honest adapter, which must be accepted.
        refusal: what it raised; ``None`` if it took the folder.
    """

    attack: Attack | None
    refusal: Exception | None

    @property
    def is_right(self) -> bool:
        """Whether an attack was refused, or the honest adapter accepted."""
        return (self.attack is None) == (self.refusal is None)


def attacks() -> tuple[Attack, ...]:
    """Return every attack, by kind."""
    return (*files.ATTACKS, *header.ATTACKS, *content.ATTACKS, *configs.ATTACKS)


def write_corpus(card: BaseCard, dest: Path) -> Path:
    """Write every attack on a base to a folder of its own, and what they are to ``attacks.json``.

    ::

        dest/honest/                an adapter that must be accepted, or refusing proves nothing
        dest/pickle-renamed/ …      one folder per attack
        dest/attacks.json           [{"name", "kind", "what", "error", "says"}, …]
        dest/names.json             names that an adapter may not have

    Raises:
        AlreadyExists: ``dest`` exists.
        StorageError: it cannot be written.
    """
    if dest.exists():
        raise AlreadyExists(f"{dest} exists; choose another folder")
    with storage_errors(f"write {dest}"):
        Victim(dest / HONEST, card).write_honest()
        for attack in attacks():
            attack.write(dest / attack.name, card)
        (dest / INDEX_FILE).write_text(
            json.dumps([description(attack) for attack in attacks()], indent=2) + "\n"
        )
        (dest / NAMES_FILE).write_text(json.dumps(HOSTILE_NAMES, indent=2) + "\n")
    return dest


def run_against(load: Callable[[Path], object], card: BaseCard, dest: Path) -> Iterator[Outcome]:
    """Write the corpus to ``dest`` and give every folder of it to ``load``; whatever it raises is a refusal.

    Args:
        load: takes the folder of an adapter, and raises unless it would serve it.
        card: the base that the loader holds.
        dest: a folder that does not exist.

    Yields:
        One outcome per folder, that of the honest adapter first.
    """
    write_corpus(card, dest)
    yield Outcome(attack=None, refusal=_refusal(load, dest / HONEST))
    for attack in attacks():
        yield Outcome(attack=attack, refusal=_refusal(load, dest / attack.name))


def description(attack: Attack) -> dict[str, str]:
    """Return what there is to say about an attack, as plain text."""
    return {
        "name": attack.name,
        "kind": attack.kind,
        "what": attack.what,
        "error": attack.error.__name__,
        "says": attack.says,
    }


def _refusal(load: Callable[[Path], object], folder: Path) -> Exception | None:
    try:
        load(folder)
    except Exception as refusal:  # noqa: BLE001 - any loader's own errors are what is asked for
        return refusal
    return None
