"""Model families through the engine: tokens and log probabilities equal transformers' and PEFT's."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from lorary.errors import ConfigError
from lorary.registry import BaseCard, Registry
from lorary.server.native import library as native
from tests.conftest import (
    TINY_SIZES,
    AdapterRecipe,
    build_adapter,
    build_tokenizer,
    peft_greedy,
    write_manifest,
)
from tests.server.test_dora import take_path
from tests.server.test_engine_oracle import prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld

SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# Its tables are made anew in every step; within the base's own context they are the plain ones.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention"]
ROPE_BY_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
}
OPT_SIZES = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 64,
    "init_std": 0.2,
}
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
    "gemma": ("Gemma", {**TINY_SIZES, "head_dim": 24}, True),
    "gemma2": (
        "Gemma2",
        {
            **TINY_SIZES,
            "head_dim": 24,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        True,
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **TINY_SIZES,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "layer_types": SLIDING,
            "rope_parameters": ROPE_BY_TYPE,
            "final_logit_softcapping": 5.0,
        },
        True,
    ),
    "phi3, sliding window": (
        "Phi3",
        {**TINY_SIZES, "partial_rotary_factor": 0.5, "sliding_window": 7},
        True,
    ),
    "phi": ("Phi", TINY_SIZES, True),
    "phi, norms of heads": ("Phi", {**TINY_SIZES, "qk_layernorm": True}, True),
    "gpt2": (
        "GPT2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2},
        True,
    ),
    "opt": ("OPT", OPT_SIZES, True),
    "opt, norms behind": ("OPT", {**OPT_SIZES, "do_layer_norm_before": False}, False),
    "granite": (
        "Granite",
        {
            **TINY_SIZES,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        True,
    ),
    "olmo2": ("Olmo2", TINY_SIZES, True),
    "olmo3": (
        "Olmo3",
        {
            **TINY_SIZES,
            "sliding_window": 7,
            "layer_types": SLIDING,
            "rope_parameters": ROPE_BY_TYPE,
        },
        True,
    ),
    "cohere": ("Cohere", {**TINY_SIZES, "logit_scale": 0.5}, True),
    "cohere, norms of heads": ("Cohere", {**TINY_SIZES, "use_qk_norm": True}, False),
    "cohere2": (
        "Cohere2",
        {**TINY_SIZES, "logit_scale": 0.5, "sliding_window": 7, "layer_types": SLIDING},
        True,
    ),
    "starcoder2": ("Starcoder2", {**TINY_SIZES, "sliding_window": 7}, True),
    "smollm3": (
        "SmolLM3",
        {
            **TINY_SIZES,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 7,
        },
        True,
    ),
    "olmo": ("Olmo", TINY_SIZES, False),
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


class Zoo:
    """A base of every family, made when first asked for, and two adapters on all of its linear layers."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[Path, Registry, Any]] = {}

    def get(self, name: str) -> tuple[Path, Registry, Any]:
        """Return the base, its registry, and PEFT's model of both adapters in float32."""
        if name not in self._made:
            self._made[name] = self._make(name, self._root / str(len(self._made)))
        return self._made[name]

    def _make(self, name: str, root: Path) -> tuple[Path, Registry, Any]:
        from peft import PeftModel

        base = build(name, root / "base")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        kinds = {"Linear": False, "Conv1D": True}
        found = {
            path.rpartition(".")[2]: kinds[type(module).__name__]
            for path, module in model.named_modules()
            if type(module).__name__ in kinds and module is not model.get_output_embeddings()
        }
        options: dict[str, Any] = {"fan_in_fan_out": any(found.values())}
        recipes = {
            "plain": AdapterRecipe(rank=4, modules=tuple(found), config=options),
            "dora": AdapterRecipe(
                rank=9, modules=tuple(found), seed=1, config={**options, "use_dora": True}
            ),
        }
        registry = Registry.open(root / "store", create=True)
        peft: Any = None
        for adapter, recipe in recipes.items():
            folder = write_manifest(base, build_adapter(base, root / adapter, recipe))
            registry.push(folder, adapter, base=BaseCard.from_folder(base))
            if peft is None:
                peft = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter)
            else:
                peft.load_adapter(str(folder), adapter)
        return base, registry, peft.eval()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


NAMES = ["plain", "", "dora", "plain", "", "dora"]


