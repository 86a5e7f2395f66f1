"""What requests, outputs, leases and errors look like between the two processes: rows of JSON.

``to_row`` writes every noun; there is a function to read each. A row is the noun's fields in their order, which
both sides know, for they are one program.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from lorary import errors
from lorary.errors import LoraryError
from lorary.registry import Resolved
from lorary.server.adapters.host_tier import HostStats
from lorary.server.adapters.merging import MergedAdapter
from lorary.server.adapters.probe_runs import Verdict
from lorary.server.adapters.resident import ResidentAdapter
from lorary.server.answers import ServerFacts
from lorary.server.engine.request import (
    Constraint,
    Execution,
    Finish,
    Output,
    Pooling,
    PositionLogprobs,
    Request,
    Sampling,
    StepStats,
)
from lorary.server.validate import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorary.server.engine.request import Lease

Row = list[Any]
Noun = TypeVar("Noun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request shall hold.

    Attributes:
        digest: the version's, or the composition's own; empty for the bare base.
        parts: versions with their weights: none for the bare base, one for a version.
        execution: whether it may, or must, run on merged weights.
    """

    digest: str = ""
    parts: tuple[tuple[Resolved, float], ...] = ()
    execution: Execution = "batched"

    @property
    def resolved(self) -> Resolved | None:
        """The version, where it is one as it is, and not a composition."""
        if self.parts and self.parts[0][0].digest == self.digest:
            return self.parts[0][0]
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What the engine's process says of itself once it is built."""

    facts: ServerFacts
    limits: Limits
    can_merge: bool


# Made on the other side, or the engine's to set.
_NOT_SENT = ("lease", "grammar", "execution", "is_on_merged")
_WHOLE = (
    Constraint, Finish, HostStats, Limits, MergedAdapter, Output, Pooling, PositionLogprobs, Ready,
    ResidentAdapter, Resolved, Sampling, ServerFacts, StepStats, Verdict, Wanted,
)  # fmt: skip


def _names(noun: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(noun))


_NAMES: dict[Any, tuple[str, ...]] = {noun: _names(noun) for noun in _WHOLE}
_NAMES[Request] = tuple(name for name in _names(Request) if name not in _NOT_SENT)
_TO_ROW: dict[Any, Callable[[Any], Any]] = {
    noun: attrgetter(*names) for noun, names in _NAMES.items()
}


def to_row(value: Any) -> Any:
    """Return a noun's row; what is in it may be nouns again.

    Raises:
        TypeError: it is none.
    """
    whole = _TO_ROW.get(type(value))
    if whole is not None:
        return whole(value)
    if isinstance(value, LoraryError):
        told = (getattr(value, name, None) for name in _TOLD)
        return (type(value).__name__, str(value), *told)
    raise TypeError(f"{type(value).__name__} does not travel between door and engine")


_TOLD = ("retry_after_s", "field", "subject")
"""Attributes of errors, beside their message."""


def error(row: Row | None) -> LoraryError | None:
    """Return an error of the class that it had."""
    if row is None:
        return None
    name, message, *told = row
    cls: type[LoraryError] = getattr(errors, name)
    made = cls(message)
    for key, value in zip(_TOLD, told, strict=True):
        if value is not None:
            setattr(made, key, value)
    return made


def output(row: Row) -> Output:
    """Return what one step made of one request."""
    request_id, index, text, token_ids, logprobs, finish, failure = row
    return Output(
        request_id,
        index,
        text,
        token_ids,
        tuple(map(_position, logprobs)) if logprobs else (),
        None if finish is None else _finish(finish),
        error(failure),
    )


def request(row: Row, lease: Lease) -> Request:
    """Return a request with ``lease``; its grammar is still to be compiled."""
    given = dict(zip(_NAMES[Request], row, strict=True))
    given["sampling"] = _sampling(given["sampling"])
    given["labels"] = _tuples(given["labels"])
    if given["pooling"] is not None:
        given["pooling"] = plain(Pooling, given["pooling"])
    return Request(**given, lease=lease)


def wanted(row: Row) -> Wanted:
    """Return what a request shall hold."""
    digest, parts, execution = row
    return Wanted(
        digest=digest,
        parts=tuple((resolved(version), weight) for version, weight in parts),
        execution=execution,
    )


def ready(row: Row) -> Ready:
    """Return what the engine's process says of itself."""
    facts, limits, can_merge = row
    return Ready(facts=plain(ServerFacts, facts), limits=plain(Limits, limits), can_merge=can_merge)


def resolved(row: Row) -> Resolved:
    """Return a version."""
    return plain(Resolved, row)


def constraint(row: Row) -> Constraint:
    """Return what an answer must be."""
    return Constraint(*row)


def verdict(row: Row | None) -> Verdict | None:
    """Return what came of a version's probes."""
    return None if row is None else plain(Verdict, row)


def merged(row: Row | None) -> MergedAdapter | None:
    """Return what is merged."""
    if row is None:
        return None
    *rest, told = row
    return plain(MergedAdapter, [*rest, verdict(told)])


def plain(noun: Callable[..., Noun], row: Sequence[Any]) -> Noun:
    """Return a noun whose fields are numbers and texts."""
    return noun(**dict(zip(_NAMES[noun], row, strict=True)))


def _sampling(row: Row) -> Sampling:
    given = dict(zip(_NAMES[Sampling], map(_tuples, row), strict=True))
    if given["constraint"] is not None:
        given["constraint"] = constraint(given["constraint"])
    return Sampling(**given)


def _finish(row: Row) -> Finish:
    given = dict(zip(_NAMES[Finish], row, strict=True))
    for name in ("label_token_logprobs", "embedding"):
        given[name] = _tuples(given[name])
    given["prompt_logprobs"] = tuple(map(_position, given["prompt_logprobs"]))
    return Finish(**given)


def _position(row: Row) -> PositionLogprobs:
    chosen, top = row
    return PositionLogprobs(chosen=tuple(chosen), top=_tuples(top))


def _tuples(value: Any) -> Any:
    """Return lists as the tuples that they were, all the way down."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
