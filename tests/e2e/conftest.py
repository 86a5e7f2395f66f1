"""The whole, from outside: adapters pushed by the command line, one real server for all tests."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lorary.client import Client
from tests.conftest import (
    AdapterRecipe,
    build_adapter,
    build_llama,
    peft_greedy,
    write_manifest,
)
from tests.processes import BIN, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.processes import ServerProcess

PUSHED = ("alpha", "bravo", "charlie", "delta")
JUDGE_TEMPLATE = "<|im_start|>user\n{{ text }}<|im_end|>\n<|im_start|>assistant\n"
LABELS = ("bad", "good", "not good")


def registry_cli(
    *arguments: object, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``registry``; with ``check``, it must succeed."""
    command = [str(BIN / "registry"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, **options
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A base, its adapters as PEFT folders, and the registry they were pushed to."""

    base: Path
    folders: dict[str, Path]
    registry: Path

    def push(self, folder: Path, name: str, *arguments: object) -> dict[str, Any]:
        """Push by the command line; return what it printed."""
        done = registry_cli(
            *("push", folder, name, "--base", self.base, "--registry", self.registry),
            *arguments,
            "--json",
        )
        pushed: dict[str, Any] = json.loads(done.stdout)
        return pushed

    def versions(self) -> list[dict[str, Any]]:
        """Return what ``registry list`` shows."""
        listed: list[dict[str, Any]] = json.loads(
            registry_cli("list", "--registry", self.registry, "--json").stdout
        )
        return listed


@pytest.fixture(scope="session")
def world(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> World:
    """Four adapters of mixed ranks and one that classifies, all pushed by the command line."""
    root = tmp_path_factory.mktemp("e2e")
    judge = build_adapter(tiny_base, root / "judge", AdapterRecipe(seed=7, strength=0.2))
    write_manifest(tiny_base, judge, kind="classification", template=JUDGE_TEMPLATE, labels=LABELS)
    folders = {name: tiny_adapters[name] for name in PUSHED} | {"judge": judge}
    made = World(base=tiny_base, folders=folders, registry=root / "registry")
    for name, folder in folders.items():
        made.push(folder, name, "--alias", "prod")
    return made


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same shapes with other weights; never write to it."""
    return build_llama(tmp_path_factory.mktemp("bases") / "other-llama", seed=9)


@pytest.fixture(scope="session")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for the session, float32; at the end SIGTERM must make it exit with 0."""
    with serving(world.base, world.registry, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address, timeout_s=60) as opened:
        yield opened


@pytest.fixture(scope="session")
def oracle(world: World) -> Oracle:
    return Oracle(world)


class Oracle:
    """PEFT in float32, one request at a time; remembers what it said."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._said: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def greedy(self, name: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return the tokens up to the first end token; ``name`` is empty for the bare base."""
        key = (name, tuple(prompt), max_tokens)
        if key not in self._said:
            folder = self._world.folders[name] if name else None
            self._said[key] = peft_greedy(self._world.base, folder, prompt, max_tokens)
        return self._said[key]
