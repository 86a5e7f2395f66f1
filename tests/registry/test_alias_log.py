from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorary.errors import CorruptArtifact
from lorary.registry import Registry
from lorary.registry.aliases import UNSET, AliasLog, AliasMove

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


def move(to: int | None, alias: str = "prod", kind: str = "set") -> AliasMove:
    return AliasMove(
        at="2026-01-01T00:00:00Z",
        actor="ada",
        alias=alias,
        from_version=None,
        to_version=to,
        kind=kind,  # type: ignore[arg-type]
    )


@pytest.fixture
def log(tmp_path: Path) -> AliasLog:
    return AliasLog(tmp_path / "aliases.jsonl", tmp_path / "lock")


@pytest.fixture
def filled(forge: Forge, registry: Registry) -> Registry:
    """Adapter ``a`` with versions 1, 2, 3."""
    for seed in (1, 2, 3):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    return registry


def test_a_torn_last_line_is_skipped_and_repaired(log: AliasLog, tmp_path: Path) -> None:
    file = tmp_path / "aliases.jsonl"
    log.append(move(1), expect=UNSET)
    whole = file.read_bytes()
    log.append(move(2), expect=UNSET)
    both = file.read_bytes()
    for end in range(len(whole), len(both)):
        file.write_bytes(both[:end])
        fresh = AliasLog(file, tmp_path / "lock")
        assert fresh.state() == {"prod": 1}
        fresh.append(move(3), expect=1)
        assert fresh.state() == {"prod": 3}
        assert len(file.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ["", "{}", "[]", "{", '{"at": 1}', "\x00" * 40])
def test_damage_before_the_last_line_is_not_hidden(
    log: AliasLog, tmp_path: Path, line: str
) -> None:
    log.append(move(1), expect=UNSET)
    file = tmp_path / "aliases.jsonl"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(CorruptArtifact, match="line 1"):
        log.state()
    with pytest.raises(CorruptArtifact):
        log.append(move(2), expect=UNSET)


def test_a_damaged_log_is_reported_by_verify(filled: Registry) -> None:
    filled.set_alias("a", "prod", 1)
    file = Path(filled.url.removeprefix("file://")) / "adapters" / "a" / "aliases.jsonl"
    line = json.loads(file.read_text()) | {"to_version": 9}
    file.write_text(json.dumps(line) + "\n")
    assert filled.verify().problems == (
        "a: alias 'prod' points at version 9, which does not exist",
    )
    file.write_text("x\n")
    assert not filled.verify().is_ok


@given(st.lists(st.tuples(st.sampled_from(["prod", "canary"]), st.none() | st.integers(1, 4))))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_state_is_the_log_replayed(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int | None]]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    writer, reader = (AliasLog(folder / "aliases.jsonl", folder / "lock") for _ in range(2))
    model: dict[str, int] = {}
    for alias, to in moves:
        done = writer.append(move(to, alias), expect=model.get(alias))
        assert done.from_version == model.get(alias)
        if to is None:
            model.pop(alias, None)
        else:
            model[alias] = to
        assert writer.state() == reader.state() == model
