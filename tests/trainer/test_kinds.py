"""Each task kind over tiny checkpoints of its families: it learns, and PEFT loads just what was trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import InvalidRecipe, StorageError
from lorary.trainer.kinds.spans import span_sums, spans_of
from lorary.trainer.kinds.token_classification import word_sums
from lorary.trainer.methods import method as method_module
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.train import prepare, train
from tests.trainer.families import build_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.registry.manifest import Manifest
    from lorary.trainer.progress import Reporter

FRENCH = {
    "cat": "chat", "dog": "chien", "sun": "soleil", "sky": "ciel", "hat": "chapeau",
    "mat": "tapis", "red": "rouge", "blue": "bleu", "big": "grand",
}  # fmt: skip
NOUNS = [*FRENCH]


def rows_of(kind: str) -> list[dict[str, str]]:
    """Small tasks whose answer is in the text."""
    pairs = [(a, b) for a in NOUNS for b in NOUNS if a != b]
    if kind == "sequence_classification":
        return [
            {"text": f"the {a} film on the {b} was {label}", "target": label}
            for a, b in pairs[:40]
            for label in ("good", "bad")
        ]
    if kind == "token_classification":
        return [
            {"text": f"the {a} Anna sees {b} Paris", "target": "O O B-PER O O B-LOC"}
            for a, b in pairs
        ]
    if kind == "seq2seq":
        return [
            {"text": f"the {a} was {word} on a {b}", "target": answer}
            for a, b in pairs[:40]
            for word, answer in (("good", "le bon"), ("bad", "tapis rouge"))
        ]
    return [{"text": f"the {a} {b}", "target": f"{FRENCH[a]} {FRENCH[b]}"} for a, b in pairs]


LABELS = {
    "sequence_classification": ["good", "bad"],
    "token_classification": ["O", "B-PER", "B-LOC"],
}
STEPS = {"seq2seq": 60, "embeddings": 60}


@pytest.fixture
def run(
    tmp_path: Path, tiny_base: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Manifest, Any, Path]]:
    """Train a kind over a family; return the manifest, the model as trained, and the base's folder."""

    def go(kind: str, family: str, **changes: Any) -> tuple[Manifest, Any, Path]:
        base = tiny_base if family == "llama" else build_family(family, tmp_path / family)
        trained: list[Any] = []
        module: Any = method_module
        save = module.save_adapter

        def keep(model: Any, *args: Any) -> None:
            trained.append(model)
            save(model, *args)

        monkeypatch.setattr(module, "save_adapter", keep)
        recipe = build_recipe(recipe_tree(kind, base, tmp_path / f"{kind}.jsonl", **changes))
        manifest = train(recipe, tmp_path / "out", reporter=quiet)
        return manifest, trained[0], base

    return go


def recipe_tree(kind: str, base: Path, data: Path, **changes: Any) -> dict[str, Any]:
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    return {
        "name": "tiny",
        "base": str(base),
        "task": {
            "kind": kind,
            "template": "{{ text }}",
            "labels": LABELS.get(kind, []),
            "max_new_tokens": 4,
        },
        "data": {
            "source": "file",
            "path": str(data),
            "num_test": 16,
            "num_validation": 8,
            "max_similarity": 1.0,
        },
        "method": {"rank": 4},
        "training": {
            "max_steps": STEPS.get(kind, 40),
            "batch_size": 16,
            "learning_rate": 1e-2,
            "eval_every": 20,
            "dtype": "float32",
            "device": "cpu",
            **changes,
        },
        "evaluation": {
            "metric": "exact_match" if kind == "seq2seq" else "auto",
            "report": kind == "token_classification",
        },
    }


def loaded(auto: str, base: Path, folder: Path, **options: Any) -> Any:
    """The oracle: what anybody gets from PEFT with the folder as it was written."""
    import transformers
    from peft import PeftModel

    with quiet_libraries():
        model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32, **options)
        return PeftModel.from_pretrained(model, folder).eval()


def assert_same(trained: Any, fresh: Any, key: str, **inputs: torch.Tensor) -> None:
    """Compare what two models compute; both must differ from the base for it to mean something."""
    trained.eval()
    with torch.inference_mode():
        wanted, found = trained(**inputs)[key], fresh(**inputs)[key]
        with fresh.disable_adapter():
            bare = fresh(**inputs)[key]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - bare).abs().max() > 1e-2


def some_ids(base: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("the cat film on the dog was good", return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "llama"])
def test_sequence_classification(run: Callable[..., Any], tmp_path: Path, family: str) -> None:
    manifest, trained, base = run("sequence_classification", family)
    assert manifest.metrics.primary == "accuracy"
    assert manifest.metrics.adapter["accuracy"] >= 0.9
    assert manifest.metrics.base["accuracy"] < 0.8
    assert manifest.golden_probes == ()
    fresh = loaded("AutoModelForSequenceClassification", base, tmp_path / "out", num_labels=2)
    assert_same(trained, fresh, "logits", **some_ids(base))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    names = {"bert": {"query", "key", "value", "dense"}, "llama": {"q_proj", "down_proj"}}
    assert names.get(family, set()) <= set(config["target_modules"])
    assert not {"score", "classifier", "out_proj"} & set(config["target_modules"])


