"""A real server that is told to remember comes back with its adapters loaded before it says ready."""

from __future__ import annotations

import subprocess
import urllib.request
from typing import TYPE_CHECKING

from lorary.client import Client
from tests.edge.test_serve_process import LORARY, environment, served

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Oracle, World

PROMPT = [5, 9, 12, 30]


def resident(metrics_url: str) -> float:
    with urllib.request.urlopen(metrics_url) as answer:
        text = answer.read().decode()
    (line,) = (x for x in text.splitlines() if x.startswith('lorary_adapters{state="resident"}'))
    return float(line.split()[-1])


def test_a_restarted_server_is_warm_and_alone_in_its_folder(
    world: World, oracle: Oracle, tmp_path: Path
) -> None:
    options = ("--state-dir", str(tmp_path / "state"))
    with served(world.base, world.registry, *options) as (process, ready):
        assert resident(ready["metrics"]) == 0
        with Client(ready["address"]) as client:
            for name in ("alpha", "bravo"):
                client.generate(token_ids=PROMPT, adapter=name, max_tokens=2, timeout_s=60)
        command = [*LORARY, "serve", "--base", str(world.base), "--registry", str(world.registry)]
        command += ["--port", "0", "--metrics-port", "0", *options]
        second = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert second.returncode == 78
        assert "another server's" in second.stderr
        process.terminate()
        assert process.wait(30) == 0
    with served(world.base, world.registry, *options, "--warm-before-ready") as (_, ready):
        assert resident(ready["metrics"]) == 2
        with Client(ready["address"]) as client:
            answer = client.generate(token_ids=PROMPT, adapter="alpha", max_tokens=8, timeout_s=60)
        assert list(answer.token_ids) == oracle.greedy("alpha", PROMPT, 8)
