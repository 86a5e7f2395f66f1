"""Adapters for encoders and encoder-decoders are kept, checked against their base, and not served."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry import BaseCard, Registry
from lorary.registry.check import check_folder
from lorary.registry.validate import validate_adapter
from lorary.trainer.quiet import quiet_libraries
from tests.conftest import write_manifest
from tests.trainer.families import build_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CASES: dict[str, tuple[str, str, str]] = {
    "sequence_classification-bert": ("bert", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "sequence_classification-roberta": ("roberta", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "sequence_classification-deberta": ("deberta", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "sequence_classification-llama": ("llama", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "token_classification-bert": ("bert", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "seq2seq-bart": ("bart", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "seq2seq-t5": ("t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "seq2seq-pair": ("pair", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "embeddings-deberta": ("deberta", "AutoModel", "FEATURE_EXTRACTION"),
}
LABELS = ("good", "bad", "neither")


def options(kind: str) -> dict[str, Any]:
    return {"num_labels": len(LABELS)} if kind.endswith("classification") else {}


def load(auto: str, base: Path, kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    with quiet_libraries():
        model = getattr(transformers, auto).from_pretrained(
            base, dtype=torch.float32, **options(kind)
        )
    model.config.pad_token_id = 1
    return model.eval()


def output(model: Any) -> torch.Tensor:
    ids = torch.tensor([[2, 7, 11, 9, 5]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids, **more)[0]
    return found


@pytest.fixture
def made(tiny_base: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path, Any]]:
    """A random adapter with all linears of a family under a kind's head: base, folder, PEFT's model."""

    def make(case: str) -> tuple[Path, Path, Any]:
        from peft import LoraConfig, TaskType, get_peft_model

        from lorary.bases.find import find_base
        from lorary.bases.tasks import load_task_model
        from lorary.trainer.heads import modules_to_save
        from lorary.trainer.methods.attach import linear_names

        kind = case.partition("-")[0]
        family, auto, task_type = CASES[case]
        base = tiny_base if family == "llama" else build_family(family, tmp_path / family)
        with quiet_libraries():
            model, heads = load_task_model(
                find_base(base), auto, dtype=torch.float32, **options(kind)
            )
        model.config.pad_token_id = 1
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            task_type=TaskType[task_type],
            target_modules=linear_names(model, heads),
            modules_to_save=modules_to_save(task_type, heads),
        )
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        folder = tmp_path / "adapter"
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()
        labels = LABELS if kind.endswith("classification") else ()
        write_manifest(base, folder, kind=kind, template="{{ text }}", labels=labels)
        return base, folder, wrapped

    return make


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_computes_what_was_pushed(
    made: Callable[[str], tuple[Path, Path, Any]], case: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    kind = case.partition("-")[0]
    base, folder, wrapped = made(case)
    card = BaseCard.from_folder(base)
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(folder, "a", base=card)
    pulled = registry.pull("a", tmp_path / "pulled")
    with quiet_libraries():
        again = PeftModel.from_pretrained(load(CASES[case][1], base, kind), pulled)
    torch.testing.assert_close(output(again), output(wrapped), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(again), output(load(CASES[case][1], base, kind)), atol=1e-2)
    with pytest.raises(IncompatibleAdapter, match=f"task kind '{kind}', which is not served"):
        validate_adapter(pulled, card)


def test_a_server_says_what_it_does_not_serve(
    made: Callable[[str], tuple[Path, Path, Any]], tmp_path: Path
) -> None:
    """Over the very base that it serves."""
    from lorary.server.adapters.loader import load_adapter

    base, folder, _ = made("sequence_classification-llama")
    card = BaseCard.from_folder(base)
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(folder, "a", base=card)
    pulled = registry.pull("a", tmp_path / "pulled")
    with pytest.raises(IncompatibleAdapter, match="'sequence_classification', which is not served"):
        load_adapter(pulled, card, modules=frozenset(card.modules), max_rank=64)


def test_heads_are_checked_to_the_last_number(
    made: Callable[[str], tuple[Path, Path, Any]], tmp_path: Path
) -> None:
    base, folder, _ = made("sequence_classification-bert")
    card = BaseCard.from_folder(base)
    file, names = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(file), names.read_text()
    weight, bias = (f"base_model.model.classifier.{name}" for name in ("weight", "bias"))

    def problem(changed: dict[str, torch.Tensor], **keys: Any) -> str:
        save_file(changed, file)
        names.write_text(json.dumps({**json.loads(config), **keys}))
        problems = check_folder(folder, card).problems
        with pytest.raises((IncompatibleAdapter, CorruptArtifact)):
            Registry.open(tmp_path / "r", create=True).push(folder, "a", base=card)
        return problems[0].text

    assert "the task has 3 labels" in problem({**tensors, weight: tensors[weight][:2].clone()})
    assert "no head that" in problem({n: t for n, t in tensors.items() if n != bias})
    extra = {**tensors, "base_model.model.bert.embeddings.word_embeddings.weight": torch.ones(2, 2)}
    assert "no head that" in problem(extra)
    assert "NaN" in problem({**tensors, bias: torch.full_like(tensors[bias], torch.nan)})
    assert "does not name" in problem(tensors, modules_to_save=["bert.pooler"])
    assert "needs SEQ_CLS" in problem(tensors, task_type="TOKEN_CLS")
