"""Several adapters at once and ``lorary selfcheck``, through a real server."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.conftest import AdapterRecipe, build_adapter, write_manifest
from tests.e2e.conftest import registry_cli
from tests.processes import BIN
from tests.server.test_composition import NUM_TOKENS, peft_composed

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.client import Client
    from tests.e2e.conftest import World
    from tests.processes import ServerProcess


def test_a_composition_answers_as_pefts_sum_does(client: Client, world: World) -> None:
    weights = {"alpha": 0.7, "judge": -0.3, "delta": 1.0}
    prompt = [5, 6, 7, 40, 41]
    ((*said,),) = peft_composed(world.base, world.folders, weights, [prompt])
    answer = client.generate(
        token_ids=prompt,
        adapters=[(f"{name}@prod", weight) for name, weight in weights.items()],
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    assert list(answer.token_ids) == [token for token, _ in said]
    assert [part.ref for part in answer.receipt.parts] == ["alpha@prod", "judge@prod", "delta@prod"]


def test_the_command_line_composes(server: ServerProcess) -> None:
    asked = [str(BIN / "lorary"), "call", "judge@prod*0.7+alpha*0.3", "the film was good"]
    done = subprocess.run(
        [*asked, "--classify", "--target", server.address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "not good" in done.stdout
    assert "judge@1*0.7+alpha@1*0.3 mix:sha256:" in done.stderr


def test_selfcheck_starts_a_server_and_finds_every_answer_the_same_in_company(
    world: World, tmp_path: Path
) -> None:
    # Other tests of this folder leave damaged versions behind, which it would rightly report.
    registry = tmp_path / "registry"
    recipe = AdapterRecipe(rank=5, seed=51, config={"use_dora": True})
    dora = write_manifest(world.base, build_adapter(world.base, tmp_path / "dora", recipe))
    for name, folder in (
        ("alpha", world.folders["alpha"]),
        ("bravo", world.folders["bravo"]),
        ("dora", dora),
    ):
        registry_cli("push", folder, name, "--base", world.base, "--registry", registry)
    command = [str(BIN / "lorary"), "selfcheck", "--rounds", "2", "--json", "--"]
    command += ["--base", str(world.base), "--registry", str(registry)]
    command += ["--device", "cpu", "--dtype", "float32", "--max-context", "256"]
    # Answers this small may come one by one, which it says itself: again, until some shared a step.
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.stdout, done.stderr
        checks = json.loads(done.stdout)
        if not (checks[-1]["name"] == "mixed steps" and checks[-1]["result"] == "FAIL"):
            break
    assert done.returncode == 0, done.stdout + done.stderr
    # DoRA is served beside the others, and is no part of a sum.
    others = {check["name"]: check for check in checks if check["result"] != "ok"}
    assert {name: check["result"] for name, check in others.items()} == {
        "bravo@1*0.7+dora@1*0.3": "skip"
    }
    assert "'dora@1' is DoRA" in others["bravo@1*0.7+dora@1*0.3"]["detail"]
    names = [check["name"] for check in checks]
    assert names.count("base") == 2
    assert {"alpha@1", "dora@1", "alpha@1*0.5", "alpha@1*0.7+bravo@1*0.3"} <= set(names)
    assert names[-1] == "mixed steps"
