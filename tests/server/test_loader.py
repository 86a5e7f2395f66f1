"""What adapters of one recipe share is looked at once; what they do not share, every time."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry import BaseCard, Registry
from lorary.registry.folder import CONFIG_FILE, TENSORS_FILE
from lorary.registry.layouts import Layouts
from lorary.registry.safetensors_file import read_header, read_tensor, write
from lorary.server.adapters.loader import LoadedAdapter, ReadBuffer, TensorBytes, load_adapter
from tests.conftest import AdapterRecipe, build_adapter, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def registry(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Three adapters: two of one recipe, the third with another rank."""
    root = tmp_path_factory.mktemp("loader")
    registry = Registry.open(root / "registry", create=True)
    card = BaseCard.from_folder(tiny_base)
    for seed, (name, rank) in enumerate([("one", 8), ("two", 8), ("other", 4)]):
        folder = build_adapter(
            tiny_base, root / name, AdapterRecipe(rank=rank, alpha=16, seed=seed)
        )
        registry.push(write_manifest(tiny_base, folder), name, base=card)
    return registry


class World:
    """Loads as a worker thread does: into the same memory, with what was found right before."""

    def __init__(self, registry: Registry, base: Path) -> None:
        self.registry = registry
        self.card = BaseCard.from_folder(base)
        self.layouts, self.buffer = Layouts(), ReadBuffer()
        self.examined: list[str] = []

    def load(self, name: str) -> LoadedAdapter:
        file = TensorBytes(None, self.buffer)
        folder = self.registry.fetch(self.registry.resolve(name), reader=file.hash)
        return self.check(folder, file)

    def check(self, folder: Path, file: TensorBytes | None = None) -> LoadedAdapter:
        return load_adapter(
            folder,
            self.card,
            modules=frozenset(self.card.modules),
            max_rank=64,
            file=file or TensorBytes(None, self.buffer),
            layouts=self.layouts,
        )

    def is_loaded(self, name: str, found: LoadedAdapter) -> bool:
        """Compare with numpy's reading of the version's own file."""
        path = self.registry.locate(self.registry.resolve(name)) / TENSORS_FILE
        infos = read_header(path).tensors
        for module, (a, b) in found.tensors.items():
            for side, tensor in (("A", a), ("B", b)):
                info = infos[f"base_model.model.{module}.lora_{side}.weight"]
                if not np.array_equal(tensor.float().numpy(), read_tensor(path, info)):
                    return False
        return len(infos) == 2 * len(found.tensors)


@pytest.fixture
def world(registry: Registry, tiny_base: Path) -> World:
    return World(registry, tiny_base)


def test_one_after_another_into_the_same_memory(world: World) -> None:
    one = world.load("one")
    assert world.is_loaded("one", one)
    two = world.load("two")
    assert two is one, "of one layout, in one memory"
    assert world.is_loaded("two", two)
    assert not world.is_loaded("one", two)
    other = world.load("other")
    assert other is not two
    assert world.is_loaded("other", other)
    assert world.is_loaded("one", world.load("one"))


def test_a_file_is_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    fill = TensorBytes._fill

    def counted(
        self: TensorBytes, path: Path, end: int, told: Callable[[memoryview], object]
    ) -> None:
        read.append(end)
        fill(self, path, end, told)

    monkeypatch.setattr(TensorBytes, "_fill", counted)
    world.load("one")
    path = world.registry.locate(world.registry.resolve("one")) / TENSORS_FILE
    assert read == [path.stat().st_size]


def test_what_is_too_large_to_keep_is_hashed_and_read_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReadBuffer, "MOST", 1000)
    first, second = world.load("one"), world.load("two")
    assert first is not second
    assert world.is_loaded("one", first), "in memory of its own"
    assert world.is_loaded("two", second)


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 4096 + b"end"
    path.write_bytes(data)
    assert TensorBytes().hash(path, len(data)) == hashlib.sha256(data).hexdigest()
    with pytest.raises(CorruptArtifact, match="ends before"):
        TensorBytes().hash(path, len(data) + 1)


def test_damage_shows_whatever_was_found_right_before(tiny_base: Path, tmp_path: Path) -> None:
    own = Registry.open(tmp_path / "registry", create=True)
    folder = build_adapter(tiny_base, tmp_path / "a", AdapterRecipe(rank=8, alpha=16, seed=1))
    own.push(write_manifest(tiny_base, folder), "a", base=BaseCard.from_folder(tiny_base))
    world = World(own, tiny_base)
    world.load("a")
    path = own.locate(own.resolve("a")) / TENSORS_FILE
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifact, match="sha256"):
        world.load("a")


def rewritten(source: Path, target: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """Copy a version's configuration and tensors, these changed."""
    target.mkdir()
    (target / CONFIG_FILE).write_bytes((source / CONFIG_FILE).read_bytes())
    path = source / TENSORS_FILE
    header = read_header(path)
    arrays = {name: change(name, read_tensor(path, info)) for name, info in header.tensors.items()}
    with (target / TENSORS_FILE).open("wb") as file:
        write(
            file,
            {name: (array.dtype, array.shape) for name, array in arrays.items()},
            arrays.__getitem__,
            header.metadata,
        )
    return target


def test_numbers_are_looked_at_every_time(world: World, tmp_path: Path) -> None:
    world.load("one")
    source = world.registry.locate(world.registry.resolve("one"))

    def spoiled(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("layers.1.mlp.down_proj.lora_B.weight"):
            array[3, 2] = np.nan
        return array

    bad = rewritten(source, tmp_path / "nan", spoiled)
    with pytest.raises(CorruptArtifact, match=r"down_proj.*NaN"):
        world.check(bad)
    loud = rewritten(source, tmp_path / "loud", lambda _, array: array * np.float32(1e4))
    with pytest.raises(IncompatibleAdapter, match="times as large"):
        world.check(loud)
    still = rewritten(source, tmp_path / "still", lambda _, array: array * np.float32(0))
    with pytest.raises(IncompatibleAdapter, match="no effect"):
        world.check(still)


def test_another_configuration_of_the_same_tensors_is_looked_at(
    world: World, tmp_path: Path
) -> None:
    world.load("one")
    source = world.registry.locate(world.registry.resolve("one"))
    folder = rewritten(source, tmp_path / "changed", lambda _, array: array)
    world.check(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(IncompatibleAdapter, match="bias"):
        world.check(folder)


def test_scaled_tensors_are_made_for_every_load(world: World, tmp_path: Path) -> None:
    """A folder that is not canonical: B is multiplied, so it is no view."""
    source = world.registry.locate(world.registry.resolve("one"))
    folders = [
        rewritten(source, tmp_path / str(factor), lambda _, x, f=factor: x * np.float32(f))  # type: ignore[misc]
        for factor in (1.0, 0.5)
    ]
    for folder in folders:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 2 * config["r"]}))
    (first, second) = (world.check(folder) for folder in folders)
    module = next(iter(first.tensors))
    assert torch.equal(first.tensors[module][1], 2 * second.tensors[module][1])


def test_layouts_that_were_not_used_for_long_are_forgotten(world: World) -> None:
    world.layouts = Layouts(most=1)
    one = world.load("one")
    assert world.load("two") is one
    world.load("other")
    again = world.load("two")
    assert again is not one
    assert world.is_loaded("two", again)
