"""``lorary eval``: a trained adapter measured again, from a folder, from a registry, on other rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lorary.registry import BaseCard, Registry
from lorary.registry.cli_support import exit_code_of
from lorary.trainer.eval_cli import app
from lorary.trainer.progress import Reporter
from lorary.trainer.recipe_file import build_recipe, recipe_dict
from lorary.trainer.train import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.registry import Manifest
    from lorary.trainer.recipe import Recipe


@pytest.fixture
def trained(make_recipe: Callable[..., Recipe], tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = train(
        make_recipe(training__max_steps=4), tmp_path / "run", reporter=Reporter(quiet=True)
    )
    return tmp_path / "run", manifest


def call(*args: str | Path) -> int:
    return exit_code_of(lambda: app([*map(str, args), "--threads", "1"], standalone_mode=False))


def test_a_folder_gives_the_figures_of_its_manifest_again(
    trained: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = trained
    assert call(folder, "--dtype", "float32", "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert manifest.metrics is not None
    found = result["metrics"]
    assert (found["num_examples"], found["primary"]) == (12, "accuracy")
    for side in ("base", "adapter"):
        assert found[side] == pytest.approx(getattr(manifest.metrics, side), abs=2e-3)
    interval = found["uncertainty"]["accuracy"]["difference"]
    gain = found["adapter"]["accuracy"] - found["base"]["accuracy"]
    assert interval["low"] <= gain <= interval["high"]
    assert call(folder, "--dtype", "float32", "--limit", "4", "--require", "accuracy>1") == 4
    shown = capsys.readouterr()
    assert "difference, 95%" in shown.out
    assert "perplexity ↓" in shown.out
    assert "accuracy>1" in shown.err


def test_registered_adapters_on_a_quantized_base_give_a_forgetting_table(
    trained: tuple[Path, Manifest],
    make_recipe: Callable[..., Recipe],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two adapters, two tasks: the second one's labels mean the opposite of the first one's."""
    tree = recipe_dict(make_recipe(training__max_steps=4, training__learning_rate=2e-2))
    tree["task"]["labels"] = ["bad", "good"]
    tree["data"]["seed"] = 1
    train(build_recipe(tree), tmp_path / "other", reporter=Reporter(quiet=True))
    registry = Registry.open(tmp_path / "registry", create=True)
    card = BaseCard.from_folder(tiny_base)
    for name, folder in (("first", trained[0]), ("second", tmp_path / "other")):
        registry.push(folder, name, base=card)
    where = ["--registry", str(tmp_path / "registry"), "--quantization", "nf4", "--limit", "5"]
    assert call("first", "second@1", *where, "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(one["adapter"], one["exam"]) for one in results] == [
        (adapter, exam) for adapter in ("first@1", "second@1") for exam in ("first@1", "second@1")
    ]
    assert {one["quantization"] for one in results} == {"nf4"}
    assert all(one["digest"].startswith("sha256:") for one in results)
    bases = [one["metrics"]["base"] for one in results]
    assert bases[0] == bases[2], "the base answers each task once"
    assert results[0]["metrics"]["adapter"] != bases[0]
    assert call("first", "second", *where) == 0
    assert "(base)" in capsys.readouterr().out


