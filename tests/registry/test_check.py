"""``registry check``: everything that is wrong, and what every server would do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lorary.registry.check import check_folder
from lorary.registry.cli import app
from lorary.registry.servability import SERVERS
from tests.conftest import AdapterRecipe, build_adapter

if TYPE_CHECKING:
    from lorary.registry import BaseCard
    from lorary.registry.servability import Server
    from tests.registry.conftest import Forge


def run(*args: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "lorary.registry", "check", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def verdicts(forge: Forge, **config: Any) -> dict[str, tuple[str, str]]:
    """What servers do with the files as given, and with what would be kept."""
    report = check_folder(forge.folder(config=forge.config(**config)), forge.card)
    kept = {v.server: v.outcome for v in report.canonical}
    return {v.server: (v.outcome, kept.get(v.server, "-")) for v in report.as_given}


def test_all_problems_are_reported_and_not_the_first(forge: Forge, other_card: BaseCard) -> None:
    tensors = forge.tensors()
    keys = [*tensors]
    tensors[keys[0]][0, 0] = np.nan
    tensors[keys[1]] = tensors[keys[1]][:, :2].copy()
    tensors["base_model.model.lm_head.weight"] = np.ones((1, 1), np.float32)
    config = forge.config(lora_bias=True, run_on_load=1, target_modules=["q_proj", "k_proj"])
    folder = forge.folder(tensors=tensors, config=config)
    (folder / "x.py").touch()
    (folder / "notes").mkdir()
    report = check_folder(folder, other_card)
    texts = [problem.text for problem in report.problems]
    wanted = [
        "'x.py'", "'notes'", "trained on base", "lora_bias", "run_on_load", "lm_head.weight",
        "lacks 2 of the 4 modules", "has shape [64, 2]",
    ]  # fmt: skip
    for part in wanted:
        assert [part in text for text in texts].count(True) == 1, (part, texts)
    assert report.canonical == ()
    assert report.conversion is None


def test_a_right_adapter_has_no_problems_and_everybody_loads_it(forge: Forge) -> None:
    report = check_folder(forge.folder(), forge.card)
    assert report.problems == ()
    assert [v.outcome for v in (*report.as_given, *report.canonical)] == ["loads"] * 8
    assert report.conversion is not None


def test_what_the_canonical_form_repairs(forge: Forge) -> None:
    found = verdicts(forge, use_rslora=True, alpha_pattern={"layers.0.self_attn.q_proj": 4})
    assert found == {
        "lorary": ("loads", "loads"),
        "vllm": ("loads", "loads"),
        "llama.cpp": ("deviates", "loads"),
        "peft": ("loads", "loads"),
    }


@pytest.mark.parametrize(
    ("config", "server", "outcome", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "peft", "deviates", "runs again at load"),
        ({"init_lora_weights": "pissa"}, "vllm", "refuses", "pissa"),
        ({"layer_replication": [[0, 2]]}, "peft", "deviates", "rebuilds the base"),
        ({"layer_replication": [[0, 2]]}, "vllm", "refuses", "replicated"),
        ({"auto_mapping": {"parent_library": "os"}}, "peft", "deviates", "import"),
        ({"use_dora": True}, "llama.cpp", "refuses", "DoRA"),
        ({"peft_type": "LOHA"}, "llama.cpp", "refuses", "LOHA"),
        ({"target_modules": ["q_proj", "k_proj"]}, "vllm", "deviates", "2 targeted modules"),
        ({"lora_bias": True}, "lorary", "refuses", "1 problem"),
    ],
)
def test_rules_of_other_servers(
    forge: Forge, config: dict[str, Any], server: Server, outcome: str, reason: str
) -> None:
    report = check_folder(forge.folder(config=forge.config(**config)), forge.card)
    found = {v.server: v for v in report.as_given}
    assert set(found) == set(SERVERS)
    assert found[server].outcome == outcome
    assert any(reason in text for text in found[server].reasons)


def test_a_tensor_of_the_base_is_known_by_its_name(forge: Forge) -> None:
    tensors = forge.tensors() | {"base_model.model.model.norm.weight": np.ones(64, np.float32)}
    report = check_folder(forge.folder(tensors=tensors), forge.card)
    found = {v.server: v for v in report.as_given}
    assert found["peft"].outcome == "deviates"
    assert "overwrites 1 weights of the base" in found["peft"].reasons[0]
    assert found["vllm"].outcome == found["llama.cpp"].outcome == "refuses"


@pytest.mark.parametrize(("rank", "limit"), [(8, None), (17, 32), (257, 320), (512, 512)])
def test_vllm_has_a_list_of_ranks(forge: Forge, rank: int, limit: int | None) -> None:
    folder = forge.folder(tensors=forge.tensors(rank=rank), config=forge.config(r=rank))
    (vllm,) = check_folder(folder, forge.card, servers=["vllm"]).canonical
    said = [reason for reason in vllm.reasons if "--max-lora-rank" in reason]
    assert [f"--max-lora-rank {limit}:" in text for text in said] == ([True] if limit else [])


def test_the_command_compares_with_peft_for_real(tiny_base: Path, tmp_path: Path) -> None:
    recipe = AdapterRecipe(rank=6, alpha=5, config={"use_rslora": True})
    folder = build_adapter(tiny_base, tmp_path / "adapter", recipe)
    args = [folder, "--base", tiny_base, "--server", "peft", "--json"]
    # In this process, which has torch already.
    done = CliRunner().invoke(app, ["check", *map(str, args)], catch_exceptions=False)
    answer = json.loads(done.stdout)
    assert 0 < answer["deviation"]["max_logit"] < 1e-4 < answer["deviation"]["adapter_effect"]
    assert answer["deviation"]["top_1"] == 1.0
    assert 0 < answer["report"]["conversion"]["max_error"] < 1e-7


def test_exit_codes(forge: Forge, tiny_base: Path) -> None:
    wrong = forge.folder("wrong", config=forge.config(lora_bias=True, never_heard=1))
    done = run(wrong, "--base", tiny_base)
    assert done.returncode == 9
    assert "2 problems" in done.stderr
    assert "never_heard" in done.stdout
    cut = forge.folder("cut")
    (cut / "adapter_model.safetensors").write_bytes(b"")
    assert run(cut, "--base", tiny_base, "--json").returncode == 5
    assert run(cut, "--base", tiny_base, "--server", "ollama").returncode == 2
