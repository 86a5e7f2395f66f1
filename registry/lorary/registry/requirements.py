"""Requirements on the metrics of a version that an alias is to point at.

=========================  ==========================================================
``accuracy>=0.90``         the version's own figure, from its manifest
``accuracy>=prod-0.01``    beside the figure of the version that an alias holds now
``f1>@6``                  beside the figure of version 6
``accuracy.gain.low>0``    what the adapter gains on its base, at the low end of the interval
=========================  ==========================================================

Comparisons are ``>=``, ``>``, ``<=``, ``<`` and ``==``. What ends in ``+`` or ``-`` and a number is an alias with an
offset; for an alias that itself ends so, write the offset, too: ``accuracy>=prod-2+0``.

A figure that is missing is a refusal, with one exception: an alias that points nowhere yet has no figure
to be compared with, so that its first version need not beat any.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lorary.errors import CorruptArtifact, InvalidRequest, Refused

OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
METRIC: Final = r"[A-Za-z][A-Za-z0-9_./-]*"
NUMBER: Final = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_REQUIREMENT: Final = re.compile(
    rf"\s*(?P<metric>{METRIC})\s*(?P<op>>=|<=|==|>|<)\s*"
    rf"(?:(?P<number>[+-]?{NUMBER})|(?P<holder>@[1-9][0-9]*|@?[a-z][a-z0-9._-]*?)(?P<offset>\s*[+-]\s*{NUMBER})?)\s*"
)

MetricsOf = Callable[[int], Mapping[str, float]]
"""Returns the figures of a version (``Metrics.figures``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One comparison: ``metric op bound``, or ``metric op (holder's metric + bound)``.

    Attributes:
        text: as it was written.
        metric: a metric's name.
        op: a key of ``OPERATORS``.
        holder: an alias, or ``@6``; empty when ``bound`` alone is compared with.
        bound: a number, or the offset to the holder's figure.
    """

    text: str
    metric: str
    op: str
    holder: str
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a requirement compared, for the log.

    Attributes:
        require: the requirement as it was written.
        value: the version's figure; ``None`` if it has none.
        bound: what it was compared with; ``None`` if there was nothing to compare with.
        holder: the version whose figure the bound is made from, if any.
        is_met: whether the requirement is met.
    """

    require: str
    value: float | None
    bound: float | None
    holder: int | None
    is_met: bool

    def __str__(self) -> str:
        """Say it in a line: ``accuracy>=prod-0.01: 0.91 beside 0.89 of version 6``."""
        if self.value is None:
            return f"{self.require}: the version has no such figure"
        if self.bound is None and self.holder is not None:
            return f"{self.require}: version {self.holder} has no such figure"
        if self.bound is None:
            return f"{self.require}: {self.value:.6g}, the first version there"
        of = "" if self.holder is None else f" of version {self.holder}"
        return f"{self.require}: {self.value:.6g} beside {self.bound:.6g}{of}"


def parse_requirement(text: str) -> Requirement:
    """Read a requirement.

    Raises:
        InvalidRequest: it is none.
    """
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise InvalidRequest(
            f"requirement {text!a} cannot be read; write 'accuracy>=0.9', 'accuracy>=prod-0.01' "
            "or 'loss<@6'",
            field="require",
        )
    raw = match["number"] or re.sub(r"\s", "", match["offset"] or "0")
    bound = float(raw)
    if not math.isfinite(bound):
        raise InvalidRequest(f"requirement {text!a} has a number beyond range")
    return Requirement(
        text=text.strip(),
        metric=match["metric"],
        op=match["op"],
        holder=match["holder"] or "",
        bound=bound,
    )


def measure(
    requirement: Requirement,
    version: int,
    *,
    alias: str,
    state: Mapping[str, int],
    metrics_of: MetricsOf,
) -> Figure:
    """Compare a version with a requirement.

    Args:
        requirement: what is asked.
        version: of which version.
        alias: the alias that is to point at it; it may point nowhere yet.
        state: where every alias points.
        metrics_of: metrics by version.

    Raises:
        Refused: the requirement names an alias that does not exist.
    """
    value = metrics_of(version).get(requirement.metric)
    holder, bound = _bound(requirement, alias, state, metrics_of)
    is_first = bool(requirement.holder) and holder is None
    is_met = value is not None and (
        is_first or (bound is not None and OPERATORS[requirement.op](value, bound))
    )
    return Figure(require=requirement.text, value=value, bound=bound, holder=holder, is_met=is_met)


def check_figures(what: str, figures: Iterable[Figure]) -> None:
    """Raise ``Refused`` unless all requirements are met.

    Args:
        what: what is refused, for the message: ``alias 'prod' of 'sentiment' stays at version 6``.
        figures: the comparisons.
    """
    failed = [str(figure) for figure in figures if not figure.is_met]
    if failed:
        raise Refused(f"{what}: {'; '.join(failed)}")


def parse_figures(raw: Any, where: str) -> tuple[Figure, ...]:
    """Read the figures of a line of the log.

    Raises:
        CorruptArtifact: they are none.
    """
    names = {field.name for field in dataclasses.fields(Figure)}
    if not isinstance(raw, list) or not all(
        isinstance(figure, dict)
        and figure.keys() == names
        and isinstance(figure["require"], str)
        and type(figure["is_met"]) is bool
        and all(figure[k] is None or type(figure[k]) in (int, float) for k in ("value", "bound"))
        and (figure["holder"] is None or type(figure["holder"]) is int)
        for figure in raw
    ):
        raise CorruptArtifact(f"{where} is damaged; its figures are no comparisons")
    return tuple(Figure(**figure) for figure in raw)


def _bound(
    requirement: Requirement, alias: str, state: Mapping[str, int], metrics_of: MetricsOf
) -> tuple[int | None, float | None]:
    """Return the version that is compared with, and the number."""
    named = requirement.holder
    if not named:
        return None, requirement.bound
    number = named.removeprefix("@")
    if number.isdigit():
        holder: int | None = int(number)
    else:
        holder = state.get(number)
        if holder is None and number != alias:
            raise Refused(
                f"requirement '{requirement.text}' names alias '{number}', which points nowhere; "
                f"there are {', '.join(sorted(state)) or 'none'}"
            )
    if holder is None:
        return None, None
    figure = metrics_of(holder).get(requirement.metric)
    return holder, None if figure is None else figure + requirement.bound
