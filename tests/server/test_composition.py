"""Several adapters at once in a mixed batch, against PEFT's ``add_weighted_adapter``; and their leases."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from tests.conftest import RECIPES, wait_until
from tests.server.test_engine_oracle import prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lorary.server.adapters.composed import ComposedLease
    from tests.server.conftest import EngineWorld

NUM_TOKENS = 10

# PEFT's sum takes rsLoRA from the first and knows no patterns of ranks: echo is never the first, and
# foxtrot is elsewhere.
COMPOSITIONS: list[dict[str, float]] = [
    {"alpha": 0.7, "bravo": 0.3},
    {"bravo": 1.0, "echo": -0.5, "delta": 2.0},
    {"charlie": 0.25, "alpha": 0.25, "bravo": 0.25, "echo": 0.25},
    {"bravo": 0.5},
]


def peft_composed(
    base: Path,
    adapters: dict[str, Path],
    weights: Mapping[str, float],
    asked: Sequence[Sequence[int]],
) -> list[list[tuple[int, float]]]:
    """Return greedy tokens and their log probabilities of each prompt, one at a time, in float32."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = list(weights)
    for name in names:
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapters[name]), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(adapters[name]), adapter_name=name)
    if len(names) == 1:  # for a single one PEFT ignores "cat" and splits the weight by square roots
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling[names[0]] *= weights[names[0]]
    else:
        model.add_weighted_adapter(names, list(weights.values()), "sum", combination_type="cat")
        model.set_adapter("sum")
    model.eval()
    answers = []
    for prompt in asked:
        ids, said = list(prompt), []
        for _ in range(NUM_TOKENS):
            with torch.inference_mode():
                row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
            ids.append(int(row.argmax()))
            said.append((ids[-1], float(row[ids[-1]])))
        answers.append(said)
    return answers


@pytest.mark.parametrize("prefill_budget", [512, 7])
def test_compositions_equal_peft_beside_single_adapters_and_the_base(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    prefill_budget: int,
) -> None:
    world = make_world(start=False, prefill_budget=prefill_budget)
    asked = prompts(2, longest=30)
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 0}
    beside = [world.submit(asked[0], name, **options) for name in ("", "alpha", "echo", "foxtrot")]
    composed = [[world.submit(p, weights=w, **options) for p in asked] for w in COMPOSITIONS]
    world.engine.start()
    for weights, ids in zip(COMPOSITIONS, composed, strict=True):
        expected = peft_composed(tiny_base, tiny_adapters, weights, asked)
        for request_id, said in zip(ids, expected, strict=True):
            tokens, _, error = world.collector.wait(request_id)
            assert error is None
            assert tokens == [token for token, _ in said], weights
            got = world.collector.logprobs(request_id)
            assert got == pytest.approx([logprob for _, logprob in said], abs=2e-4), weights
    alone = make_world()
    for name, request_id in zip(("", "alpha", "echo", "foxtrot"), beside, strict=True):
        assert (
            world.collector.wait(request_id)[0]
            == alone.collector.wait(alone.submit(asked[0], name, **options))[0]
        ), name or "base"
    assert world.compositions.num_in_use == 0
    assert all(r.num_holders == 0 for r in world.residency.snapshot())


def test_a_prefix_is_shared_within_a_composition_and_with_no_other(
    make_world: Callable[..., EngineWorld],
) -> None:
    """Keys and values depend on the weights: 0.7 of an adapter must not read what 0.3 of it left."""
    world = make_world()
    prompt = [5, 6, 7, 8] * 20

    def cached(weights: dict[str, float]) -> int:
        _, finish, _ = world.collector.wait(world.submit(prompt, weights=weights, max_tokens=2))
        assert finish is not None
        return finish.cached_tokens

    assert cached({"alpha": 0.7, "bravo": 0.3}) == 0
    assert cached({"bravo": 0.3, "alpha": 0.7}) >= 64
    assert cached({"alpha": 0.3, "bravo": 0.7}) == 0
    assert cached({"alpha": 0.7}) == 0


def test_compositions_that_want_each_others_memory_all_end(
    make_world: Callable[..., EngineWorld],
) -> None:
    """Three pages, and everybody wants two or three of them at once: nobody may hold one and wait."""
    page = make_world(start=False).lora.pool.page_bytes
    wanted: list[dict[str, float]] = [
        {"alpha": 0.5, "bravo": 0.5},
        {"delta": 1.5, "charlie": 0.5},
        {"bravo": 0.7, "delta": -0.2},
        {"alpha": 0.5},
        {"foxtrot": 1.0, "alpha": 0.1},
    ] * 4
    options: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
    asked = prompts(len(wanted), longest=10)
    roomy, small = make_world(), make_world(adapter_memory_bytes=page * 3, max_batch=3)
    expected = [roomy.submit(p, weights=w, **options) for p, w in zip(asked, wanted, strict=True)]
    got = [small.submit(p, weights=w, **options) for p, w in zip(asked, wanted, strict=True)]
    for request_id, other in zip(got, expected, strict=True):
        assert small.collector.wait(request_id)[0] == roomy.collector.wait(other)[0]
    assert small.compositions.num_in_use == 0


