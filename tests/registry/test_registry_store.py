from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lorary.errors import (
    AdapterNotFound,
    ConfigError,
    CorruptArtifact,
    IncompatibleAdapter,
    InvalidRef,
    StorageError,
)
from lorary.registry import BaseCard, Registry
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


def tree(root: Path) -> set[str]:
    """Every file of a registry but its locks."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(root)) for path in files}


def root_of(registry: Registry) -> Path:
    return Path(registry.url.removeprefix("file://"))


def test_an_adapter_of_a_team(forge: Forge, registry: Registry) -> None:
    registry.push(forge.folder(), "team/sentiment", base=forge.card, aliases=["prod"])
    assert registry.resolve("team/sentiment@prod").version == 1
    assert [info.name for info in Registry.open(registry.url).list()] == ["team/sentiment"]


def test_a_refused_push_leaves_nothing(
    forge: Forge, registry: Registry, other_card: BaseCard
) -> None:
    before = tree(root_of(registry))
    folder = forge.folder()
    with pytest.raises(IncompatibleAdapter):
        registry.push(folder, "a", base=other_card)
    for name in ("../x", "", "A", "a@1"):
        with pytest.raises(InvalidRef):
            registry.push(folder, name, base=forge.card)
    for alias in ("latest", "Prod", "3", ""):
        with pytest.raises(InvalidRef):
            registry.push(folder, "a", base=forge.card, aliases=["ok", alias])
    with pytest.raises(StorageError):
        registry.push(folder.parent / "none", "a", base=forge.card)
    assert tree(root_of(registry)) == before
    assert registry.list() == []


def test_asking_for_a_name_creates_and_remembers_nothing(registry: Registry) -> None:
    before = tree(root_of(registry))
    for i in range(1000):
        with pytest.raises(AdapterNotFound):
            registry.resolve(f"name-{i}@prod")
    assert tree(root_of(registry)) == before
    assert not registry._store._versions  # type: ignore[attr-defined]
    assert not registry._store._aliases  # type: ignore[attr-defined]


def corrupt(file: Path) -> None:
    file.chmod(0o644)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_a_flipped_bit_is_noticed_and_a_push_heals_it(
    forge: Forge, registry: Registry, tmp_path: Path
) -> None:
    folder = forge.folder()
    registry.push(folder, "a", base=forge.card)
    resolved = registry.resolve("a")
    corrupt(registry.fetch(resolved) / "adapter_model.safetensors")
    with pytest.raises(CorruptArtifact, match="sha256"):
        registry.fetch(resolved)
    with pytest.raises(CorruptArtifact, match="sha256"):
        registry.pull("a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = registry.verify()
    assert not report.is_ok
    assert "sha256" in report.checks[0].problem
    assert registry.push(folder, "a", base=forge.card).version == 1
    assert registry.verify().is_ok


def test_a_deleted_file_is_noticed_and_a_push_restores_it(forge: Forge, registry: Registry) -> None:
    folder = forge.folder()
    registry.push(folder, "a", base=forge.card)
    fetched = registry.fetch(registry.resolve("a"))
    (fetched / "adapter_model.safetensors").unlink()
    for blob in (root_of(registry) / "blobs").rglob("*"):
        if blob.is_file() and b"lora_A" in blob.read_bytes():
            blob.unlink()
    with pytest.raises(CorruptArtifact, match="is missing"):
        registry.fetch(registry.resolve("a"))
    assert not registry.verify().is_ok
    assert registry.push(folder, "a", base=forge.card).version == 1
    assert registry.verify().is_ok


def test_a_damaged_manifest_gives_way_to_a_new_version(forge: Forge, registry: Registry) -> None:
    folder = forge.folder()
    registry.push(folder, "a", base=forge.card)
    corrupt(registry.fetch(registry.resolve("a")) / "manifest.json")
    with pytest.raises(CorruptArtifact):
        registry.manifest(registry.resolve("a"))
    assert registry.list() == []
    assert registry.push(folder, "a", base=forge.card).version == 2
    assert [info.version for info in registry.list()] == [2]
    assert [bool(check.problem) for check in registry.verify().checks] == [True, False]


def test_a_damaged_version_file_is_noticed(forge: Forge, registry: Registry) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    file = root_of(registry) / "adapters" / "a" / "versions" / "1.json"
    good = file.read_bytes()
    file.chmod(0o644)
    for raw in (b"", b"{}", good.replace(b'"version": 1', b'"version": 2'), good[:-10]):
        file.write_bytes(raw)
        with pytest.raises(CorruptArtifact, match=r"1\.json"):
            Registry.open(registry.url).resolve("a")
        assert not Registry.open(registry.url).verify().is_ok
        assert Registry.open(registry.url).list() == []
    again = Registry.open(registry.url)
    assert again.push(forge.folder("b"), "a", base=forge.card).version == 2
    assert again.resolve("a").version == 2


def test_a_manifest_that_was_edited_with_its_blob_name_is_noticed(
    forge: Forge, registry: Registry
) -> None:
    """Whoever can write the files can make every hash fit, but not the digest that people know."""
    import hashlib

    registry.push(forge.folder(), "a", base=forge.card)
    root = root_of(registry)
    pointer_file = root / "adapters" / "a" / "versions" / "1.json"
    pointer = json.loads(pointer_file.read_text())
    blob = root / "blobs" / "sha256" / pointer["manifest_sha256"][:2] / pointer["manifest_sha256"]
    edited = blob.read_bytes().replace(b'"template": null', b'"template": "evil"')
    sha256 = hashlib.sha256(edited).hexdigest()
    (root / "blobs" / "sha256" / sha256[:2]).mkdir(exist_ok=True)
    (root / "blobs" / "sha256" / sha256[:2] / sha256).write_bytes(edited)
    pointer_file.unlink()
    pointer_file.write_text(
        json.dumps(pointer | {"manifest_sha256": sha256, "manifest_size": len(edited)})
    )
    report = Registry.open(registry.url).verify("a")
    assert "the content gives" in report.checks[0].problem


def test_the_unpacked_folder_can_be_deleted(forge: Forge, registry: Registry) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    resolved = registry.resolve("a")
    shutil.rmtree(registry.fetch(resolved))
    validate_adapter(registry.fetch(resolved), forge.card)


def test_deleted_versions_are_gone_at_once(forge: Forge, registry: Registry) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    registry.resolve("a")
    shutil.rmtree(root_of(registry) / "adapters" / "a")
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")


def test_addresses(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no registry at"):
        Registry.open(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="not a registry"):
        Registry.open(tmp_path / "other")
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="not a registry"):
        Registry.open(tmp_path / "other", create=True)
    for address in ("s3://bucket", "file://host/path", ""):
        with pytest.raises(ConfigError):
            Registry.open(address)
    with pytest.raises(StorageError):
        Registry.open(tmp_path / "other" / "file" / "below", create=True)
    opened = Registry.open(f"file://{tmp_path}/with%20space", create=True)
    assert (tmp_path / "with space" / "registry.json").exists()
    assert Registry.open(opened.url).list() == []
    marker = tmp_path / "with space" / "registry.json"
    marker.chmod(0o644)
    marker.write_text('{"format_version": 2, "kind": "lorary-registry"}')
    with pytest.raises(ConfigError, match="Upgrade"):
        Registry.open(opened.url)


def test_the_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for address in ("file://~/one", "~/one", Path("~/one")):
        assert Registry.open(address, create=True).url == (tmp_path / "one").as_uri()


READ_ONLY = """
import os, sys
from pathlib import Path
from lorary.errors import StorageError
from lorary.registry import BaseCard, Registry

