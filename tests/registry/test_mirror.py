"""A mirror that is cut short goes on; one that would lose something does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import Conflict, CorruptArtifact
from lorary.registry import Registry
from lorary.registry.local import LocalStore
from lorary.registry.mirror import mirror

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


@pytest.fixture
def source(forge: Forge, registry: Registry) -> Registry:
    """``a`` with versions 1 (deleted), 2 and 3; ``prod`` went from 2 to 3."""
    for seed in (1, 2, 3):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    registry.delete("a@1", reason="old")
    registry.set_alias("a", "prod", 2)
    registry.set_alias("a", "prod", 3)
    return registry


def same(source: Registry, target: Registry) -> bool:
    return (
        source.log("a") == target.log("a")
        and source.marks("a") == target.marks("a")
        and source.list() == target.list()
        and target.verify().is_ok
    )


@pytest.mark.parametrize("step", ["commit", "mark", "move_alias", "fetch"])
@pytest.mark.parametrize("call", [1, 2])
def test_it_goes_on_where_it_was_cut_short(
    source: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    target = Registry.open(tmp_path / "target", create=True)
    real, calls = getattr(LocalStore, step), []

    def cut(*args: Any, **options: Any) -> Any:
        calls.append(step)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, step, cut)
        try:
            mirror(source, target)
        except KeyboardInterrupt:
            assert len(calls) == call
        else:
            assert (step, call) == ("mark", 2)  # there is one mark only
    mirror(source, target)
    assert same(source, target)
    (done,) = mirror(source, target)
    assert (done.num_versions, done.num_moves, done.num_marks) == (0, 0, 0)


def test_what_has_gone_apart_is_left_alone(source: Registry, forge: Forge, tmp_path: Path) -> None:
    target = Registry.open(tmp_path / "target", create=True)
    mirror(source, target)
    for change in (
        lambda: target.set_alias("a", "canary", 2),
        lambda: target.deprecate("a@2", reason="here only"),
    ):
        before = target.log("a"), target.marks("a")
        change()
        after = target.log("a"), target.marks("a")
        assert after != before
        source.set_alias("a", "prod", 2 if source.aliases("a")["prod"] == 3 else 3)
        with pytest.raises(Conflict, match="nothing of it was changed"):
            mirror(source, target)
        assert (target.log("a"), target.marks("a")) == after
    other = Registry.open(tmp_path / "other", create=True)
    other.push(forge.folder("own", seed=9), "a", base=forge.card)
    with pytest.raises(Conflict, match="version 1 of 'a' is"):
        mirror(source, other)


def test_bytes_that_have_rotted_do_not_travel(source: Registry, tmp_path: Path) -> None:
    tensors = source.fetch(source.resolve("a@2")) / "adapter_model.safetensors"
    tensors.chmod(0o644)
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    target = Registry.open(tmp_path / "target", create=True)
    with pytest.raises(CorruptArtifact, match="sha256"):
        mirror(source, target)
    assert target.list() == []
