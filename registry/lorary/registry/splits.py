r"""A canary: a second version behind an alias, for a share of its calls, with gates.

It is kept in the alias log (``aliases``), as a line whose ``kind`` is ``canary``; the alias itself stays
where it is::

    {"at": …, "actor": "ada", "alias": "prod", "from_version": 7, "to_version": 7, "reason": "",
     "kind": "canary", "canary": {"version": 8, "percent": 10, "shadow": 0,
     "gates": {"calls": 50, "errors": 0.02}, "promote_after": 0}}

A later ``canary`` line of the alias replaces it, one with ``"canary": null`` ends it, and so does every
move of the alias. Lines of other kinds have no ``canary`` and are what they always were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lorary.errors import Conflict, CorruptArtifact, InvalidRequest

if TYPE_CHECKING:
    from lorary.registry.aliases import AliasMove

DEFAULT_CALLS: Final = 50
MAX_CALLS: Final = 1_000_000_000
LIMITS: Final = {"errors": (0.0, 1.0), "divergence": (0.0, 1.0), "latency": (1.0, 1000.0)}
"""Gates and their ranges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What a canary must hold to; a gate that is ``None`` is not set.

    Attributes:
        calls: the fewest calls of the canary (copies included) after which gates are judged.
        errors: by how much its share of failed calls may exceed the holder's.
        divergence: the largest mean difference of its copies' answers from the holder's, 0 (all the same)
            to 1.
        latency: the largest ratio of its 95th percentile of first-token latency to the holder's.
    """

    calls: int = DEFAULT_CALLS
    errors: float | None = None
    divergence: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.calls <= MAX_CALLS:
            raise InvalidRequest(
                f"gate calls is {self.calls}; it must be 1 to {MAX_CALLS}", field="gates.calls"
            )
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequest(
                    f"gate {name} is {value}; it must be {low:g} to {high:g}", field=f"gates.{name}"
                )

    @property
    def has_any(self) -> bool:
        """Whether anything is judged."""
        return any(getattr(self, name) is not None for name in LIMITS)

    def to_dict(self) -> dict[str, Any]:
        """Return the gates that are set."""
        found = {name: getattr(self, name) for name in LIMITS}
        return {"calls": self.calls, **{k: v for k, v in found.items() if v is not None}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A candidate behind an alias, and how much of the traffic it sees.

    Attributes:
        version: the candidate's number.
        percent: of the alias's calls that it answers, 0 to 100.
        shadow: percent of the other calls that it gets a copy of; those answers are compared with the
            holder's and thrown away.
        gates: what it must hold to.
        promote_after: calls after which a candidate that held to all gates takes the alias; 0 is never.
    """

    version: int
    percent: float
    shadow: float = 0.0
    gates: Gates = field(default_factory=Gates)
    promote_after: int = 0

    def __post_init__(self) -> None:
        for name in ("percent", "shadow"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 100):
                raise InvalidRequest(f"{name} is {value}; it must be 0 to 100", field=name)
        if self.percent == self.shadow == 0:
            raise InvalidRequest(
                "a canary with neither percent nor shadow sees no call; give one of them",
                field="percent",
            )
        if self.gates.divergence is not None and not self.shadow:
            raise InvalidRequest(
                "gate divergence compares copies of calls, and there are none; give --shadow",
                field="gates.divergence",
            )
        if self.gates.latency is not None and not 0 < self.percent < 100:
            raise InvalidRequest(
                f"gate latency compares the canary with the holder, and at {self.percent:g} % one of "
                "them answers nobody; give a percent between 0 and 100",
                field="gates.latency",
            )
        if not 0 <= self.promote_after <= MAX_CALLS:
            raise InvalidRequest(
                f"promote_after is {self.promote_after}; it must be 0 to {MAX_CALLS}",
                field="promote_after",
            )
        if self.promote_after and not self.gates.has_any:
            raise InvalidRequest(
                "a canary without gates cannot earn its promotion; give --gate",
                field="promote_after",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return it as the log keeps it."""
        return {
            "version": self.version,
            "percent": self.percent,
            "shadow": self.shadow,
            "gates": self.gates.to_dict(),
            "promote_after": self.promote_after,
        }

    def __str__(self) -> str:
        """Say it in a word or two."""
        parts = [f"version {self.version} at {self.percent:g} %"]
        if self.shadow:
            parts.append(f"shadowing {self.shadow:g} %")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A running canary.

    Attributes:
        alias: whose calls are split.
        version: the holder: where the alias points.
        canary: the candidate.
        since: when it began, UTC.
        actor: who began it.
        serial: which line of the adapter's log began it, from 1. Two canaries with the same figures are
            still two, and whoever judged one must not end the other.
    """

    alias: str
    version: int
    canary: Canary
    since: str
    actor: str
    serial: int


def parse_canary(fields: Any, where: str) -> Canary | None:
    """Return what a line's ``canary`` says; ``None`` for the end of one.

    Raises:
        CorruptArtifact: it is no canary.
    """
    if fields is None:
        return None
    try:
        if not isinstance(fields, dict) or not isinstance(fields.get("gates"), dict):
            raise TypeError("not an object")
        gates, numbers = fields["gates"], {k: v for k, v in fields.items() if k != "gates"}
        for name, value in {**numbers, **gates}.items():
            wanted = (int,) if name in ("version", "calls", "promote_after") else (int, float)
            if type(value) not in wanted:
                raise TypeError(f"{name} is {value!r}")
        return Canary(**numbers, gates=Gates(**gates))
    except (TypeError, InvalidRequest) as error:
        raise CorruptArtifact(f"{where} is damaged; it is no canary: {error}") from error


def replay_splits(moves: Iterable[AliasMove]) -> dict[str, Split]:
    """Return the canaries that run after ``moves``, by alias."""
    running: dict[str, Split] = {}
    for serial, move in enumerate(moves, start=1):
        if move.canary is None or move.to_version is None:
            running.pop(move.alias, None)
            continue
        running[move.alias] = Split(
            alias=move.alias,
            version=move.to_version,
            canary=move.canary,
            since=move.at,
            actor=move.actor,
            serial=serial,
        )
    return running


def is_change(move: AliasMove, splits: Mapping[str, Split], expect_serial: int | None) -> bool:
    """Tell whether a move, compared with the alias already, says anything new.

    Args:
        move: with ``from_version`` filled in.
        splits: the canaries that run.
        expect_serial: which canary must run; ``None`` for whichever.

    Raises:
        Conflict: another canary runs, or none.
    """
    running = splits.get(move.alias)
    if expect_serial is not None and (running is None or running.serial != expect_serial):
        raise Conflict(
            f"the canary of alias '{move.alias}' that was meant no longer runs: somebody ended or "
            "replaced it first, and nothing was changed. Look at the log."
        )
    if move.from_version != move.to_version:
        return True
    # A move of the alias to where it is ends no canary, but for a rollback, which undoes its start.
    ends_or_begins = move.kind in ("canary", "rollback")
    return ends_or_begins and move.canary != (running.canary if running else None)
