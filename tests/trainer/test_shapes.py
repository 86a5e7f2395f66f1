"""Conversations and plain texts from file to adapter, and what the command shows before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from lorary.bases import PromptBuilder
from lorary.bases.load import load_tokenizer
from lorary.registry import Manifest
from lorary.trainer.cli import app
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.train import train

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

SUBJECTS = ["cat", "dog", "sun", "sky", "hat", "mat", "film", "red"]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations of two questions; the answers repeat what was asked."""
    rows = []
    for subject in SUBJECTS:
        for other in SUBJECTS:
            asked = f"the {subject} was {other}"
            turns = [("user", asked), ("assistant", subject), ("user", "is"), ("assistant", other)]
            rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(base: Path, data: dict[str, Any], **training: Any) -> Recipe:
    return build_recipe(
        {
            "name": "tiny",
            "base": str(base),
            "task": {"max_new_tokens": 4},
            "data": {"num_test": 6, "num_validation": 4, "max_similarity": 1.0, **data},
            "method": {"rank": 4},
            "training": {
                "max_steps": 8,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "dtype": "float32",
                "device": "cpu",
                "max_length": 64,
                **training,
            },
        }
    )


def losses(folder: Path) -> list[float]:
    lines = (folder / "report" / "history.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_packed_and_streamed_conversations_make_an_adapter_that_plain_text_reaches(
    tiny_base: Path, chats: Path, tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "home"))
    data = {"source": "file", "path": str(chats), "streaming": "always"}
    recipe = recipe_of(tiny_base, data, packing=True)
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    found = losses(tmp_path / "out")
    assert found[-1] < 0.7 * found[0]
    assert manifest.data["shape"] == "chat"
    from lorary.bases import find_base

    builder = PromptBuilder(load_tokenizer(find_base(str(tiny_base))))
    read = Manifest.from_json((tmp_path / "out" / "manifest.json").read_bytes())
    assert builder.from_task(read.task, {"text": "the cat"}) == builder.from_chat(
        [{"role": "user", "content": "the cat"}]
    )
    # What was resolved is written down, and is a recipe that gives the same rows again.
    again = build_recipe(read.training["recipe"])
    assert again.data.shape == "chat"
    assert again.task.template == read.task.template


def test_plain_texts_are_learned_and_measured_by_perplexity(
    tiny_base: Path, tmp_path: Path, quiet: Reporter
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"the {a} sat on the {b}\n" for a in SUBJECTS for b in SUBJECTS))
    recipe = recipe_of(tiny_base, {"source": "file", "path": str(path)})
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    assert manifest.metrics is not None
    assert manifest.metrics.primary == "perplexity"
    assert manifest.metrics.adapter["perplexity"] < 0.7 * manifest.metrics.base["perplexity"]
    assert manifest.task.template == "{{ text }}"


def test_preview_shows_lengths_and_what_is_learned(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    import yaml

    recipe = tmp_path / "recipe.yaml"
    tree: dict[str, Any] = {"name": "tiny", "base": str(tiny_base)}
    data = {"num_test": 6, "num_validation": 4, "max_similarity": 1.0}
    tree |= {"data": {"source": "file", "path": chats.name, **data}}
    recipe.write_text(yaml.safe_dump(tree))
    arguments = [str(recipe), "--preview", "--set", "training.device=cpu"]
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert sorted(tmp_path.iterdir()) == before
    assert sum(bin_["rows"] for bin_ in shown["histogram"]) == shown["train"]
    assert shown["lengths"]["max"] <= shown["histogram"][-1]["to"]
    example = shown["examples"][0]
    assert example["place"].startswith(f"'{chats}' line ")
    line = int(example["place"].rpartition(" ")[2])
    turns = json.loads(chats.read_text().splitlines()[line - 1])["messages"]
    learned = "".join(token["text"] for token in example["tokens"] if token["learned"])
    assert learned == f"{turns[1]['content']}<|im_end|>{turns[3]['content']}<|im_end|>"
    # Rows that are all too long would end a run; this is where one sees that.
    short = [*arguments, "--set", "training.max_length=8", "--set", "training.packing=true"]
    result = CliRunner().invoke(app, short)
    assert result.exit_code == 0, result.output
    assert f"{shown['train']} of {shown['train']} (100.0%), training.max_length 8" in result.stdout
    assert turns[0]["content"] in result.stdout
