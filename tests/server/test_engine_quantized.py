"""Quantized bases and adapters: the mixed batch equals PEFT with the same rounded numbers."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.bases import find_base
from lorary.bases.load import Quantization, load_model
from lorary.bases.plan import QuantizationPlan, Rule
from lorary.errors import ConfigError
from lorary.server.adapters.rounding import round_rows, storage_dtype
from lorary.server.build import choose
from lorary.server.native import library as native
from tests.conftest import RECIPES, peft_greedy
from tests.server.beside_peft import check_logprobs
from tests.server.test_dora import take_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.server.adapters.rounding import Storage
    from tests.server.conftest import EngineWorld


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_mixed_batch_over_a_quantized_base(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    quantization: Quantization,
) -> None:
    """Log probabilities, not tokens: the quantizers' products depend a little on the batch."""
    base = find_base(tiny_base)
    options = {"quantization": quantization, "dtype": torch.float32, "device": "cpu"}
    world = make_world(model=load_model(base, **options))  # type: ignore[arg-type]
    check_logprobs(
        world,
        tiny_adapters,
        lambda: load_model(base, **options),  # type: ignore[arg-type]
        TOLERANCE[quantization],
    )


# int8 rounds activations per row to 8 bits through float16; nf4 on the CPU multiplies single rows
# by another kernel than many. Ours is compared with the base before rounding, the others with the same
# rounded base. Adapters move these log probabilities by more than 1.
TOLERANCE = {"nf4": 2e-2, "int8": 0.1, "native int8": 0.3}


@pytest.mark.parametrize("fused", [True, False])
def test_native_int8(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    fused: bool,
) -> None:
    """Our own 8-bit weights: near PEFT in float32, with each row's adapter."""
    from transformers import AutoModelForCausalLM

    take_path("layers" if fused else "products", monkeypatch)
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    world = make_world(int8=True)
    assert (world.fused is not None) == fused
    check_logprobs(
        world,
        tiny_adapters,
        lambda: AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        TOLERANCE["native int8"],
    )


NATIVE_PLANS = {
    "whole groups": ["*.0.self_attn.*", "*.down_proj"],
    "one group": ["*.1.mlp.gate_proj", "*.1.mlp.up_proj"],
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("globs", NATIVE_PLANS.values(), ids=list(NATIVE_PLANS))
def test_layers_in_8_bits_beside_whole_ones(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    globs: list[str],
    fused: bool,
) -> None:
    """Against PEFT in float32 over the rounded weights, so that only rows are rounded besides."""
    from transformers import AutoModelForCausalLM

    take_path("layers" if fused else "products", monkeypatch)
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    plan = QuantizationPlan("none", tuple(Rule(glob, "int8") for glob in globs))
    chosen = choose(find_base(tiny_base), "none", plan, native_int8=True)
    assert chosen.label == "none+int8"
    assert isinstance(chosen.natively, frozenset)

    def rounded() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        assert isinstance(chosen.natively, frozenset)
        for name in chosen.natively:
            weight = model.get_submodule(name).weight
            parts = weight.data.clone().view(weight.shape[0], -1, 64)
            scales = parts.abs().amax(dim=2, keepdim=True) / 127
            weight.data = ((parts / scales).round() * scales).view_as(weight)
        return model

    world = make_world(int8=chosen.natively)
    assert (world.fused is not None) == fused
    for group in world.lora.groups:
        assert group.packed is not None
        is_int8 = group.packed.dtype == torch.int8
        assert is_int8 == (group.spec.modules[0] in chosen.natively)
    check_logprobs(world, tiny_adapters, rounded, TOLERANCE["native int8"])


def test_a_plan_of_all_three_formats(
    make_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """nf4 by bitsandbytes, int8 natively, and whole layers, in one model."""
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    base = find_base(tiny_base)
    plan = QuantizationPlan("none", (Rule("*.0.mlp.*", "nf4"), Rule("*.self_attn.*", "int8")))
    chosen = choose(base, "none", plan, native_int8=True)

    def load() -> Any:
        return load_model(base, quantization=chosen.by_bases, dtype=torch.float32)

    world = make_world(model=load(), int8=chosen.natively)
    check_logprobs(world, tiny_adapters, load, TOLERANCE["native int8"])


def test_plans_that_this_device_cannot_do_are_refused(tiny_base: Path) -> None:
    base = find_base(tiny_base)
    split = QuantizationPlan("int8", (Rule("*.1.*.k_proj", "none"),))
    text = r"q_proj' is to be in int8, and 'model.layers.1.self_attn.k_proj' not"
    with pytest.raises(ConfigError, match=text):
        choose(base, "none", split, native_int8=True)
    mixed = QuantizationPlan("int8", (Rule("*.k_proj", "nf4"),))
    with pytest.raises(ConfigError, match="has layers in int8 and in nf4"):
        choose(base, "none", mixed, native_int8=False)


def test_what_cannot_be_rounded_is_refused(make_world: Callable[..., EngineWorld]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).double()
    with pytest.raises(ConfigError, match="cannot be rounded to 8 bits"):
        make_world(model=model, int8=True)


def rounded(folder: Path, to: Path, storage: torch.dtype) -> Path:
    """Copy a PEFT folder with every rank row rounded as the pool would."""
    to.mkdir()
    shutil.copy(folder / "adapter_config.json", to)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        rows = tensor if "lora_A" in name else tensor.t()
        kept, scales = round_rows(rows, storage)
        back = kept.float() if scales is None else kept.float() * scales[:, None]
        tensors[name] = (back if "lora_A" in name else back.t()).contiguous()
    save_file(tensors, to / "adapter_model.safetensors")
    return to


@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
def test_adapters_kept_in_fewer_bits_answer_as_their_rounded_selves(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
    storage: Storage,
) -> None:
    """Mixed with base rows, exactly what PEFT answers with the same numbers."""
    world = make_world(adapter_dtype=storage)
    names = [*RECIPES, ""]
    prompts = {name: [5 + i, 9, 30 + i, 11] * (1 + i) for i, name in enumerate(names)}
    ids = {name: world.submit(prompts[name], name) for name in names}
    kept = storage_dtype(storage, torch.float32)
    for name, prompt in prompts.items():
        folder = rounded(tiny_adapters[name], tmp_path / name, kept) if name else None
        tokens, _, error = world.collector.wait(ids[name])
        assert error is None
        assert tokens == peft_greedy(tiny_base, folder, prompt, 12), name or "base"
    errors = [adapter.storage_error for adapter in world.residency.snapshot()]
    assert len(errors) == len(RECIPES)
    assert all(0 < error < 0.02 for error in errors), errors


def test_8_bit_floats_are_refused_on_a_cpu(make_world: Callable[..., EngineWorld]) -> None:
    with pytest.raises(ConfigError, match="--adapter-dtype int8"):
        make_world(adapter_dtype="fp8")
