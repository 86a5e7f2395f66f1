"""What an export gives others is the adapter that was pushed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lorary.errors import AlreadyExists, IncompatibleAdapter
from lorary.registry import BaseCard, Registry
from lorary.registry.cli import app
from lorary.registry.export import export_gguf, export_merged
from lorary.registry.gguf_lora import to_pairs
from lorary.registry.safetensors_file import read_header, read_tensor
from tests.conftest import AdapterRecipe, build_adapter

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = "adapter_model.safetensors"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
MIXED = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 9}}


@pytest.fixture(scope="module")
def source(
    tiny_base: Path, card: BaseCard, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Registry, Path]:
    """A registry with an adapter of mixed ranks and scales, and the folder that was pushed."""
    root = tmp_path_factory.mktemp("export")
    pushed = build_adapter(tiny_base, root / "pushed", AdapterRecipe(rank=6, alpha=5, config=MIXED))
    dora = build_adapter(tiny_base, root / "dora", AdapterRecipe(config={"use_dora": True}))
    registry = Registry.open(root / "registry", create=True)
    registry.push(pushed, "mixed", base=card)
    registry.push(dora, "dora", base=card)
    return registry, pushed


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(torch.arange(3, 43).reshape(2, 20)).logits
    return result


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


def test_rows_of_halves_become_rows_of_pairs() -> None:
    heads, width = 3, 8
    rows = np.arange(heads * width)[:, None].repeat(2, axis=1)
    found = to_pairs(rows, heads)
    for head in range(heads):
        for i in range(width // 2):
            for j in range(2):
                old = head * width + j * width // 2 + i
                assert found[head * width + 2 * i + j].tolist() == [old, old]


def test_a_gguf_holds_the_matrices_under_llama_cpps_names(
    source: tuple[Registry, Path], tiny_base: Path, card: BaseCard, tmp_path: Path
) -> None:
    registry, _ = source
    export_gguf(registry, registry.resolve("mixed"), tiny_base, card, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0.0, "0: llama.cpp scales by 1, and B holds the scale"
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    kept = registry.fetch(registry.resolve("mixed")) / TENSORS
    infos = read_header(kept).tensors
    assert len(found) == len(infos) == 28
    heads = {"attn_q": 4, "attn_k": 2}
    for module in card.modules:
        _, _, layer, last = module.split(".", 3)
        name = NAMES[last]
        a, b = (
            read_tensor(kept, infos[f"base_model.model.{module}.lora_{side}.weight"])
            for side in "AB"
        )
        if name in heads:
            b = to_pairs(b, heads[name])
        assert np.array_equal(found[f"blk.{layer}.{name}.weight.lora_a"], a)
        assert np.array_equal(found[f"blk.{layer}.{name}.weight.lora_b"], b)
        assert a.shape[0] == (3 if name == "attn_q" else 6)


def test_half_precision_is_written_as_float32_or_kept(
    forge: Any, tiny_base: Path, card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    import ml_dtypes

    for dtype, written in ((ml_dtypes.bfloat16, np.float32), (np.float16, np.float16)):
        name = np.dtype(dtype).name
        folder = forge.folder(name, tensors=forge.tensors(dtype=dtype))
        registry.push(folder, name, base=card)
        export_gguf(registry, registry.resolve(name), tiny_base, card, tmp_path / name)
        tensors = gguf.GGUFReader(tmp_path / name / "adapter.gguf").tensors
        assert {tensor.data.dtype for tensor in tensors} == {np.dtype(written)}


@pytest.mark.parametrize("name", ["mixed", "dora"])
def test_a_merged_model_answers_like_the_adapter_and_says_how_closely(
    name: str, source: tuple[Registry, Path], tiny_base: Path, card: BaseCard, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    registry, pushed = source
    out = tmp_path / "merged"
    report = export_merged(registry, registry.resolve(name), tiny_base, card, out)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(out).chat_template
    wanted = peft_logits(tiny_base, pushed.parent / ("pushed" if name == "mixed" else name))
    off = float((logits(merged.float()) - wanted).abs().max())
    found = json.loads((out / "merge-report.json").read_text())
    assert found["max_logit"] == report.deviation.max_logit
    assert 0 < found["max_logit"] < found["adapter_effect"] / 5
    assert off < 3 * found["max_logit"], "other prompts, the same order"
    assert BaseCard.from_folder(out).modules == card.modules


def test_what_cannot_be_exported(
    source: tuple[Registry, Path],
    tiny_base: Path,
    card: BaseCard,
    other_card: BaseCard,
    tmp_path: Path,
) -> None:
    import dataclasses

    registry, _ = source
    mixed = registry.resolve("mixed")
    with pytest.raises(IncompatibleAdapter, match="DoRA"):
        export_gguf(registry, registry.resolve("dora"), tiny_base, card, tmp_path / "out")
    with pytest.raises(IncompatibleAdapter, match="trained on base"):
        export_merged(registry, mixed, tiny_base, other_card, tmp_path / "out")
    strange = dataclasses.replace(card, architecture="StrangeForCausalLM")
    with pytest.raises(IncompatibleAdapter, match=r"StrangeForCausalLM.*--to merged"):
        export_gguf(registry, mixed, tiny_base, strange, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(AlreadyExists):
        export_gguf(registry, mixed, tiny_base, card, tmp_path / "full")


def test_the_command(source: tuple[Registry, Path], tiny_base: Path, tmp_path: Path) -> None:
    registry, _ = source
    for form, file in {"peft": TENSORS, "gguf": "adapter.gguf"}.items():
        out = tmp_path / form
        args = ["export", "mixed", str(out), "--to", form, "--registry", registry.url, "--json"]
        done = CliRunner().invoke(app, [*args, "--base", str(tiny_base)], catch_exceptions=False)
        assert json.loads(done.stdout)["version"] == "mixed@1"
        assert (out / file).is_file()
