"""``registry fsck``: every kind of damage is found, named, and put right where a source proves it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lorary.errors import AdapterNotFound, CorruptArtifact
from lorary.registry import Registry
from lorary.registry.fsck import FsckReport
from lorary.registry.fsck_repair import Repairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.registry import VersionInfo
    from tests.registry.conftest import Forge


def root_of(registry: Registry) -> Path:
    return Path(registry.url.removeprefix("file://"))


@pytest.fixture
def filled(forge: Forge, registry: Registry) -> Registry:
    """Adapter ``a``: versions 1, 2, 3, and ``prod``, which went 1, 2, 3, 2."""
    for seed in (1, 2, 3):
        registry.push(
            forge.folder(str(seed), seed=seed), "a", base=forge.card, aliases=["prod"], actor="ada"
        )
    registry.rollback("a", "prod", reason="errors", actor="bob")
    return registry


def again(registry: Registry) -> Registry:
    return Registry.open(registry.url)


def blob_of(registry: Registry, version: int, path: str = "adapter_model.safetensors") -> Path:
    folder = registry.fetch(registry.resolve(f"a@{version}"))
    inode = (folder / path).stat().st_ino
    (found,) = (p for p in root_of(registry).glob("blobs/sha256/*/*") if p.stat().st_ino == inode)
    return found


def rot(file: Path) -> None:
    """Change one byte in place, so that every hard link to it changes, too."""
    file.chmod(0o644)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    file.chmod(0o444)


def overwrite(file: Path, raw: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(raw)


def problems(report: FsckReport) -> list[tuple[str, str]]:
    return [(finding.where, finding.problem) for finding in report.findings]


def check_repaired(registry: Registry, where: str, problem: str) -> None:
    """It is found without being touched, then repaired, then everything is as it was."""
    found = again(registry).fsck()
    assert not found.is_ok
    assert any(w == where and problem in p for w, p in problems(found)), found
    assert again(registry).fsck().findings == found.findings  # looking changes nothing
    repaired = again(registry).fsck(repair=True, actor="eve")
    assert repaired.is_ok, repaired
    assert any(f.is_repaired for f in repaired.findings)
    after = again(registry)
    assert after.fsck().findings == ()
    assert after.verify().is_ok
    assert after.aliases("a") == {"latest": 3, "prod": 2}
    assert [move.to_version for move in after.log("a", "prod")] == [1, 2, 3, 2]
    assert after.audit("a")[-1].event == "repair"
    assert after.audit("a")[-1].actor == "eve"


def test_a_sound_registry_has_nothing_to_say(filled: Registry) -> None:
    report = filled.fsck(grace_s=0)
    assert (report.findings, report.versions, report.spare_blobs) == ((), 3, 0)
    assert report.blobs == 3 * 2 + 1  # tensors and manifests, and the configuration they share


def test_a_lost_or_damaged_version_file_is_made_again(filled: Registry) -> None:
    files = root_of(filled) / "adapters" / "a" / "versions"
    whole = (files / "2.json").read_bytes()
    (files / "2.json").unlink()
    check_repaired(filled, "a@2", "version file is missing")
    assert (files / "2.json").read_bytes() == whole
    overwrite(files / "3.json", whole[:40])
    check_repaired(filled, "a@3", "not JSON")
    swapped = json.loads(whole) | {"version": 1}
    overwrite(files / "1.json", json.dumps(swapped).encode())
    check_repaired(filled, "a@1", "the audit log")


def test_without_an_audit_log_only_one_manifest_may_claim_a_number(filled: Registry) -> None:
    folder = root_of(filled) / "adapters" / "a"
    (folder / "audit.jsonl").unlink()
    (folder / "versions" / "2.json").unlink()
    report = again(filled).fsck(repair=True)
    assert report.is_ok
    assert [f.where for f in report.findings] == ["a@2"]
    assert again(filled).fsck().findings == ()


def test_the_number_of_a_lost_version_is_not_given_again(forge: Forge, filled: Registry) -> None:
    files = root_of(filled) / "adapters" / "a" / "versions"
    (files / "3.json").unlink()
    folder = forge.folder("new", seed=9)
    with pytest.raises(CorruptArtifact, match="no number is ever given twice"):
        again(filled).push(folder, "a", base=forge.card)
    (files / "2.json").unlink()
    with pytest.raises(CorruptArtifact, match="file of version 2 is gone"):
        again(filled).push(folder, "a", base=forge.card)
    assert again(filled).fsck(repair=True).is_ok
    assert again(filled).push(folder, "a", base=forge.card).version == 4


def test_damaged_files_come_back_from_another_copy(filled: Registry, tmp_path: Path) -> None:
    blob = blob_of(filled, 2)
    copy = blob.read_bytes()
    overwrite(blob, copy[:-1])  # the unpacked folder keeps the old file
    check_repaired(filled, "a@2", "adapter_model.safetensors is damaged")
    blob_of(filled, 3).unlink()
    check_repaired(filled, "a@3", "adapter_model.safetensors is missing")
    shutil.copytree(root_of(filled), tmp_path / "mirror")
    rot(blob_of(filled, 1))  # the unpacked folder with it
    assert not again(filled).fsck(repair=True).is_ok
    hopeless = again(filled).fsck().damage
    assert [f.repair for f in hopeless] == [""]
    assert "fsck --from" in hopeless[0].problem
    mirror = Registry.open(tmp_path / "mirror")
    assert again(filled).fsck(repair=True, sources=[mirror]).is_ok
    assert again(filled).verify().is_ok


def test_a_manifest_comes_back_from_the_unpacked_folder(filled: Registry) -> None:
    blob_of(filled, 2, "manifest.json").unlink()
    check_repaired(filled, "a@2", "manifest.json is missing")


def test_an_alias_log_comes_back_from_the_audit_log(filled: Registry) -> None:
    log = root_of(filled) / "adapters" / "a" / "aliases.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    where = "adapters/a/aliases.jsonl"
    log.write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))
    check_repaired(filled, where, "line 2 is damaged")
    log.write_bytes(b"".join(lines[:-1]))
    check_repaired(filled, where, "line 4 is gone")
    log.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b"bob", b"eve")]))
    check_repaired(filled, where, "not what the audit log says")
    assert log.read_bytes() == b"".join(lines)
    assert len(list(log.parent.glob("aliases.jsonl.damaged-*"))) == 3  # nothing is thrown away
    (log.parent / "audit.jsonl").unlink()
    log.write_bytes(b"".join([lines[0], *lines[2:]]))
    report = again(filled).fsck(repair=True)
    assert "from where it was not" in report.damage[0].problem


def test_marks_come_back_from_the_audit_log_and_deleted_files_are_no_damage(
    forge: Forge, filled: Registry
) -> None:
    last = filled.push(forge.folder("last", seed=9), "a", base=forge.card).version
    filled.deprecate(f"a@{last - 1}", reason="old", actor="bob")
    filled.delete(f"a@{last}", reason="licence", actor="eve")
    filled.gc(grace_s=0)
    assert again(filled).fsck().findings == ()
    log = root_of(filled) / "adapters" / "a" / "marks.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for damaged, problem in (
        (lines[:-1], "line 2 is gone"),
        ([b"{}\n", *lines[1:]], "line 1 is damaged"),
        ([lines[0], lines[1].replace(b"eve", b"bob")], "not what the audit log says"),
    ):
        log.write_bytes(b"".join(damaged))
        check_repaired(filled, "adapters/a/marks.jsonl", problem)
        assert log.read_bytes() == b"".join(lines)
    with pytest.raises(AdapterNotFound, match=r"deleted .* by eve: licence"):
        again(filled).resolve(f"a@{last}")


def test_a_torn_last_line_is_litter(filled: Registry) -> None:
    folder = root_of(filled) / "adapters" / "a"
    for name in ("aliases.jsonl", "audit.jsonl"):
        before = (folder / name).read_bytes()
        with (folder / name).open("ab") as file:
            file.write(b'{"at": "20')
        report = again(filled).fsck(repair=True)
        assert report.is_ok
        assert [(f.severity, f.is_repaired) for f in report.findings] == [("litter", True)]
        assert (folder / name).read_bytes() == before


def test_an_audit_log_that_was_tampered_with(forge: Forge, filled: Registry) -> None:
    log = root_of(filled) / "adapters" / "a" / "audit.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(CorruptArtifact, match=r"line 3 .* taken out"):
        again(filled).audit("a")
    check_repaired(filled, "a", "taken out")
    events = again(filled).audit("a")
    kept = next(log.parent.glob("audit.jsonl.damaged-*"))
    assert kept.name in events[-1].reason
    assert [e.event for e in events].count("push") == 3
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]) + b"{}\n")
    with pytest.raises(CorruptArtifact, match="last line"):  # no change without its record
        again(filled).push(forge.folder("new", seed=9), "a", base=forge.card)


def test_a_change_that_could_not_be_recorded_is_recorded_by_the_next(
    forge: Forge,
    filled: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("lorary.registry.audit.append_lines", full)
        info = filled.push(forge.folder("4", seed=4), "a", base=forge.card, aliases=["prod"])
    assert info.version == 4
    assert "the next change will record it" in caplog.text
    assert filled.fsck().findings == ()
    filled.set_alias("a", "prod", 1, actor="ada")
    last = [(e.event, e.subject, e.actor, e.after[:1]) for e in again(filled).audit("a")[-3:]]
    user = filled.log("a")[-2].actor
    assert last == [
        ("push", "4", "", "s"),
        ("alias", "prod", user, "4"),
        ("alias", "prod", "ada", "1"),
    ]


def test_unpacked_folders_out_of_step(filled: Registry) -> None:
    folder = filled.fetch(filled.resolve("a@1"))
    where = str(folder.relative_to(root_of(filled)))
    (folder / "extra.py").write_text("")
    check_repaired(filled, where, "extra.py does not belong")
    file = folder / "adapter_model.safetensors"
    overwrite(file, b"other")
    check_repaired(filled, where, "not what is in its blob")
    file.unlink()
    check_repaired(filled, where, "is missing")
    copy = file.read_bytes()
    overwrite(file, copy)
    assert again(filled).fsck(repair=True).is_ok
    assert file.stat().st_ino == blob_of(filled, 1).stat().st_ino


def test_blobs_that_can_be_written_to(filled: Registry) -> None:
    blob = blob_of(filled, 1)
    blob.chmod(0o664)
    found = again(filled).fsck()
    assert "mode 664" in found.damage[0].problem
    assert again(filled).fsck(repair=True).is_ok
    assert blob.stat().st_mode & 0o222 == 0


def test_left_overs_have_a_grace_time(filled: Registry) -> None:
    root = root_of(filled)
    left = root / "tmp" / "push-1-abc"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    old = root / "unpacked" / ("0" * 64)
    old.mkdir()
    assert again(filled).fsck(repair=True).findings == ()
    assert left.exists()
    os.utime(left / "adapter_model.safetensors", (0, 0))
    os.utime(left, (0, 0))
    os.utime(old, (0, 0))
    report = again(filled).fsck(repair=True)
    assert [f.severity for f in report.findings] == ["litter", "litter"]
    assert report.is_ok
    assert not left.exists()
    assert not old.exists()
    blob = blob_of(filled, 3)
    (root / "adapters" / "a" / "versions" / "3.json").unlink()
    (root / "adapters" / "a" / "audit.jsonl").unlink()
    report = again(filled).fsck()
    assert (report.spare_blobs, blob.exists()) == (2, True)  # gc's business, not fsck's
    assert report.is_ok  # nothing is left that tells of a version 3


def test_what_a_push_needs_meanwhile_stays(
    filled: Registry, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, blob = root_of(filled), blob_of(filled, 3)
    folder = filled.fetch(filled.resolve("a@3"))
    given = root.parent / "given"
    shutil.copytree(folder, given)
    (root / "adapters" / "a" / "versions" / "3.json").unlink()
    (root / "adapters" / "a" / "audit.jsonl").unlink()
    os.utime(folder, (0, 0))
    rot(blob)
    pushed: list[VersionInfo] = []

    def after_a_push(real: Callable[[Repairs, Path], None]) -> Callable[[Repairs, Path], None]:
        def act(self: Repairs, path: Path) -> None:
            if not pushed:
                pushed.append(again(filled).push(given, "a", base=forge.card))
            real(self, path)

        return act

    for name in ("discard_blob", "discard_unpacked"):
        monkeypatch.setattr(Repairs, name, after_a_push(getattr(Repairs, name)))
    again(filled).fsck(repair=True, grace_s=0)
    assert [info.version for info in pushed] == [3]
    assert blob.exists()
    assert again(filled).verify().is_ok


def test_strangers_in_the_house(filled: Registry) -> None:
    root = root_of(filled)
    (root / "adapters" / "..x").mkdir()
    (root / "blobs" / "sha256" / "ab").mkdir(exist_ok=True)
    (root / "blobs" / "sha256" / "ab" / "notes.txt").write_text("")
    report = again(filled).fsck(repair=True)
    assert len(report.damage) == 2
    assert all("look, and take it away" in f.problem for f in report.damage)
    with pytest.raises(AdapterNotFound):
        again(filled).audit("x")


def test_on_a_hub_missing_tags_are_set(forge: Forge, hub_url: str) -> None:
    from lorary.registry.hub_client import HubClient

    registry = Registry.open(hub_url, create=True)
    registry.push(forge.folder(), "a", base=forge.card, aliases=["prod"], actor="ada")
    repo_id = f"{hub_url.removeprefix('hf://')}/a"
    HubClient()._api.delete_tag(repo_id, tag="v1")
    assert problems(again(registry).fsck()) == [
        ("a@1", "tag v1 is missing: its pusher died before setting it")
    ]
    assert again(registry).fsck(repair=True).is_ok
    assert again(registry).fsck().findings == ()
    events = again(registry).audit("a")
    assert [(e.event, e.subject, e.after[:7]) for e in events] == [
        ("push", "1", "sha256:"),
        ("alias", "prod", "1"),
    ]
    assert all(len(e.evidence) >= 40 for e in events)