def test_rows_of_ones_own(
    trained: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("the cat was good", "good"), ("the sun was bad", "bad"), ("a hat was bad", "bad")]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"said": a, "target": b}) + "\n" for a, b in rows))
    assert call(trained[0], "--data", path, "--column", "text=said", "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["exam"], result["metrics"]["num_examples"]) == ("mine.jsonl", 3)
    path.write_text(json.dumps({"text": "a hat", "target": "ugly"}) + "\n")
    assert call(trained[0], "--data", path) == 2
    assert "label 'ugly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["nobody@prod", "--registry", "{tmp}/registry"], 3, "nobody"),
        (["{run}", "--column", "text"], 2, "INPUT=COLUMN"),
        (["{run}", "--require", "accuracy>=prod"], 2, "compared with a number"),
        (["{run}", "--metric", "bleu"], 2, "bleu for a classification"),
        (["{run}", "--data", "{tmp}/none.yaml"], 2, "cannot be read"),
        (["{run}", "--base", "{other}"], 9, "was trained on"),
        (["{bare}"], 2, "no manifest.json"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_an_exit_code(
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_recipe: Callable[..., Recipe],
    args: list[str],
    code: int,
    says: str,
) -> None:
    import shutil

    from lorary.registry import Manifest
    from tests.conftest import build_llama

    run, bare = tmp_path / "run", tmp_path / "bare"
    for folder in (run, bare):
        shutil.copytree(tiny_adapters["alpha"], folder)
    (bare / "manifest.json").unlink()
    raw = json.loads((run / "manifest.json").read_text())
    raw["training"] = {"recipe": recipe_dict(make_recipe())}
    (run / "manifest.json").write_text(json.dumps(raw))
    assert Manifest.from_json((run / "manifest.json").read_bytes()).base.name == tiny_base.name
    Registry.open(tmp_path / "registry", create=True)
    places = {"tmp": tmp_path, "run": run, "bare": bare}
    if "{other}" in args:
        places["other"] = build_llama(tmp_path / "other", seed=5)
        capsys.readouterr()
    assert call(*(arg.format(**places) for arg in args)) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_task_of_the_harness_is_scored_as_by_hand(
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task with its own rows, no download; accuracy is that of the likelier continuation."""
    import datasets
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "reviews.yaml").write_text(
        f"""
task: tiny_reviews
dataset_path: json
dataset_kwargs: {{data_files: {{test: {reviews}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{review}}}}\\n"
doc_to_choice: [good, bad]
doc_to_target: sentiment
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    args = ["--lm-eval", "tiny_reviews", "--lm-eval-path", str(tmp_path), "--limit", "20"]
    where = ["--base", str(tiny_base), "--dtype", "float32"]
    assert call(tiny_adapters["delta"], *args, *where, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    metrics = result["metrics"]
    assert (result["exam"], metrics["primary"], metrics["num_examples"]) == (
        *("tiny_reviews", "acc"),
        20,
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    rows = [json.loads(line) for line in reviews.read_text().splitlines()[:20]]
    for side in ("base", "adapter"):
        if side == "adapter":
            model = PeftModel.from_pretrained(model, tiny_adapters["delta"]).eval()
        right = 0
        for row in rows:
            scores = []
            for choice in ("good", "bad"):
                prompt = tokenizer(row["review"] + "\n")["input_ids"]
                ids = tokenizer(row["review"] + "\n" + choice)["input_ids"]
                with torch.inference_mode():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                places = range(len(prompt), len(ids))
                scores.append(sum(float(logprobs[i - 1, ids[i]]) for i in places))
            right += ("good", "bad")[scores.index(max(scores))] == row["sentiment"]
        assert metrics[side]["acc"] == pytest.approx(right / 20)
    interval = metrics["uncertainty"]["acc"]["difference"]
    assert interval["low"] <= metrics["adapter"]["acc"] - metrics["base"]["acc"] <= interval["high"]
    assert call(tiny_adapters["delta"], *args, "--data", tmp_path / "x.jsonl", *where) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_kind_with_a_head_is_measured_under_the_head_it_had(
    trained: tuple[Path, Manifest],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base's head is random, but drawn again as it was: its figures come back, too."""
    task = {"kind": "sequence_classification", "template": "{{ text }}", "labels": ["good", "bad"]}
    folder = tmp_path / "head"
    manifest = train(make_recipe(task=task), folder, reporter=Reporter(quiet=True))
    assert call(folder, "--dtype", "float32", "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert manifest.metrics is not None
    for side in ("base", "adapter"):
        found = result["metrics"][side]
        assert found == pytest.approx(getattr(manifest.metrics, side), abs=2e-3)
    assert call(folder, "--quantization", "nf4") == 2
    assert "used whole" in capsys.readouterr().err
    assert call(folder, trained[0]) == 2
    assert "do not share a model" in capsys.readouterr().err