def becomes_ready(lease: ComposedLease) -> bool:
    """Look at a lease as the engine does, until it is ready."""
    end = time.monotonic() + 30
    while not lease.is_ready:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_what_arrives_for_one_that_waits_behind_is_free_for_the_first(
    make_world: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(start=False)
    load, may_come = world.residency._load, threading.Event()
    pairs = [("alpha", "bravo"), ("delta", "foxtrot")]
    # Parts are asked for by digest: the first of each pair comes at once, the second on a word.
    parts = [sorted(map(world.registry.resolve, pair), key=lambda r: r.digest) for pair in pairs]
    late = {second.digest for _, second in parts}

    def loaded(resolved: Any) -> Any:
        assert resolved.digest not in late or may_come.wait(60)
        return load(resolved)

    monkeypatch.setattr(world.residency, "_load", loaded)
    first, behind = (world.compose(dict.fromkeys(pair, 0.5)) for pair in pairs)
    for early, _ in parts:
        world.residency.load(early)
    assert not behind.is_ready
    assert not first.is_ready
    holders = {r.digest: r.num_holders for r in world.residency.snapshot()}
    assert [holders[early.digest] for early, _ in parts] == [0, 0]
    may_come.set()
    assert becomes_ready(first)
    first.release()
    assert becomes_ready(behind)
    behind.release()
    assert all(r.num_holders == 0 for r in world.residency.snapshot())


def test_parts_that_leave_after_one_answer_come_back_for_the_next(
    make_world: Callable[..., EngineWorld],
) -> None:
    world = make_world(start=False)
    first, second = (world.compose({"alpha": 0.5, "bravo": 0.5}) for _ in range(2))
    assert becomes_ready(first)
    first.release()
    for name in ("alpha", "bravo"):
        assert world.residency.demote(world.registry.resolve(name).digest)
    assert becomes_ready(second)
    second.release()
    assert world.compositions.num_in_use == 0


def test_a_part_that_cannot_be_loaded_fails_the_call_and_leaves_nothing_held(
    make_world: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(failed_load_ttl_s=3600)
    bad = world.registry.resolve("bravo").digest
    load, may_fail = world.residency._load, threading.Event()

    def loaded(resolved: Any) -> Any:
        if resolved.digest == bad:
            assert may_fail.wait(60)
            raise CorruptArtifact("bravo's bytes differ")
        return load(resolved)

    monkeypatch.setattr(world.residency, "_load", loaded)
    lease = world.compose({"alpha": 0.5, "bravo": 0.5})
    second = world.submit([5, 6, 7], weights={"alpha": 0.5, "bravo": 0.5})
    world.residency.load(world.registry.resolve("alpha"))
    # The part that is there is not held while the other one is on its way, but for the moments in which
    # the engine looks.
    assert not lease.is_ready
    assert lease.error is None
    wait_until(
        lambda: [r.num_holders for r in world.residency.snapshot() if r.name == "alpha"] == [0]
    )
    may_fail.set()
    assert isinstance(world.collector.wait(second)[2], CorruptArtifact)
    assert not lease.is_ready
    assert isinstance(lease.error, CorruptArtifact)
    lease.release()
    lease.release()
    # Remembered: asked for again it fails at once, and holds nothing.
    with pytest.raises(CorruptArtifact):
        world.compose({"bravo": 1.0, "alpha": 0.2})
    assert world.compositions.num_in_use == 0
    assert all(r.num_holders == 0 for r in world.residency.snapshot())


def test_what_does_not_fit_together_is_refused(make_world: Callable[..., EngineWorld]) -> None:
    page = make_world(start=False).lora.pool.page_bytes
    world = make_world(adapter_memory_bytes=page * 3, start=False)
    world.residency.load(world.registry.resolve("delta"), pin=True)
    ranks = {world.registry.resolve(n).digest: RECIPES[n].rank for n in ("alpha", "bravo", "delta")}
    world.residency.check_fits(ranks)  # the pinned one is among them
    del ranks[world.registry.resolve("delta").digest]
    ranks[world.registry.resolve("charlie").digest] = 16
    with pytest.raises(IncompatibleAdapter, match="pinned by others"):
        world.residency.check_fits(ranks)
