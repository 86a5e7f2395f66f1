"""What every registry promises, wherever it is kept: each test runs in a folder and on a hub."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lorary.errors import (
    AdapterNotFound,
    AlreadyExists,
    Conflict,
    IncompatibleAdapter,
    InvalidRef,
    InvalidRequest,
    Refused,
    StorageError,
)
from lorary.registry import BaseCard, Manifest, Registry
from lorary.registry.manifest import Metrics
from lorary.registry.mirror import mirror
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


def soon(is_so: Callable[[], bool]) -> None:
    """Wait until it is so: what a reader knows of a hub may be a second old."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def filled(forge: Forge, anywhere: Registry) -> Registry:
    """Adapter ``a`` with versions 1, 2, 3."""
    for seed in (1, 2, 3):
        anywhere.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    return anywhere


def test_push_resolve_fetch_pull(forge: Forge, anywhere: Registry, tmp_path: Path) -> None:
    info = anywhere.push(
        forge.folder(), "sentiment", base=forge.card, aliases=["prod"], description="first"
    )
    assert (info.name, info.version, info.aliases, info.rank) == ("sentiment", 1, ("prod",), 4)
    assert info.base_fingerprint == forge.card.fingerprint
    for ref in ("", "@latest", "@prod", "@1", f"@{info.digest}", f"@{info.digest[:11]}"):
        resolved = anywhere.resolve(f"sentiment{ref}")
        assert (resolved.version, resolved.digest) == (1, info.digest)
    assert anywhere.resolve("sentiment").alias == "latest"
    assert anywhere.resolve("sentiment@1").alias is None
    folder = anywhere.fetch(anywhere.resolve("sentiment"))
    spec = validate_adapter(folder, forge.card)
    assert {lora.scale for lora in spec.modules.values()} == {1.0}
    pulled = anywhere.pull("sentiment@prod", tmp_path / "out")
    names = {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert {path.name for path in pulled.iterdir()} - {"README.md"} == names
    manifest = Manifest.from_json((pulled / "manifest.json").read_bytes())
    assert (manifest.name, manifest.version, manifest.digest) == ("sentiment", 1, info.digest)
    assert (manifest.description, manifest.created_at) == ("first", "2026-01-01T00:00:00Z")
    assert anywhere.verify().is_ok


def test_versions_are_numbered_and_the_same_content_is_the_same_version(
    forge: Forge, anywhere: Registry
) -> None:
    one = anywhere.push(forge.folder("a", seed=1), "a", base=forge.card)
    two = anywhere.push(forge.folder("b", seed=2), "a", base=forge.card)
    again = anywhere.push(forge.folder("c", seed=1), "a", base=forge.card, aliases=["prod"])
    assert [one.version, two.version, again.version] == [1, 2, 1]
    assert again.digest == one.digest
    assert anywhere.aliases("a") == {"latest": 2, "prod": 1}
    elsewhere = anywhere.push(forge.folder("d", seed=1), "b", base=forge.card)
    assert (elsewhere.version, elsewhere.digest) == (1, one.digest)


def test_another_template_is_another_version(forge: Forge, anywhere: Registry) -> None:
    one = anywhere.push(
        forge.folder("a", manifest=forge.manifest(template="{{ text }}")), "a", base=forge.card
    )
    two = anywhere.push(
        forge.folder("b", manifest=forge.manifest(template="{{ text }}!")), "a", base=forge.card
    )
    assert (one.version, two.version) == (1, 2)
    assert one.digest != two.digest


def test_a_pulled_version_pushes_back_as_itself(
    forge: Forge, anywhere: Registry, tmp_path: Path
) -> None:
    info = anywhere.push(forge.folder(), "a", base=forge.card)
    again = anywhere.push(anywhere.pull("a", tmp_path / "out"), "a", base=forge.card)
    assert again == info


def test_readme_and_report_travel_with_the_version(
    forge: Forge, anywhere: Registry, tmp_path: Path
) -> None:
    folder = forge.folder()
    (folder / "README.md").write_text("# Read me")
    (folder / "report").mkdir()
    (folder / "report" / "loss.svg").write_text("<svg/>")
    (folder / "tokenizer.json").write_text("{}")
    anywhere.push(folder, "a", base=forge.card)
    pulled = anywhere.pull("a", tmp_path / "out")
    assert (pulled / "README.md").read_text().endswith("# Read me")
    assert (pulled / "report" / "loss.svg").read_text() == "<svg/>"
    assert not (pulled / "tokenizer.json").exists()


def test_an_adapter_made_elsewhere_needs_no_manifest(forge: Forge, anywhere: Registry) -> None:
    folder = forge.folder()
    (folder / "manifest.json").unlink()
    anywhere.push(folder, "a", base=forge.card)
    manifest = anywhere.manifest(anywhere.resolve("a"))
    assert manifest.base.fingerprint == forge.card.fingerprint
    assert (manifest.method.rank, manifest.method.alpha) == (4, 8.0)
    assert manifest.task.kind == "generation"


def test_what_does_not_exist(forge: Forge, anywhere: Registry) -> None:
    for ref in ("a", "a@prod", "a@1", "a@sha256:abcd"):
        with pytest.raises(AdapterNotFound, match="not in the registry"):
            anywhere.resolve(ref)
    anywhere.push(forge.folder(), "a", base=forge.card, aliases=["prod"])
    with pytest.raises(AdapterNotFound, match="it has latest, prod"):
        anywhere.resolve("a@canary")
    with pytest.raises(AdapterNotFound, match="it has 1 to 1"):
        anywhere.resolve("a@2")
    with pytest.raises(AdapterNotFound, match="no version with digest"):
        anywhere.resolve("a@sha256:0000")
    gone = dataclasses.replace(anywhere.resolve("a"), digest="sha256:" + "0" * 64)
    with pytest.raises(AdapterNotFound, match="resolve the ref again"):
        anywhere.fetch(gone)


def test_a_digest_that_fits_several_versions_is_ambiguous(
    forge: Forge, anywhere: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["sha256:abcd" + "0" * 60, "sha256:abcd" + "1" * 60])
    monkeypatch.setattr("lorary.registry.publish.content_digest", lambda **_: next(digests))
    anywhere.push(forge.folder("a", seed=1), "a", base=forge.card)
    anywhere.push(forge.folder("b", seed=2), "a", base=forge.card)
    with pytest.raises(InvalidRef, match="fits versions 1, 2"):
        anywhere.resolve("a@sha256:abcd")
    assert anywhere.resolve("a@sha256:abcd1").version == 2


def test_another_reader_sees_a_push(forge: Forge, anywhere: Registry) -> None:
    reader = Registry.open(anywhere.url)
    with pytest.raises(AdapterNotFound):
        reader.resolve("a")
    anywhere.push(forge.folder("a", seed=1), "a", base=forge.card, aliases=["prod"])
    assert reader.resolve("a").version == 1
    anywhere.push(forge.folder("b", seed=2), "a", base=forge.card)
    soon(lambda: (reader.resolve("a").version, reader.resolve("a@prod").version) == (2, 1))
    anywhere.set_alias("a", "prod", 2)
    soon(lambda: reader.resolve("a@prod").version == 2)


def test_pull_never_overwrites(forge: Forge, anywhere: Registry, tmp_path: Path) -> None:
    anywhere.push(forge.folder(), "a", base=forge.card)
    (tmp_path / "empty").mkdir()
    anywhere.pull("a", tmp_path / "empty")
    with pytest.raises(AlreadyExists):
        anywhere.pull("a", tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(AlreadyExists):
        anywhere.pull("a", tmp_path / "file")
    with pytest.raises(StorageError):
        anywhere.pull("a", tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_moves_are_logged_in_order(filled: Registry) -> None:
    filled.set_alias("a", "prod", 1, reason="first", actor="ada")
    filled.set_alias("a", "canary", 3)
    filled.set_alias("a", "prod", 2, expect=1)
    filled.set_alias("a", "canary", None)
    assert filled.aliases("a") == {"latest": 3, "prod": 2}
    seen = [(m.alias, m.from_version, m.to_version) for m in filled.log("a")]
    assert seen == [
        ("prod", None, 1), ("canary", None, 3), ("prod", 1, 2), ("canary", 3, None)
    ]  # fmt: skip
    assert (filled.log("a")[0].actor, filled.log("a")[0].reason) == ("ada", "first")
    assert [m.to_version for m in filled.log("a", "prod")] == [1, 2]


def test_a_move_that_expects_something_else_is_refused(filled: Registry) -> None:
    filled.set_alias("a", "prod", 1, expect=None)
    for expect in (None, 2):
        with pytest.raises(Conflict, match="points at version 1"):
            filled.set_alias("a", "prod", 3, expect=expect)
    assert filled.aliases("a")["prod"] == 1
    assert len(filled.log("a")) == 1


def test_a_move_to_the_same_place_is_not_logged(filled: Registry) -> None:
    filled.set_alias("a", "prod", 1)
    assert filled.set_alias("a", "prod", 1).from_version == 1
    assert len(filled.log("a")) == 1


def test_rollback_goes_back_one_move_at_a_time(filled: Registry) -> None:
    for version in (1, 2, 3):
        filled.set_alias("a", "prod", version)
    with pytest.raises(Conflict, match="points at version 3, not at version 2"):
        filled.rollback("a", "prod", expect=2)
    assert filled.rollback("a", "prod", expect=3, reason="errors").to_version == 2
    assert filled.rollback("a", "prod").to_version == 1
    with pytest.raises(AdapterNotFound, match="from the beginning"):
        filled.rollback("a", "prod")
    filled.set_alias("a", "prod", 3)
    last = filled.rollback("a", "prod")
    assert (last.from_version, last.to_version, last.kind) == (3, 1, "rollback")


def test_what_cannot_be_moved(filled: Registry) -> None:
    with pytest.raises(InvalidRef, match="always the newest"):
        filled.set_alias("a", "latest", 1)
    with pytest.raises(InvalidRef, match="always the newest"):
        filled.rollback("a", "latest")
    with pytest.raises(InvalidRef):
        filled.set_alias("a", "../x", 1)
    with pytest.raises(AdapterNotFound, match="1 to 3"):
        filled.set_alias("a", "prod", 4)
    with pytest.raises(AdapterNotFound, match="not in the registry"):
        filled.set_alias("b", "prod", 1)
    with pytest.raises(AdapterNotFound, match="no alias 'prod' to roll back"):
        filled.rollback("a", "prod")
    with pytest.raises(AdapterNotFound, match="not in the registry"):
        filled.log("b")


def test_verify_and_list_know_every_version(filled: Registry) -> None:
    filled.set_alias("a", "prod", 2)
    assert [(info.name, info.version, info.aliases) for info in filled.list()] == [
        ("a", 1, ()),
        ("a", 2, ("prod",)),
        ("a", 3, ()),
    ]
    report = filled.verify()
    assert report.is_ok
    assert [check.version for check in report.checks] == [1, 2, 3]
    assert Registry.open(filled.url).list() == filled.list()


def test_a_list_of_one_adapter_reads_no_other(
    forge: Forge, filled: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.push(forge.folder(seed=9), "b", base=forge.card)
    filled.set_alias("a", "prod", 2)
    filled.delete("a@1", reason="old")
    every = filled.list()
    assert [(info.name, info.version) for info in every] == [("a", 2), ("a", 3), ("b", 1)]
    store, summaries = filled._store, filled._store.summaries
    read: list[str] = []

    def names() -> list[str]:
        raise AssertionError("every adapter is asked for")

    def noted(name: str) -> object:
        read.append(name)
        return summaries(name)

    monkeypatch.setattr(store, "names", names)
    monkeypatch.setattr(store, "summaries", noted)
    assert filled.list("a") == every[:2]
    assert filled.list("b") == every[2:]
    assert filled.list("nobody") == []
    assert read == ["a", "b", "nobody"]
    with pytest.raises(InvalidRef):
        filled.list("../a")


def test_a_refused_push_changes_nothing(
    forge: Forge, anywhere: Registry, other_card: BaseCard
) -> None:
    folder = forge.folder()
    with pytest.raises(IncompatibleAdapter):
        anywhere.push(folder, "a", base=other_card)
    with pytest.raises(InvalidRef):
        anywhere.push(folder, "a", base=forge.card, aliases=["ok", "latest"])
    assert anywhere.list() == []
    with pytest.raises(AdapterNotFound):
        anywhere.resolve("a")


def test_a_pull_tells_of_every_byte_twice(
    forge: Forge, anywhere: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = anywhere.push(forge.folder(), "a", base=forge.card).size_bytes
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "other-machine"))
    elsewhere = Registry.open(anywhere.url)
    for attempt in range(2):  # the second time, a hub's files are here already
        told: list[int] = []
        elsewhere.pull("a", tmp_path / f"out-{attempt}", told.append)
        assert sum(told) == pytest.approx(2 * size, rel=0.2)


@pytest.fixture
def graded(forge: Forge, anywhere: Registry) -> Registry:
    """Adapter ``a``: versions 1 to 4 of accuracy 0.80, 0.90, 0.895 and none at all."""
    for version, accuracy in enumerate((0.80, 0.90, 0.895, None), start=1):
        metrics = None
        if accuracy is not None:
            figures = {"accuracy": accuracy}
            metrics = Metrics(primary="accuracy", num_examples=100, base={}, adapter=figures)
        manifest = dataclasses.replace(forge.manifest(), metrics=metrics)
        folder = forge.folder(str(version), seed=version, manifest=manifest)
        anywhere.push(folder, "a", base=forge.card)
    return anywhere


def test_an_alias_moves_to_what_meets_its_requirements(graded: Registry) -> None:
    at_least, near_prod = "accuracy>=0.85", "accuracy>=prod-0.01"
    with pytest.raises(Refused, match=r"accuracy>=0.85: 0.8 beside 0.85"):
        graded.set_alias("a", "prod", 1, require=[at_least, near_prod])
    with pytest.raises(Refused, match="has no such figure"):
        graded.set_alias("a", "prod", 4, require=[near_prod])
    with pytest.raises(Refused, match="names alias 'prood'"):
        graded.set_alias("a", "prod", 2, require=["accuracy>=prood"])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        graded.set_alias("a", "prod", 2, require=["accuracy"])
    assert graded.log("a") == []
    graded.set_alias("a", "prod", 2, require=[at_least, near_prod])
    move = graded.set_alias("a", "prod", 3, require=[near_prod])
    assert graded.log("a")[-1] == move
    (figure,) = move.figures
    assert (figure.require, figure.value, figure.holder, figure.is_met) == (
        near_prod, 0.895, 2, True
    )  # fmt: skip
    assert figure.bound == pytest.approx(0.89)

    graded.protect("a", "prod", require=["accuracy>=@2"], reason="it earns money")
    with pytest.raises(Refused, match=r"protected.*0.8 beside 0.9"):
        graded.set_alias("a", "prod", 1)
    with pytest.raises(Refused, match="protected"):
        graded.set_alias("a", "prod", None)
    with pytest.raises(InvalidRequest, match="--reason"):
        graded.set_alias("a", "prod", 1, force=True)
    with pytest.raises(Refused, match="needs a --reason"):
        graded.rollback("a", "prod")
    assert graded.aliases("a")["prod"] == 3
    assert not graded.set_alias("a", "prod", 2).forced
    assert graded.set_alias("a", "prod", 1, force=True, reason="drill").forced
    assert graded.rollback("a", "prod", reason="errors").to_version == 2
    graded.protect("a", "prod", is_on=False)
    graded.set_alias("a", "prod", 1)
    assert [m.forced for m in graded.log("a")] == [False, False, False, True, False, False]


def test_a_deprecated_version_says_so_and_a_deleted_one_is_gone(
    forge: Forge, graded: Registry
) -> None:
    graded.set_alias("a", "prod", 2)
    with pytest.raises(InvalidRequest, match="say why"):
        graded.deprecate("a@prod")
    graded.deprecate("a@prod", reason="wrong labels", actor="ada")
    assert graded.resolve("a@2").deprecated.endswith("by ada: wrong labels")
    assert [bool(info.deprecated) for info in graded.list()] == [False, True, False, False]
    graded.deprecate("a@2", is_on=False)
    assert graded.resolve("a@prod").deprecated == ""

    with pytest.raises(Refused, match="in use: prod points at it"):
        graded.delete("a@2")
    with pytest.raises(InvalidRef, match="name the version"):
        graded.delete("a@prod")
    digest = graded.resolve("a@4").digest
    held = graded.resolve("a@4")
    graded.delete("a@4", reason="leaked", actor="ada")
    for ref in ("a@4", f"a@{digest}"):
        with pytest.raises(AdapterNotFound, match=r"deleted on .* by ada: leaked"):
            graded.resolve(ref)
    with pytest.raises(AdapterNotFound, match="deleted"):
        graded.set_alias("a", "prod", 4)
    with pytest.raises(AdapterNotFound, match="deleted"):
        graded.delete("a@4")
    assert graded.fetch(held).is_dir()  # whoever is at it goes on
    assert graded.aliases("a") == {"latest": 3, "prod": 2}
    assert [info.version for info in graded.list()] == [1, 2, 3]
    report = graded.verify()
    assert report.is_ok
    assert len(report.checks) == 3
    again = graded.push(forge.folder("again", seed=4), "a", base=forge.card)
    assert (again.version, again.digest) == (5, digest)
    assert Registry.open(graded.url).aliases("a") == {"latest": 5, "prod": 2}


def test_what_nothing_needs_is_freed_and_nothing_else(
    forge: Forge, graded: Registry, tmp_path: Path
) -> None:
    graded.delete("a@1")
    assert graded.gc().num_bytes == 0  # too young
    soon_enough = -2.0  # seconds: clocks of files and of logs differ by less
    would = graded.gc(grace_s=soon_enough, is_dry=True)
    assert would.num_folders == 1
    assert would.num_bytes > 8 * 64 * 4 * 2
    assert graded.gc(grace_s=soon_enough) == would
    assert graded.gc(grace_s=soon_enough).num_bytes == 0
    assert bool(would.notes) == graded.url.startswith("hf://")
    assert graded.verify().is_ok
    for version in (2, 3, 4):
        graded.pull(f"a@{version}", tmp_path / str(version))
    assert graded.push(forge.folder("again", seed=1), "a", base=forge.card).version == 5
    assert graded.verify().is_ok


def test_a_mirror_holds_the_same_and_goes_on_where_it_stopped(
    forge: Forge, graded: Registry, tmp_path: Path
) -> None:
    graded.set_alias("a", "prod", 2, reason="first", actor="ada")
    graded.delete("a@1", reason="old")
    graded.protect("a", "prod", require=["accuracy>=prod"])
    copy = Registry.open(tmp_path / "copy", create=True)
    (done,) = mirror(graded, copy)
    assert (done.num_versions, done.num_there, done.num_moves, done.num_marks) == (3, 1, 1, 1)
    assert copy.log("a") == graded.log("a")
    assert copy.marks("a").deleted == graded.marks("a").deleted
    assert [(i.version, i.digest, i.created_at, i.aliases) for i in copy.list()] == [
        (i.version, i.digest, i.created_at, i.aliases) for i in graded.list()
    ]
    assert copy.verify().is_ok
    graded.set_alias("a", "prod", 3, force=True, reason="drill")
    graded.deprecate("a@2", reason="worse")
    (again,) = mirror(graded, copy)
    assert (again.num_versions, again.num_bytes, again.num_moves, again.num_marks) == (0, 0, 1, 1)
    assert copy.log("a") == graded.log("a")

    copy.push(forge.folder("own", seed=9), "a", base=forge.card)
    with pytest.raises(Conflict, match="gone apart"):
        mirror(graded, copy)
    (back,) = mirror(copy, graded)  # it only went on
    assert (back.num_versions, back.num_there) == (1, 4)
    assert graded.resolve("a").digest == copy.resolve("a").digest
    assert graded.verify().is_ok
