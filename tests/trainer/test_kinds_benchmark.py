"""What the kinds benchmark trains on: rows whose labels are right, a pair that is one encoder twice, every kind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

from benchmarks import capitals
from benchmarks.harness.kind_case import recipe_tree
from benchmarks.kind_bases import build_pair
from benchmarks.kind_cases import CASES
from benchmarks.kinds_run import section
from lorary.registry.manifest import TaskKind
from lorary.trainer.examples import Example
from lorary.trainer.recipe_file import build_recipe
from tests.trainer.families import build_family

if TYPE_CHECKING:
    from pathlib import Path


def test_capitals_are_read_before_they_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'One. Then the "Bank of England", Paris and Anna Lee Smith met in the U.S. Senate today. Two.'
    monkeypatch.setattr(
        capitals, "read_examples", lambda _recipe: [Example(inputs={"text": text}, target="")]
    )
    capitals.write_rows(tmp_path / "rows.jsonl")
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    pairs = zip(row["text"].split(), row["target"].split(), strict=True)
    assert [pair for pair in pairs if pair[1] != "O"] == [
        ('"bank', "B-CAP"), ('england",', "B-CAP"), ("paris", "B-CAP"), ("anna", "B-CAP"),
        ("lee", "I-CAP"), ("smith", "I-CAP"), ("u.s.", "B-CAP"),
    ]  # fmt: skip


def test_a_pair_is_the_encoder_twice(tmp_path: Path) -> None:
    """The decoder reads one token: attention to it alone, then to the source; both by the encoder's weights."""
    from transformers import AutoModelForSeq2SeqLM, BertModel

    encoder = build_family("bert", tmp_path / "bert")
    build_pair(encoder, tmp_path / "pair")
    pair, found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pair", output_loading_info=True)
    assert not found["missing_keys"]
    wanted = BertModel.from_pretrained(encoder, add_pooling_layer=False).state_dict()
    for part in (pair.encoder, pair.decoder.bert):
        state = part.state_dict()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    for layer in pair.decoder.bert.encoder.layer:
        own, other = layer.attention.state_dict(), layer.crossattention.state_dict()
        assert all(torch.equal(own[name], other[name]) for name in own)
    tokens = wanted["embeddings.word_embeddings.weight"]
    assert torch.equal(pair.get_output_embeddings().weight, tokens)


def test_every_kind_has_a_recipe_that_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.kind_case.write_rows", lambda _path: None)
    recipes = [build_recipe(recipe_tree(name, "any", tmp_path)) for name in CASES]
    assert {recipe.task.kind for recipe in recipes} == {*get_args(TaskKind)}


def test_the_section_says_what_was_measured(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "date": "2026-01-01", "machine": {"cpu": "C", "cores": 2}, "commit": "a" * 40, "modified": False,
        "name": "generation", "versions": {"torch": "2", "peft": "1"}, "rank": 8, "kind": "generation", "base": "b", "data": "d",
        "metric": "bleu", "base_value": 1.04, "adapter_value": 9.0, "difference": [5.0, 10.26],
        "num_train": 1000, "num_test": 64, "steps": 60, "batch_size": 16, "num_trainable": 12345,
        "step_s": 0.5, "adapter_bytes": 2_500_000, "quiet": False,
    }  # fmt: skip
    path = tmp_path / "kinds.jsonl"
    path.write_text(json.dumps(record) + "\n")
    cells = [cell.strip() for cell in section(path).splitlines()[-1].strip("| ").split("|")]
    assert cells == [
        "`generation`", "b", "d", "1,000 / 64", "bleu", "1.0", "9.0", "+5.0 to +10.3", "60 of 16", "12,345",
        "0.50 *", "2.50",
    ]  # fmt: skip
    assert "with a star" in section(path)