def check(world: EngineWorld, peft: Any, tolerance: float = 1e-4) -> float:
    """Ask prompts of all adapters and of none at once, then the first ones' continuations.

    Every token must be the most likely one of PEFT's model, up to ``tolerance`` in its log probability.

    Returns:
        The largest difference of a token's log probability from PEFT's.
    """
    largest = 0.0
    asked = prompts(len(NAMES), longest=70)
    for tokens in (10, 4):
        ids = [
            world.submit(p, n, logprobs=0, max_tokens=tokens, ignore_eos=True)
            for p, n in zip(asked, NAMES, strict=True)
        ]
        for i, (request_id, name) in enumerate(zip(ids, NAMES, strict=True)):
            found = torch.tensor(world.collector.logprobs(request_id))
            answer, _, _ = world.collector.wait(request_id)
            text = [*asked[i], *answer]
            if name:
                peft.set_adapter(name)
            with torch.inference_mode(), nullcontext() if name else peft.disable_adapter():
                logits = peft(torch.tensor([text])).logits[0].float()
            expected = torch.log_softmax(logits, -1)[len(asked[i]) - 1 : -1]
            chosen = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (expected.amax(dim=1) - chosen).max() <= tolerance, name or "base"
            largest = max(largest, float((found - chosen).abs().max()))
            # What was just answered lies in the cache: the next prompt begins with it.
            asked[i] = text
    return largest


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_batch_equals_peft(
    make_world: Callable[..., EngineWorld], zoo: Zoo, name: str
) -> None:
    """LoRA, DoRA and base rows in one batch; some prompts are read whole, some in chunks beside others."""
    base, registry, peft = zoo.get(name)
    world = make_world(base, registry=registry, prefill_budget=24)
    is_native = FAMILIES[name][2]
    assert (world.fused is not None) == is_native
    if is_native:
        # Nobody gets to transformers' own layers.
        world.lora.model.forward = None
    assert check(world, peft) < 1e-4


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi", "gpt2", "opt"])
def test_layers_above_shared_ones_begin_with_what_they_read(
    make_world: Callable[..., EngineWorld], zoo: Zoo, tmp_path: Path, name: str
) -> None:
    """Scale and positions of the embeddings are in it already, and layers are found by any family's name."""
    base, registry, _ = zoo.get(name)
    recipe = AdapterRecipe(
        rank=4,
        seed=2,
        modules=registry.manifest(registry.resolve("plain")).method.target_modules,
        config={"layers_to_transform": [1], "fan_in_fan_out": name == "gpt2"},
    )
    folder = write_manifest(base, build_adapter(base, tmp_path / "late", recipe))
    registry.push(folder, "late", base=BaseCard.from_folder(base))
    prompt = list(range(3, 73))
    ways: list[dict[str, Any]] = [{"prefix_cache": False}, {"shared_layers": 1}]
    scores = []
    for options in ways:
        world = make_world(base, registry=registry, draft_rows=0, **options)
        world.collector.wait(world.submit(prompt, max_tokens=1))
        request_id = world.submit(prompt, "late", logprobs=0, ignore_eos=True)
        scores.append(world.collector.logprobs(request_id))
    _, finish, _ = world.collector.wait(request_id)
    assert finish is not None
    assert finish.cached_below_tokens == 64
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3, sliding window", "phi", "gpt2", "opt"])
def test_operators_equal_peft(
    make_world: Callable[..., EngineWorld], zoo: Zoo, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What serves these families on other devices and with quantized weights."""
    take_path("products", monkeypatch)
    base, registry, peft = zoo.get(name)
    world = make_world(base, registry=registry, prefill_budget=24)
    assert world.fused is None
    assert check(world, peft) < 1e-4


@pytest.mark.parametrize("name", ["gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_rounded_weights_are_near(
    make_world: Callable[..., EngineWorld], zoo: Zoo, name: str, kind: str
) -> None:
    """Log probabilities of the same tokens, adapters included, beside those of float32 layers."""
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not (kernels.has_int8 if kind == "int8" else kernels.supports_layers(torch.bfloat16)):
        pytest.skip("this CPU has no such product")
    base, registry, _ = zoo.get(name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    options: dict[str, Any] = {"int8": True} if kind == "int8" else {"dtype": torch.bfloat16}
    rounded = load(base, dtype=options.get("dtype", torch.float32)).float()
    scores = []
    for world in (
        make_world(base, registry=registry, **options),
        make_world(base, registry=registry, model=rounded),
    ):
        assert world.fused is not None
        ids = [
            world.submit(p, n, labels=((5, 9, 30, 44), (7,)))
            for p, n in zip(prompts(len(NAMES)), NAMES, strict=True)
        ]
        finishes = [world.collector.wait(i)[1] for i in ids]
        scores.append(torch.tensor([f.label_logprobs for f in finishes if f is not None]))
    assert scores[0].shape == (len(NAMES), 2)
    limit = 0.3 if kind == "int8" else float(scores[1].abs().max()) / 256
    assert (scores[0] - scores[1]).abs().max() < limit


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama, gelu", "the activation 'gelu' has no native form"),
        ("opt, norms behind", "OPTDecoderLayer with do_layer_norm_before = False"),
        ("olmo", "there is no native form of OlmoDecoderLayer"),
        ("gemma2", ""),
    ],
)
def test_the_log_says_why_a_base_runs_operator_by_operator(
    make_world: Callable[..., EngineWorld],
    zoo: Zoo,
    caplog: pytest.LogCaptureFixture,
    name: str,
    reason: str,
) -> None:
    base, registry, _ = zoo.get(name)
    with caplog.at_level(logging.INFO, logger="lorary"):
        make_world(base, registry=registry, start=False)
    said = [r.getMessage() for r in caplog.records if "operator by operator" in r.getMessage()]
    assert [reason in line for line in said] == ([True] if reason else [])


def test_more_positions_than_were_learned_are_refused(
    make_world: Callable[..., EngineWorld], zoo: Zoo
) -> None:
    base, registry, _ = zoo.get("gpt2")
    with pytest.raises(ConfigError, match=r"context of 600 tokens .* the 512 positions"):
        make_world(base, registry=registry, max_context=600)


@pytest.mark.parametrize("prefill_budget", [512, 7])
def test_mixed_batch_without_fused_layers(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    prefill_budget: int,
) -> None:
    """The same base through the path of the families that have no native layer."""
    take_path("products", monkeypatch)
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
