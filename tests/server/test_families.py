"""Model families through the engine: greedy tokens equal transformers' own ``generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from lorary.server.native import decoder
from tests.conftest import TINY_SIZES, build_tokenizer, peft_greedy
from tests.server.test_engine_oracle import prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld

SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# Its tables are made anew in every step; within the base's own context they are the plain ones.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention"]
# name: (family, settings, whether its layers run as one native call)
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", TINY_SIZES, True),
    "llama, scaled rotary embedding": ("Llama", {**TINY_SIZES, "rope_parameters": SCALED}, True),
    "llama, wide heads": ("Llama", {**TINY_SIZES, "head_dim": 24}, True),
    "llama, gelu": ("Llama", {**TINY_SIZES, "hidden_act": "gelu"}, False),
    "mistral, sliding window": ("Mistral", {**TINY_SIZES, "sliding_window": 7}, True),
    "qwen2": ("Qwen2", TINY_SIZES, True),
    "qwen2, sliding window": (
        "Qwen2",
        {**TINY_SIZES, "use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING},
        True,
    ),
    "qwen3": ("Qwen3", {**TINY_SIZES, "head_dim": 16}, True),
    "gemma": ("Gemma", {**TINY_SIZES, "head_dim": 16}, False),
    "gemma2": (
        "Gemma2",
        {**TINY_SIZES, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
        False,
    ),
    "phi": ("Phi", TINY_SIZES, False),
    "gpt2": (
        "GPT2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2},
        False,
    ),
    "opt": (
        "OPT",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
            "init_std": 0.2,
        },
        False,
    ),
}


def build(name: str, folder: Path) -> Path:
    family, settings, _ = FAMILIES[name]
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **settings,
        }
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    # Ones and zeros would hide a norm's weight or a bias that is not applied.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefill_budget", [512, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_generate(
    make_world: Callable[..., EngineWorld], tmp_path: Path, name: str, prefill_budget: int
) -> None:
    base = build(name, tmp_path / "base")
    world = make_world(base, prefill_budget=prefill_budget)
    assert (world.fused is not None) == FAMILIES[name][2]
    asked = prompts(5)
    ids = [world.submit(p, max_tokens=10) for p in asked]
    for request_id, prompt in zip(ids, asked, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == peft_greedy(base, None, prompt, 10)


@pytest.mark.parametrize("prefill_budget", [512, 7])
def test_mixed_batch_without_fused_layers(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    prefill_budget: int,
) -> None:
    """The same base through the path of the families that have no native layer."""
    monkeypatch.setattr(decoder, "FAMILIES", frozenset())
    world = make_world(prefill_budget=prefill_budget)
    assert world.fused is None
    names = ["alpha", "", "echo", "bravo", ""]
    asked = prompts(len(names))
    ids = [world.submit(p, n) for p, n in zip(asked, names, strict=True)]
    for request_id, name, prompt in zip(ids, names, asked, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == peft_greedy(tiny_base, tiny_adapters.get(name), prompt, 12)
    labels = ((5, 6, 7), (5, 8), (9,))
    scored = world.submit(asked[0], "bravo", labels=labels)
    expected = make_fused_scores(make_world, monkeypatch, asked[0], labels)
    _, finish, _ = world.collector.wait(scored)
    assert finish is not None
    assert finish.label_logprobs == pytest.approx(expected, abs=1e-4)


def make_fused_scores(
    make_world: Callable[..., EngineWorld],
    monkeypatch: pytest.MonkeyPatch,
    prompt: list[int],
    labels: tuple[tuple[int, ...], ...],
) -> tuple[float, ...]:
    monkeypatch.undo()
    world = make_world()
    assert world.fused is not None
    _, finish, _ = world.collector.wait(world.submit(prompt, "bravo", labels=labels))
    assert finish is not None
    return finish.label_logprobs