root, folder, base = map(Path, sys.argv[1:])
card = BaseCard.from_folder(base)
registry = Registry.open(root)
if os.getuid() == 0:
    os.setgid(65534), os.setgroups([]), os.setuid(65534)
refused = 0
for doing in (
    lambda: registry.push(folder, "b", base=card),
    lambda: registry.set_alias("a", "canary", 1),
    lambda: Registry.open(root / "new", create=True),
    lambda: registry.pull("a", root / "out"),
):
    try:
        doing()
    except StorageError as error:
        assert "cannot" in str(error), error
        refused += 1
assert registry.resolve("a@prod").version == 1
assert (registry.fetch(registry.resolve("a")) / "adapter_config.json").exists()
assert registry.verify().is_ok
print("refused", refused)
"""


def test_a_read_only_registry_can_be_read_and_refuses_writes(forge: Forge, tiny_base: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to other users
        os.chmod(scratch, 0o755)
        root, folder, base = (Path(scratch) / name for name in ("registry", "adapter", "base"))
        shutil.copytree(forge.folder(), folder)
        shutil.copytree(tiny_base, base)
        registry = Registry.open(root, create=True)
        registry.push(folder, "a", base=forge.card, aliases=["prod"])
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(root), str(folder), str(base)],
            capture_output=True,
            text=True,
            check=False,
        )
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    assert done.stdout == "refused 4\n", done.stderr


def test_a_full_disk_is_said_and_leaves_nothing(
    forge: Forge, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    before = tree(root_of(registry))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left.*free some space"):
            registry.push(forge.folder("x"), "a", base=forge.card)
    assert tree(root_of(registry)) == before
    assert registry.push(forge.folder("y"), "a", base=forge.card).version == 1


def test_the_registry_imports_no_torch() -> None:
    code = (
        "import sys, lorary.registry, lorary.registry.validate, lorary.registry.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'safetensors', 'huggingface_hub', 'lorary.bases'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
