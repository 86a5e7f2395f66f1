"""Adapters for the tiny base, made without torch, right or wrong as a test needs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorary.registry import BaseCard, Manifest, Registry
from lorary.registry.manifest import BaseIdentity, Method, Task
from lorary.registry.safetensors_file import Array, write

Tensors = dict[str, Array]


@dataclass
class Forge:
    """Makes PEFT folders for ``card`` under ``root``; the same arguments give the same bytes."""

    card: BaseCard
    root: Path

    def tensors(
        self, *, rank: int = 4, seed: int = 0, dtype: Any = np.float32, last: str = "q_proj"
    ) -> Tensors:
        """A and B for every module whose last name is ``last``."""
        generator = np.random.default_rng(seed)
        tensors: Tensors = {}
        for module, (rows, columns) in self.card.modules.items():
            if module.endswith("." + last):
                for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    values = (generator.standard_normal(shape) / 2).astype(dtype)
                    tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
        return tensors

    def config(self, **changes: Any) -> dict[str, Any]:
        """A plain configuration of rank 4 and scale 2."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/tiny",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "bias": "none",
            **changes,
        }

    def manifest(self, **task: Any) -> Manifest:
        """What a trainer would say."""
        card = self.card
        return Manifest(
            base=BaseIdentity(
                name=card.name, fingerprint=card.fingerprint, architecture=card.architecture
            ),
            method=Method(name="lora", rank=4, alpha=8.0, target_modules=("q_proj",)),
            task=Task(**task),
            created_at="2026-01-01T00:00:00Z",
        )

    def folder(
        self,
        name: str = "adapter",
        *,
        tensors: Tensors | None = None,
        config: dict[str, Any] | None = None,
        manifest: Manifest | None = None,
        seed: int = 0,
    ) -> Path:
        """Write a folder; whatever is not given is right."""
        path = self.root / name
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps(config or self.config()))
        tensors = tensors or self.tensors(seed=seed)
        layout = {key: (value.dtype, value.shape) for key, value in tensors.items()}
        with (path / "adapter_model.safetensors").open("wb") as file:
            write(file, layout, tensors.__getitem__, {"format": "pt"})
        (path / "manifest.json").write_text((manifest or self.manifest()).to_json())
        return path


@pytest.fixture(scope="session")
def card(tiny_base: Path) -> BaseCard:
    """The tiny base's card."""
    return BaseCard.from_folder(tiny_base)


@pytest.fixture
def forge(card: BaseCard, tmp_path: Path) -> Forge:
    """Makes adapter folders in this test's own folder."""
    return Forge(card=card, root=tmp_path / "adapters")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """An empty registry."""
    return Registry.open(tmp_path / "registry", create=True)


@dataclass(frozen=True)
class RunningHub:
    """A hub of one's own in this process: its address and its folder."""

    address: str
    root: Path


@contextlib.contextmanager
def running_hub(root: Path, **options: Any) -> Iterator[RunningHub]:
    """Serve a hub from a thread; ``options`` are those of ``make_server``."""
    from lorary.registry.localhub.auth import Tokens
    from lorary.registry.localhub.serve import make_server

    said: list[str] = []
    settings: Any = {
        "host": "127.0.0.1",
        "port": 0,
        "tokens": Tokens(),
        "ready": said.append,
    } | options
    server, listener = make_server(root, **settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield RunningHub(said[0], root)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """An open hub for all tests; everyone takes an owner of their own."""
    with running_hub(tmp_path_factory.mktemp("hub") / "hub") as hub:
        yield hub


def use_hub(
    monkeypatch: pytest.MonkeyPatch, address: str, home: Path, *, xet: bool = False
) -> None:
    """Point the Hub's client at ``address``, here and in processes started from here."""
    from huggingface_hub import constants

    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    for key, value in {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HOME": str(home / "hf"),
        "LORARY_HOME": str(home / "lorary"),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub_url(shared_hub: RunningHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Address of an empty registry on a hub."""
    use_hub(monkeypatch, shared_hub.address, tmp_path / "home")
    return f"hf://o{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["folder", "hub", "hub-xet"])
def anywhere(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Registry:
    """An empty registry, in a folder and on a hub, by LFS and by Xet: one contract for all."""
    if request.param != "folder":
        url = request.getfixturevalue("hub_url")
        hub: RunningHub = request.getfixturevalue("shared_hub")
        use_hub(monkeypatch, hub.address, tmp_path / "home", xet=request.param == "hub-xet")
        return Registry.open(url, create=True)
    return Registry.open(tmp_path / "registry", create=True)


@pytest.fixture
def other_card(card: BaseCard) -> BaseCard:
    """A base of the same shapes with other weights."""
    return dataclasses.replace(card, name="other", fingerprint="sha256:" + "0" * 64)


@pytest.fixture
def raw_safetensors() -> Callable[..., None]:
    """Writes a safetensors file from any header, right or wrong."""

    def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = (len(raw) if length is None else length).to_bytes(8, "little")
        path.write_bytes(size + raw + data)

    return write_raw
