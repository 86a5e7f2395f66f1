"""The same engine on an NVIDIA GPU: run with ``pytest -m gpu`` on a machine that has one.

The kernels' own tests (``test_triton_ops``, ``test_paged_decode``) are of the marker there, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.server.adapters.ops.triton_ops import TritonPool
from tests.conftest import (
    RECIPES,
    AdapterRecipe,
    build_adapter,
    peft_greedy,
    write_manifest,
)
from tests.server.beside_peft import check_logprobs
from tests.server.conftest import EngineWorld, registry_of
from tests.server.test_engine_oracle import prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.server.engine.batch import Batch

pytestmark = pytest.mark.gpu

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 12, "q_proj": 3}},
}


def model_of(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to("cuda")


@pytest.fixture(params=[False, True], ids=["eager", "captured"])
def make_gpu_world(
    request: pytest.FixtureRequest, make_world: Callable[..., EngineWorld], tiny_base: Path
) -> Callable[..., EngineWorld]:
    """Engines whose model is on the card; steps run eagerly, or are captured, every form of them."""

    def make(base: Path = tiny_base, *, model: Any = None, **options: Any) -> EngineWorld:
        model = model_of(base) if model is None else model
        options = {"max_batch": 6, "max_rank": 64, "cuda_graphs": request.param, **options}
        world = make_world(base, model=model, **options)
        static = world.engine._runner.static
        assert (static is not None) == request.param
        if static is not None:
            assert static.num_ready == len(static.forms)
        return world

    return make


def check_against_peft(
    world: EngineWorld, base: Path, adapters: dict[str, Path], names: list[str]
) -> None:
    asked = prompts(len(names))
    ids = [world.submit(p, n) for p, n in zip(asked, names, strict=True)]
    world.engine.start()
    for request_id, name, prompt in zip(ids, names, asked, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == peft_greedy(base, adapters.get(name), prompt, 12), name or "base"


def test_mixed_batch_on_the_gpu_equals_peft_on_the_cpu(
    make_gpu_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    world = make_gpu_world(prefill_budget=48, start=False)
    assert all(isinstance(group.bound, TritonPool) for group in world.lora.groups)
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name))
    check_against_peft(world, tiny_base, tiny_adapters, [*RECIPES, "", *RECIPES, ""])
    assert max(s.num_distinct_adapters for s in world.collector.steps) >= 3


def test_adapters_of_every_kind_equal_peft(
    make_gpu_world: Callable[..., EngineWorld], tiny_base: Path, tmp_path: Path
) -> None:
    """DoRA's column scales, and what a push makes plain LoRA of."""
    from peft import VeraConfig, get_peft_model

    adapters = {
        name: write_manifest(
            tiny_base,
            build_adapter(
                tiny_base, tmp_path / name, AdapterRecipe(rank=8, seed=20 + i, config=config)
            ),
        )
        for i, (name, config) in enumerate(KINDS.items())
    }
    torch.manual_seed(0)
    vera = get_peft_model(
        model_of(tiny_base).cpu(),
        VeraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in vera.named_parameters():
        if "vera_lambda_b" in name:
            parameter.data.normal_(0, 0.5)
    adapters["vera"] = tmp_path / "vera"
    vera.save_pretrained(adapters["vera"])
    registry = registry_of(tmp_path, tiny_base, adapters)
    world = make_gpu_world(registry=registry, start=False)
    for name in adapters:
        world.residency.load(registry.resolve(name))
    check_against_peft(world, tiny_base, adapters, [*adapters, "", *adapters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch_over_an_nf4_base(
    make_gpu_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    dtype: torch.dtype,
) -> None:
    """Log probabilities, not tokens: bitsandbytes' products depend a little on the batch."""
    pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    base = find_base(tiny_base)

    def load() -> Any:
        return load_model(base, quantization="nf4", dtype=dtype, device="cuda")

    world = make_gpu_world(model=load(), dtype=dtype)
    check_logprobs(world, tiny_adapters, load, 2e-2 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "fp8"])
def test_bfloat16_is_near_peft_in_bfloat16(
    make_gpu_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    storage: str,
) -> None:
    """Adapters kept in 8 bits round once more. They move these log probabilities by more than 1."""
    if storage == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    world = make_gpu_world(
        model=model_of(tiny_base, torch.bfloat16), dtype=torch.bfloat16, adapter_dtype=storage
    )
    tolerance = {"bfloat16": 0.3, "int8": 0.4, "fp8": 0.6}[storage]
    check_logprobs(
        world, tiny_adapters, lambda: model_of(tiny_base, torch.bfloat16).eval(), tolerance
    )


def test_a_shared_beginning_is_read_once(make_gpu_world: Callable[..., EngineWorld]) -> None:
    world = make_gpu_world()
    prompt = [3 + i % 100 for i in range(90)]
    answers = []
    for _ in range(2):
        tokens, finish, error = world.collector.wait(world.submit(prompt, "bravo"))
        assert error is None
        assert finish is not None
        answers.append((tokens, finish.cached_tokens))
    (first, cold), (second, warm) = answers
    assert (cold, first) == (0, second)
    assert warm >= 64


def test_preempted_answers_are_the_same(make_gpu_world: Callable[..., EngineWorld]) -> None:
    """Blocks for three answers of this length, of six that run at once."""
    block_bytes = 2 * 2 * 2 * 32 * 16 * torch.float32.itemsize
    answers = []
    for blocks in (60, 9):
        world = make_gpu_world(draft_rows=0, kv_memory_bytes=blocks * block_bytes, start=False)
        for name in RECIPES:
            world.residency.load(world.registry.resolve(name))
        ids = [
            world.submit(p, n, max_tokens=70, ignore_eos=True)
            for p, n in zip(prompts(6, longest=30), RECIPES, strict=True)
        ]
        world.engine.start()
        answers.append([world.collector.wait(request_id)[0] for request_id in ids])
        preempted = sum(step.num_preempted for step in world.collector.steps)
        assert (preempted > 0) == (blocks == 9)
    assert answers[0] == answers[1]


def test_loads_on_side_streams_disturb_no_running_answer(
    make_gpu_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Memory for two adapters of six: pages are written and given up while others decode."""
    page = make_gpu_world(start=False).lora.pool.page_bytes
    world = make_gpu_world(adapter_memory_bytes=4 * page)
    prompt = [5, 9, 30, 11]
    running = world.submit(prompt, "bravo", max_tokens=200, ignore_eos=True)
    world.collector.wait_started(running)
    for _ in range(3):
        for name in ("alpha", "charlie", "delta", "foxtrot"):
            tokens, _, error = world.collector.wait(world.submit(prompt, name))
            assert error is None
            assert tokens == peft_greedy(tiny_base, tiny_adapters[name], prompt, 12), name
    tokens, _, error = world.collector.wait(running)
    assert error is None
    expected = peft_greedy(tiny_base, tiny_adapters["bravo"], prompt, 200, ignore_eos=True)
    assert tokens == expected


def test_a_card_that_is_full_shrinks_the_batch(make_gpu_world: Callable[..., EngineWorld]) -> None:
    """The allocator's own error, for a tensor larger than the card, in steps of more than three rows."""
    world = make_gpu_world(start=False)
    asked = prompts(6)
    roomy = make_gpu_world()
    answers = [roomy.collector.wait(roomy.submit(p, ""))[0] for p in asked]
    runner, total = world.engine._runner, torch.cuda.get_device_properties(0).total_memory
    forward = runner.forward

    def crowded(batch: Batch) -> torch.Tensor | list[int]:
        if batch.num_decode > 3:
            torch.empty(2 * total, dtype=torch.uint8, device="cuda")
        return forward(batch)

    runner.forward = crowded  # type: ignore[method-assign]
    ids = [world.submit(prompt, "") for prompt in asked]
    world.engine.start()
    assert [world.collector.wait(request_id)[0] for request_id in ids] == answers
    assert world.engine._scheduler.max_batch <= 3


def test_a_seed_draws_the_same_tokens_as_on_a_cpu(
    make_gpu_world: Callable[..., EngineWorld], make_world: Callable[..., EngineWorld]
) -> None:
    """Alone and in company, with every way to filter."""
    options: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 1},
        {"temperature": 1.3, "top_k": 12, "seed": 2},
        {"temperature": 1.1, "top_p": 0.8, "seed": 3},
        {"temperature": 1.0, "min_p": 0.05, "seed": 4},
        {"temperature": 0.0},
    ]
    prompt = [5, 9, 30, 11]
    worlds = [make_gpu_world(), make_world(max_batch=6)]
    together, on_cpu = (
        [world.submit(prompt, "bravo", ignore_eos=True, **o) for o in options] for world in worlds
    )
    for request_id, other, chosen in zip(together, on_cpu, options, strict=True):
        tokens = worlds[0].collector.wait(request_id)[0]
        assert tokens == worlds[1].collector.wait(other)[0]
        alone = worlds[0].submit(prompt, "bravo", ignore_eos=True, **chosen)
        assert tokens == worlds[0].collector.wait(alone)[0]