def test_token_classification(run: Callable[..., Any], tmp_path: Path) -> None:
    """Over byte-level tokens, whose offsets begin at the space before the word."""
    manifest, trained, base = run("token_classification", "roberta")
    assert manifest.metrics.primary == "f1"
    assert manifest.metrics.adapter["f1"] == 1.0
    assert manifest.metrics.uncertainty["f1"].difference.low > 0
    assert (tmp_path / "out" / "report" / "weights.json").is_file()
    assert manifest.metrics.base["f1"] < 0.5
    fresh = loaded("AutoModelForTokenClassification", base, tmp_path / "out", num_labels=3)
    assert_same(trained, fresh, "logits", **some_ids(base))


@pytest.mark.parametrize("family", ["bart", "t5", "marian", "pair"])
def test_seq2seq(run: Callable[..., Any], tmp_path: Path, family: str) -> None:
    manifest, trained, base = run("seq2seq", family)
    assert manifest.metrics.base["exact_match"] == 0.0
    # Random decoders with norms behind their layers soon give answers, and the right one much later.
    assert manifest.metrics.adapter["exact_match"] >= (0.9 if family == "t5" else 0.4)
    fresh = loaded("AutoModelForSeq2SeqLM", base, tmp_path / "out")
    decoder = torch.tensor([[trained.config.decoder_start_token_id, 5, 7]])
    assert_same(trained, fresh, "logits", **some_ids(base), decoder_input_ids=decoder)
    examples = (tmp_path / "out" / "report" / "examples.jsonl").read_text().splitlines()
    said = [json.loads(line)["generated"]["adapter"] for line in examples]
    assert set(said) & {"le bon", "tapis rouge"}, "texts are generated, and decoded"


def test_embeddings(run: Callable[..., Any], tmp_path: Path) -> None:
    manifest, trained, base = run("embeddings", "bert")
    metrics = manifest.metrics
    assert metrics.primary == "mrr"
    assert metrics.adapter["mrr"] > metrics.base["mrr"] + 0.2
    fresh = loaded("AutoModel", base, tmp_path / "out", add_pooling_layer=False)
    assert_same(trained, fresh, "last_hidden_state", **some_ids(base))


def test_spans_are_read_as_conll_does() -> None:
    tags = ["B-PER", "I-PER", "I-LOC", "O", "I-LOC", "B-LOC", "I-LOC"]
    assert spans_of(tags) == {(0, 2, "PER"), (2, 3, "LOC"), (4, 5, "LOC"), (5, 7, "LOC")}
    half = [["B-PER", "O", "O"], ["O"]]
    sums = span_sums(half, [["B-PER", "O", "B-LOC"], ["O"]])
    assert sums.value == pytest.approx(2 / 3)
    assert sums.by_example.tolist() == pytest.approx([2 / 3, 1.0])


def test_labels_that_mark_no_spans_are_scored_by_word() -> None:
    """Against scikit-learn, over the words of all texts."""
    from sklearn.metrics import f1_score

    chosen, wanted = [["a", "b", "b"], ["c", "a"]], [["a", "b", "c"], ["c", "b"]]
    sums = word_sums(chosen, wanted, ["a", "b", "c"])
    assert sums["f1"].value == pytest.approx(f1_score([*"abccb"], [*"abbca"], average="macro"))
    assert sums["accuracy"].by_example.tolist() == pytest.approx([2 / 3, 1 / 2])


def test_words_and_labels_must_agree_in_number(tmp_path: Path) -> None:
    base = build_family("bert", tmp_path / "bert")
    tree = recipe_tree("token_classification", base, tmp_path / "data.jsonl")
    text = (tmp_path / "data.jsonl").read_text().replace("Anna sees", "Anna", 1)
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(InvalidRecipe, match="has 5 words and 6 labels"):
        prepare(build_recipe(tree))


def test_a_kind_with_a_head_is_not_trained_on_a_quantized_base(tmp_path: Path) -> None:
    base = build_family("bert", tmp_path / "bert")
    tree = recipe_tree("sequence_classification", base, tmp_path / "data.jsonl")
    tree["method"] = {"name": "qlora"}
    with pytest.raises(
        InvalidRecipe, match=r"nf4 for a sequence_classification.*use method.name lora"
    ):
        prepare(build_recipe(tree))


def test_a_head_goes_on_from_a_checkpoint_as_it_was(
    tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies before its output is written, resumed, beside one that did not die."""
    from safetensors.torch import load_file

    base = build_family("bert", tmp_path / "bert")
    tree = recipe_tree("sequence_classification", base, tmp_path / "data.jsonl", max_steps=4)
    recipe = build_recipe(tree)
    train(recipe, tmp_path / "whole", reporter=quiet)

    def die(*_args: Any) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("lorary.trainer.train.write_output", die)
        with pytest.raises(StorageError):
            train(recipe, tmp_path / "again", reporter=quiet)
    train(recipe, tmp_path / "again", resume=True, reporter=quiet)
    whole, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again")
    )
    assert "base_model.model.classifier.weight" in whole
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
