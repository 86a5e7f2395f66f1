"""Rollouts and events as messages of ``control.proto``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from lorary.server.rollout.aliases import Followed
    from lorary.server.rollout.events import Event
    from lorary.server.rollout.gates import Tally
    from lorary.server.rollout.splits import Trial


def rollout(trial: Trial) -> pb.Rollout:
    """Return a canary and what was measured of it."""
    split, copies = trial.split, trial.copies
    return pb.Rollout(
        name=trial.name,
        alias=split.alias,
        holder_version=split.version,
        canary_version=split.canary.version,
        percent=split.canary.percent,
        shadow=split.canary.shadow,
        state=trial.state,
        problem=trial.problem,
        holder=_tally(trial.holder),
        canary=_tally(trial.canary),
        num_compared=copies.num_compared,
        num_same=copies.num_same,
        divergence=copies.divergence,
        since=split.since,
    )


def behind(followed: Followed) -> pb.BehindAlias:
    """Return a ref that does not get what it means by now."""
    return pb.BehindAlias(
        ref=followed.ref, version=followed.serving.version, reason=followed.behind
    )


def event(happened: Event) -> pb.WatchResponse:
    """Return an event as a message of a watch."""
    kind: Any = pb.EventKind.Value(f"EVENT_KIND_{happened.kind.upper()}")
    return pb.WatchResponse(
        event=pb.Event(
            kind=kind,
            name=happened.name,
            version=happened.version,
            digest=happened.digest,
            alias=happened.alias,
            detail=happened.detail,
            at_unix_ms=int(happened.at_s * 1000),
        )
    )


def _tally(tally: Tally) -> pb.CallTally:
    return pb.CallTally(
        num_calls=tally.num_calls, num_errors=tally.num_errors, first_token_p95_s=tally.p95_s
    )
