"""A corpus of hostile adapters, to be run against any loader.

Every attack begins as an honest adapter of the base at hand, and changes one thing. They are made on
the spot, so that names, shapes and norms are right for the base and nothing but the one thing is wrong::

    from lorary.registry.poison import attacks, run_against

    for outcome in run_against(my_loader, card, Path("corpus")):
        print(outcome.attack.name, outcome.refusal or "ACCEPTED")

None of them does harm where it is not loaded, and little where it is: the pickles print a line.
"""

from __future__ import annotations

from lorary.registry.poison.attack import Attack, Victim
from lorary.registry.poison.corpus import Outcome, attacks, run_against, write_corpus
from lorary.registry.poison.names import HOSTILE_NAMES

__all__ = [
    "HOSTILE_NAMES",
    "Attack",
    "Outcome",
    "Victim",
    "attacks",
    "run_against",
    "write_corpus",
]
