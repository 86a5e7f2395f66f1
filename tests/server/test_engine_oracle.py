"""The engine against its oracle: PEFT in float32, one request at a time, greedy."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.server.native import library as native
from tests.conftest import RECIPES, build_llama, peft_greedy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    source = random.Random(count)
    return [
        [source.randrange(3, 118) for _ in range(source.randrange(1, longest))]
        for _ in range(count)
    ]


def oracle(
    base: Path, adapters: dict[str, Path], name: str, prompt: list[int], tokens: int
) -> list[int]:
    return peft_greedy(base, adapters.get(name), prompt, tokens)


@pytest.mark.parametrize("prefill_budget", [512, 7])
def test_mixed_batch_equals_peft_one_at_a_time(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    prefill_budget: int,
) -> None:
    """Ranks 1 to 33, rsLoRA, rank patterns, partial targets, and base rows, all in one batch.

    With a budget of 7 prompts are read in chunks while others decode.
    """
    # Begun when all are there: else the first may have ended before the last is loaded.
    world = make_world(prefill_budget=prefill_budget, max_batch=6, start=False)
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name))
    names = [*RECIPES, "", *RECIPES, ""]
    asked = prompts(len(names))
    ids = [world.submit(p, n) for p, n in zip(asked, names, strict=True)]
    world.engine.start()
    for request_id, name, prompt in zip(ids, names, asked, strict=True):
        tokens, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert tokens == oracle(tiny_base, tiny_adapters, name, prompt, 12), name or "base"
    assert max(s.num_distinct_adapters for s in world.collector.steps) >= 3


def test_adapters_change_the_answer(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    """The oracle itself can tell adapters apart; else the tests above would prove nothing."""
    prompt = prompts(1)[0]
    answers = {tuple(oracle(tiny_base, tiny_adapters, name, prompt, 12)) for name in ["", *RECIPES]}
    assert len(answers) >= 6


def test_base_rows_are_bitwise_the_same_with_adapters_beside_them(
    make_world: Callable[..., EngineWorld],
) -> None:
    """Log probabilities of base rows: equal bits whether the other rows have adapters or not."""
    asked = prompts(4, longest=10)

    def run(adapters: list[str]) -> list[list[float]]:
        # Everyone is there before the first step: the two runs differ in the adapters alone.
        world = make_world(start=False)
        for name in set(adapters) - {""}:
            world.residency.load(world.registry.resolve(name), pin=True)
        ids = [
            world.submit(p, a, logprobs=0, ignore_eos=True)
            for p, a in zip(asked, adapters, strict=True)
        ]
        world.engine.start()
        return [world.collector.logprobs(i) for i in ids][:2]

    assert run(["", "", "", ""]) == run(["", "", "alpha", "echo"])


@pytest.mark.parametrize("int8", [False, True])
def test_an_answers_bits_do_not_depend_on_its_company(
    make_world: Callable[..., EngineWorld], int8: bool
) -> None:
    """Alone, and among others that come and go, with prompts cut elsewhere: equal log probabilities."""
    prompt = prompts(3, longest=60)[0] * 2
    options: dict[str, Any] = {"logprobs": 0, "ignore_eos": True, "max_tokens": 24}

    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if int8 and not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    alone = make_world(draft_rows=0, prefix_cache=False, int8=int8)
    expected = alone.collector.logprobs(alone.submit(prompt, "echo", **options))
    world = make_world(draft_rows=0, prefix_cache=False, prefill_budget=11, int8=int8)
    names = ["alpha", "", "echo", "bravo", "echo", "foxtrot"]
    for i, (name, other) in enumerate(zip(names, prompts(6), strict=True)):
        world.submit(other, name, max_tokens=3 + 4 * i, ignore_eos=True)
    assert world.collector.logprobs(world.submit(prompt, "echo", **options)) == expected


def test_churn_over_few_pages_stays_exact(
    make_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Adapters come and go while others decode: the class of bug where slots rotate under a stream.

    The pool holds about half of the adapters; every stream must equal its solo run.
    """
    probe = make_world()
    page = probe.lora.pool.page_bytes
    world = make_world(adapter_memory_bytes=page * 7, max_batch=4)
    names = [random.Random(5).choice([*RECIPES, ""]) for _ in range(30)]
    asked = prompts(30, longest=12)
    ids = [world.submit(p, n) for p, n in zip(asked, names, strict=True)]
    for request_id, name, prompt in zip(ids, names, asked, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == oracle(tiny_base, tiny_adapters, name, prompt, 12)
    assert len(world.residency.snapshot()) < len(RECIPES)


@pytest.mark.parametrize("labels", [((5,), (9,)), ((5, 6, 7), (5, 8), (9,), (10, 11))])
@pytest.mark.parametrize("prefill_budget", [512, 3])
def test_labels_are_scored_as_if_each_were_alone(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    labels: tuple[tuple[int, ...], ...],
    prefill_budget: int,
) -> None:
    """One prefill with all labels side by side equals PEFT on prompt + label, label by label."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    world = make_world(prefill_budget=prefill_budget)
    prompt = prompts(1)[0]
    other = world.submit([3, 4, 5], "alpha", max_tokens=20, ignore_eos=True)
    request_id = world.submit(prompt, "bravo", labels=labels)
    _, finish, error = world.collector.wait(request_id)
    assert error is None
    assert finish is not None
    assert finish.reason == "scored"
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tiny_adapters["bravo"])).eval()
    for label, score in zip(labels, finish.label_logprobs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *label]])).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)
        expected = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(label))
        assert score == pytest.approx(expected, abs=1e-4)
    world.collector.wait(other)


def test_grouped_heads_biases_and_untied_head(
    make_world: Callable[..., EngineWorld], tmp_path: Path
) -> None:
    """Another shape of base: biases in attention and MLP, an untied head, one key/value head."""
    base = build_llama(
        tmp_path / "b",
        seed=3,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        num_key_value_heads=1,
    )
    world = make_world(base)
    asked = prompts(5)
    ids = [world.submit(p) for p in asked]
    for request_id, prompt in zip(ids, asked, strict=True):
        assert world.collector.wait(request_id)[0] == peft_greedy(base, None, prompt, 12)


def test_answer_ends_at_the_context(make_world: Callable[..., EngineWorld]) -> None:
    world = make_world(max_context=16)
    request_id = world.submit([5] * 10, max_tokens=100, ignore_eos=True)
    tokens, finish, _ = world.collector.wait(request_id)
    assert finish is not None
    assert (len(tokens), finish.reason) == (6, "length")
