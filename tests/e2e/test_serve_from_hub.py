"""``lorary serve`` whose registry is on a hub: answers, moved aliases, and a hub that goes away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorary.client import Client
from lorary.errors import AdapterNotFound, LoraryError
from lorary.registry import BaseCard, Registry
from tests.conftest import peft_greedy, wait_until
from tests.edge.test_serve_process import served
from tests.processes import metric
from tests.registry.conftest import use_hub

PROMPT = [5, 9, 12, 30]


def machine(home: Path, kernels: Path) -> str:
    """Make a home as another machine has it, but for the compiled kernels, which take minutes."""
    home.mkdir(parents=True)
    kernels.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(kernels)
    return str(home)


@pytest.fixture
def kernels() -> Path:
    """Where this machine keeps its compiled kernels."""
    return Path(os.environ.get("LORARY_HOME") or Path.home() / ".cache" / "lorary") / "kernels"


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Path
) -> Iterator[subprocess.Popen[str]]:
    """``registry serve`` in a process of its own; this process and its children talk to it."""
    command = [
        sys.executable,
        "-m",
        "lorary.registry",
        "serve",
        str(tmp_path / "hub"),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.fullmatch(r"HF_ENDPOINT=(\S+)\n", process.stdout.readline())
        assert match is not None
        machine(tmp_path / "home" / "lorary", kernels)
        use_hub(monkeypatch, match[1], tmp_path / "home")
        yield process
        process.kill()


def test_a_server_answers_from_a_hub_and_without_it(
    hub: subprocess.Popen[str],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernels: Path,
) -> None:
    registry, card = Registry.open("hf://acme"), BaseCard.from_folder(tiny_base)
    registry.push(tiny_adapters["alpha"], "a", base=card, aliases=["prod"])
    wanted = {
        name: peft_greedy(tiny_base, tiny_adapters[name], PROMPT, 8) for name in ("alpha", "bravo")
    }
    monkeypatch.setenv("LORARY_HOME", machine(tmp_path / "server", kernels))  # it has to fetch
    with served(tiny_base, "hf://acme") as (_, ready), Client(ready["address"]) as client:

        def ask(ref: str) -> Any:
            return client.generate(
                token_ids=PROMPT, adapter=ref, max_tokens=8, ignore_eos=True, timeout_s=60
            )

        def says(ref: str, name: str) -> bool:
            return list(ask(ref).token_ids)[: len(wanted[name])] == wanted[name]

        assert says("a@prod", "alpha")
        monkeypatch.setenv("LORARY_HOME", str(tmp_path / "home" / "lorary"))
        registry.push(tiny_adapters["bravo"], "a", base=card, aliases=["prod"])
        deadline = time.monotonic() + 90
        while ask("a@prod").receipt.version != 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert says("a@prod", "bravo")
        assert says("a@1", "alpha")
        hub.send_signal(signal.SIGKILL)
        hub.wait()
        assert says("a@prod", "bravo")
        with pytest.raises(AdapterNotFound):
            ask("nobody@prod")
        deadline = time.monotonic() + 90
        while not (trouble := client.snapshot().registry_trouble):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert "HF_ENDPOINT" in trouble, trouble
        wait_until(lambda: metric(ready["metrics"], "lorary_registry_up") == 0)
        assert says("a@prod", "bravo")
        assert says("a@1", "alpha")


def test_a_server_starts_while_the_hub_is_away(hub: subprocess.Popen[str], tiny_base: Path) -> None:
    hub.kill()
    hub.wait()
    with served(tiny_base, "hf://acme") as (_, ready), Client(ready["address"]) as client:
        assert client.generate(token_ids=PROMPT, max_tokens=2, timeout_s=60).token_ids
        with pytest.raises(LoraryError, match="HF_ENDPOINT"):
            client.generate(token_ids=PROMPT, adapter="a", max_tokens=2, timeout_s=60)
