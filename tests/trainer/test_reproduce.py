"""Training again from a manifest: the same bits, what is refused, and what counts as different."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.registry import BaseCard, Registry
from lorary.registry.cli_support import exit_code_of
from lorary.trainer.provenance import MAX_POINTS, loss_curve
from lorary.trainer.reproduce.cli import app
from lorary.trainer.reproduce.compare import compare_curves
from lorary.trainer.train import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def finished(make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> Path:
    """The folder of a run over a copy of the data, which a test may change."""
    recipe = make_recipe()
    data = tmp_path / "reviews.jsonl"
    shutil.copy(recipe.data.path, data)
    train(make_recipe(data__path=str(data)), tmp_path / "out", reporter=quiet)
    return tmp_path / "out"


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, Any, str]:
    """Run the command; return its exit code, its JSON if any, and its stderr."""
    capsys.readouterr()
    arguments = [*map(str, args), "--json", "--threads", "1"]
    code = exit_code_of(lambda: app(args=arguments, standalone_mode=False))
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


def test_a_folder_and_its_version_are_reproduced_bit_by_bit(
    finished: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = call(capsys, finished, "--tolerance", "0", "--output", tmp_path / "again")
    assert code == 0
    assert said["bit_equal"]
    assert {one["what"] for one in said["comparisons"]} >= {
        *("loss", "validation loss", "tensors", "accuracy of adapter", "accuracy of base")
    }
    files = [folder / "adapter_model.safetensors" for folder in (finished, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(finished, "tiny", base=BaseCard.from_folder(tiny_base))
    code, said, _ = call(capsys, "tiny@1", "--registry", tmp_path / "registry")
    assert (code, said["what"], said["bit_equal"]) == (0, "tiny@1", True)


def test_other_data_is_refused_before_any_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "reviews.jsonl"
    moved = data.rename(tmp_path / "moved.jsonl")
    assert call(capsys, finished)[0] == 2
    assert call(capsys, finished, "--set", f"data.path={moved}")[0] == 0
    lines = moved.read_text().splitlines()
    moved.write_text("\n".join(lines[:-1]) + "\n")
    code, said, stderr = call(capsys, finished, "--set", f"data.path={moved}")
    assert (code, said) == (9, None)
    assert "91 train examples (then 92)" in stderr
    assert call(capsys, finished, "--set", "method.rank=2")[0] == 2


def test_another_base_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import build_llama

    other = build_llama(tmp_path / "other", seed=1)
    code, _, stderr = call(capsys, finished, "--set", f"base={other}")
    assert code == 9
    assert "has fingerprint sha256:" in stderr


def test_a_run_that_was_otherwise_is_not_reproduced(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["training"]["recipe"]["training"]["learning_rate"] *= 0.1
    path.write_text(json.dumps(manifest))
    code, said, _ = call(capsys, finished)
    assert (code, said["reproduced"]) == (1, False)
    wrong = {one["what"] for one in said["comparisons"] if not one["is_within"]}
    assert {"loss", "tensors"} <= wrong


def test_manifest_has_the_logits_of_a_quantized_base(finished: Path, tiny_base: Path) -> None:
    from peft import PeftModel

    manifest = json.loads((finished / "manifest.json").read_text())
    training, probes = manifest["training"], manifest["golden_probes"]
    assert set(training["golden_logits"]) == {"nf4", "int8"}
    assert training["hardware"]["cpus"] >= 1
    assert training["versions"]["bitsandbytes"]
    model: Any = load_model(find_base(tiny_base), quantization="nf4", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, finished).eval()
    for probe, recorded in zip(probes, training["golden_logits"]["nf4"], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([probe["token_ids"]])).logits[0, -1]
        expected = torch.tensor(recorded)
        torch.testing.assert_close(logits[probe["top_token_ids"]], expected, atol=1e-3, rtol=0)
        assert (expected - torch.tensor(probe["top_logits"])).abs().max() > 0.01


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    history = [{"step": i, "loss": 1.0 / i} for i in range(1, 10_001)]
    curve = loss_curve(history)
    assert len(curve["steps"]) == len(curve["loss"]) == MAX_POINTS
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 10_000)
    assert all(loss == 1.0 / step for step, loss in zip(curve["steps"], curve["loss"], strict=True))


@pytest.mark.parametrize(
    ("now", "difference", "is_within"),
    [
        ([4.0, 0.5], 0.0, True),
        ([4.2, 0.5], 0.05, False),  # a twentieth of 4
        ([4.0, 0.51], 0.01, True),  # below 1 the difference itself
        ([4.0, float("nan")], None, False),
        ([4.0], None, False),
    ],
)
def test_curves_are_compared_relative_above_one_and_absolute_below(
    now: list[float], difference: float | None, is_within: bool
) -> None:
    then = {"steps": [1, 2], "loss": [4.0, 0.5]}
    (found,) = compare_curves(then, {"steps": [1, 2][: len(now)], "loss": now}, 0.02)
    assert found.difference == (None if difference is None else pytest.approx(difference))
    assert found.is_within is is_within
