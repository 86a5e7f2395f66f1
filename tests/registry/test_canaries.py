"""Canaries in the alias log: the same in a folder and on a hub, raced for, undone, and told of."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from lorary.errors import (
    AdapterNotFound,
    Conflict,
    CorruptArtifact,
    InvalidRequest,
    LoraryError,
    Refused,
)
from lorary.registry import Registry
from lorary.registry.aliases import AliasMove, parse_moves, replay
from lorary.registry.cli import app
from lorary.registry.splits import Canary, Gates, replay_splits

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

CANARY = Canary(version=2, percent=10, gates=Gates(calls=20, errors=0.02), promote_after=500)


@pytest.fixture
def filled(forge: Forge, anywhere: Registry) -> Registry:
    """Adapter ``a`` with versions 1 and 2; ``prod`` is at 1."""
    for seed in (1, 2):
        anywhere.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    anywhere.set_alias("a", "prod", 1)
    return anywhere


@pytest.mark.parametrize("anywhere", ["folder", "hub"], indirect=True)
def test_a_canary_begins_is_seen_by_others_and_ends_by_compare_and_swap(filled: Registry) -> None:
    began = filled.rollouts.start("a", "prod", CANARY, actor="ada", reason="try it")
    assert (began.kind, began.from_version, began.to_version) == ("canary", 1, 1)
    split = Registry.open(filled.url).rollouts.of("a", "prod")
    assert split is not None
    assert (split.version, split.canary, split.actor) == (1, CANARY, "ada")
    assert filled.resolve("a@prod").version == 1, "the alias itself stays"
    assert not filled.trouble()

    def end(actor: str) -> str:
        try:
            filled.rollouts.stop("a", "prod", expect=split, actor=actor, reason="gate errors")
        except Conflict:
            return "lost"
        return actor

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(end, ("s1", "s2", "s3")))
    assert sorted(results)[:2] == ["lost", "lost"], "exactly one of three servers ends it"
    (winner,) = set(results) - {"lost"}
    last = filled.log("a", "prod")[-1]
    assert (last.actor, last.reason, last.kind, last.canary) == (
        winner, "gate errors", "canary", None
    )  # fmt: skip
    assert filled.rollouts.of("a", "prod") is None
    filled.rollouts.start("a", "prod", CANARY)
    with pytest.raises(Conflict, match="no longer runs"):
        # The same figures, but another canary than the one that was judged.
        filled.rollouts.stop("a", "prod", expect=split)
    promoted = filled.rollouts.promote("a", "prod")
    assert (promoted.to_version, promoted.kind) == (2, "set")
    assert filled.rollouts.of("a", "prod") is None
    assert filled.rollback("a", "prod").to_version == 1, "not to the canary's beginning"
    assert filled.verify().is_ok


@pytest.mark.parametrize("anywhere", ["folder", "hub"], indirect=True)
def test_a_protected_alias_and_a_canary_in_use_are_not_passed_by(filled: Registry) -> None:
    filled.protect("a", "prod", reason="customers see it")
    with pytest.raises(Refused, match="protected"):
        filled.rollouts.start("a", "prod", CANARY)
    filled.rollouts.start("a", "prod", CANARY, reason="agreed with support", actor="ada")
    with pytest.raises(Refused, match="canary of prod"):
        filled.delete("a@2")
    with pytest.raises(Refused, match="protected"):
        filled.rollouts.promote("a", "prod")
    filled.protect("a", "prod", is_on=False)
    filled.protect("a", "prod", require=["accuracy>=0.9"])
    with pytest.raises(Refused, match="accuracy"):
        filled.rollouts.start("a", "prod", replace(CANARY, percent=20), reason="more of it")
    filled.rollouts.stop("a", "prod")
    filled.delete("a@2", actor="eve")
    with pytest.raises(AdapterNotFound, match="deleted"):
        filled.rollouts.start("a", "prod", CANARY, reason="again")
    events = [(e.event, e.subject, e.actor) for e in filled.audit("a")]
    assert ("canary", "prod", "ada") in events
    assert ("delete", "2", "eve") in events
    assert filled.verify().is_ok
    assert filled.fsck().is_ok


@pytest.mark.parametrize("anywhere", ["folder", "hub"], indirect=True)
def test_a_rollback_undoes_the_canary_first_and_a_move_ends_it(filled: Registry) -> None:
    filled.set_alias("a", "prod", 2)
    filled.rollouts.start("a", "prod", Canary(version=1, percent=0, shadow=50))
    assert filled.set_alias("a", "prod", 2).to_version == 2, "already there: nothing ends"
    assert filled.rollouts.of("a", "prod") is not None
    undone = filled.rollback("a", "prod")
    assert (undone.kind, undone.from_version, undone.to_version) == ("rollback", 2, 2)
    assert filled.rollouts.all("a") == {}
    assert filled.rollback("a", "prod").to_version == 1
    filled.rollouts.start("a", "prod", CANARY)
    filled.set_alias("a", "prod", None)
    assert filled.rollouts.all("a") == {}


@pytest.mark.parametrize("anywhere", ["folder"], indirect=True)
def test_what_cannot_be_a_canary(filled: Registry) -> None:
    rollouts = filled.rollouts
    for wrong, error in (
        (("a", "none", CANARY), AdapterNotFound),
        (("b", "prod", CANARY), AdapterNotFound),
        (("a", "prod", Canary(version=3, percent=1)), AdapterNotFound),
        (("a", "prod", Canary(version=1, percent=1)), InvalidRequest),
    ):
        with pytest.raises(error):
            rollouts.start(*wrong)
    with pytest.raises(AdapterNotFound, match="has no canary"):
        rollouts.stop("a", "prod")
    assert len(filled.log("a")) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"percent": 101.0},
        {"percent": float("nan")},
        {"percent": 0.0},
        {"percent": 10.0, "gates": Gates(divergence=0.1)},
        {"percent": 100.0, "gates": Gates(latency=1.5)},
        {"percent": 10.0, "promote_after": 5},
    ],
)
def test_a_canary_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Canary(version=2, **fields)


def line(**changes: Any) -> bytes:
    move = AliasMove(
        at="t",
        actor="ada",
        alias="prod",
        from_version=1,
        to_version=1,
        kind="canary",
        canary=CANARY,
    )
    return (json.dumps({**json.loads(move.to_json()), **changes}) + "\n").encode()


def test_older_lines_are_read_as_ever_and_written_as_ever() -> None:
    old = b'{"at": "t", "actor": "ada", "alias": "prod", "from_version": null, "to_version": 1, "reason": "", "kind": "set"}\n'
    moves = parse_moves(old + line(), "log")
    assert moves[0].to_json() == old
    assert moves[1].to_json() == line()
    assert replay(moves) == {"prod": 1}
    assert replay_splits(moves)["prod"].serial == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"canary": 8},
        {"canary": {"version": 2, "percent": 10}},
        {"canary": {**CANARY.to_dict(), "percent": "10"}},
        {"canary": {**CANARY.to_dict(), "percent": 400}},
        {"canary": {**CANARY.to_dict(), "more": 1}},
        {"canary": {**CANARY.to_dict(), "gates": {"calls": True}}},
        {"to_version": 2},
        {"kind": "set"},
    ],
)
def test_a_damaged_canary_is_not_hidden(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptArtifact, match="line 1 of log"):
        parse_moves(line(**changes), "log")


def test_the_command_begins_shows_and_ends(
    forge: Forge, registry: Registry, tmp_path: Path
) -> None:
    for seed in (1, 2):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    registry.set_alias("a", "prod", 1)

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--registry", registry.url])
        if isinstance(done.exception, LoraryError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    run("canary", "a", "prod", "@2", "--gate", "errors=0.02", "--gate", "calls=20")
    shown = json.loads(run("alias", "a", "--json"))
    assert shown["prod"]["version"] == 1
    assert shown["prod"]["canary"]["percent"] == 10
    assert shown["prod"]["canary"]["gates"] == {"calls": 20, "errors": 0.02}
    assert shown["latest"] == 2
    assert "2 at 10 % (gates: calls 20, errors 0.02)" in run("alias", "a")
    run("canary", "a", "prod", "--stop", "--reason", "enough")
    assert "enough" in run("log", "a")
    for wrong in (["2", "--stop"], [], ["2", "--gate", "speed=1"], ["2", "--gate", "errors=x"]):
        with pytest.raises(InvalidRequest):
            run("canary", "a", "prod", *wrong)
