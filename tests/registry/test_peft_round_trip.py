"""What PEFT computes with an adapter is what it computes with the version pushed from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.registry import BaseCard, Registry
from lorary.registry.validate import validate_adapter

TOLERANCE = 1e-5

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["down_proj"]},
    "mixed": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj", "down_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 2, r".*layers\.1\..*v_proj": 5, "0.mlp.gate_proj": 16},
        "alpha_pattern": {"v_proj": 3, r"^model\.layers\.0\.mlp\.down_proj": 7},
    },
    "mixed-rslora": {
        "r": 4,
        "lora_alpha": 9,
        "use_rslora": True,
        "target_modules": ["o_proj", "up_proj"],
        "rank_pattern": {"o_proj": 7},
        "alpha_pattern": {"up_proj": 1},
    },
    "some-layers": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "excluded": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "exclude_modules": ["k_proj", "layers.0.self_attn.o_proj"],
    },
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q|k)_proj"},
    "orthogonal": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "init_lora_weights": "orthogonal",
    },
}


def build(base: Path, folder: Path, config: dict[str, Any]) -> torch.Tensor:
    """Save a random adapter and return the logits that PEFT computes with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    peft.save_pretrained(folder)
    return logits(peft)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens).logits
    return result


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_survive_the_registry(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wanted = build(tiny_base, tmp_path / "trained", CONFIGS[kind])
    card = BaseCard.from_folder(tiny_base)
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(tmp_path / "trained", kind, base=card)
    pulled = registry.pull(kind, tmp_path / "pulled")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    bare = logits(base)
    found = logits(PeftModel.from_pretrained(base, pulled))
    assert (found - wanted).abs().max() < TOLERANCE
    assert (bare - wanted).abs().max() > 100 * TOLERANCE
    spec = validate_adapter(pulled, card)
    assert {lora.scale for lora in spec.modules.values()} == {1.0}


def test_a_gpt2_with_transposed_weights(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    wanted = build(
        tmp_path / "base",
        tmp_path / "trained",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
        },
    )
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(tmp_path / "trained", "gpt2", base=BaseCard.from_folder(tmp_path / "base"))
    pulled = registry.pull("gpt2", tmp_path / "pulled")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(base, pulled))
    assert (found - wanted).abs().max() < TOLERANCE
    shutil.rmtree(tmp_path / "registry")
