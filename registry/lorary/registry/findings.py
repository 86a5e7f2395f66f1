"""Two ways to take a problem: stop at the first, or go on and collect them all.

A check is given ``report`` and calls it with each problem that it finds. Whoever must not go on passes
``refuse``, which raises; whoever wants the whole list passes the ``append`` of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

from lorary.errors import CorruptArtifact, IncompatibleAdapter, LoraryError

Report = Callable[[LoraryError], None]
T = TypeVar("T")


def refuse(problem: LoraryError) -> NoReturn:
    """Raise ``problem``: the report of those who stop at the first."""
    raise problem


def attempt(report: Report, call: Callable[[], T]) -> T | None:
    """Return what ``call`` returns; what it refuses is reported, and gives ``None``."""
    try:
        return call()
    except (CorruptArtifact, IncompatibleAdapter) as problem:
        report(problem)
        return None
