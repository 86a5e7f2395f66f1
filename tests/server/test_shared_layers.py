"""Layers that late adapters leave alone: read once for all of them and the base, and no bit differs."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import ConfigError
from lorary.server.adapters.host_copy import copy_in, copy_out
from lorary.server.engine.blocks import BLOCK
from lorary.server.engine.request import Pooling
from lorary.server.native import library as native
from tests.conftest import AdapterRecipe, build_adapters, build_llama, peft_greedy
from tests.server.conftest import EngineWorld, registry_of, worlds
from tests.server.test_blocks import prompt_of
from tests.server.test_dora import take_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lorary.registry import Registry
    from lorary.server.adapters.segments import PoolEntry

SHARED = 2
INVOCATION = [70, 71, 72]
RECIPES = {
    "judge": AdapterRecipe(rank=8, seed=81, config={"layers_to_transform": [2, 3]}),
    "critic": AdapterRecipe(
        rank=4,
        alpha=8,
        seed=82,
        modules=("q_proj", "v_proj", "down_proj"),
        config={"layers_to_transform": [3]},
    ),
    "whole": AdapterRecipe(rank=6, seed=83),
    # Late from its invocation on, and off before it.
    "caller": AdapterRecipe(
        rank=4,
        seed=84,
        config={"layers_to_transform": [2], "alora_invocation_tokens": INVOCATION},
    ),
    "scaled": AdapterRecipe(rank=4, seed=85, config={"layers_to_transform": [3], "use_dora": True}),
}
DOCUMENT = prompt_of(3 * BLOCK + 10, 86)
WHOLE_BLOCKS = 3 * BLOCK


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("late") / "base", seed=80, num_hidden_layers=4)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_adapters(base, tmp_path_factory.mktemp("late-adapters"), RECIPES)


@pytest.fixture(scope="module")
def registry(
    base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    return registry_of(tmp_path_factory.mktemp("late-registry"), base, adapters)


@pytest.fixture
def make(base: Path, registry: Registry) -> Iterator[Callable[..., EngineWorld]]:
    with worlds(base, registry) as made:
        yield made


def entry(world: EngineWorld, name: str) -> PoolEntry:
    """Return the place of an adapter, which stays loaded."""
    resolved = world.registry.resolve(name)
    world.residency.load(resolved, pin=True)
    lease = world.residency.acquire(resolved)
    found = lease.entry
    lease.release()
    assert found is not None
    return found


def ask(
    world: EngineWorld, name: str, prompt: list[int], **options: Any
) -> tuple[list[float], int, int]:
    """Return an answer's log probabilities, and how much of its prompt was not read, and only above."""
    request_id = world.submit(
        prompt, name, logprobs=0, ignore_eos=True, **{"max_tokens": 8, **options}
    )
    found = world.collector.logprobs(request_id)
    finish = world.collector.wait(request_id)[1]
    assert finish is not None
    return found, finish.cached_tokens, finish.cached_below_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefill_budget", [512, 40])
def test_what_one_has_read_another_begins_above_and_no_bit_differs(
    make: Callable[..., EngineWorld], dtype: torch.dtype, prefill_budget: int
) -> None:
    """Whoever comes first; a budget of 40 cuts prompts below, at and behind what is shared."""
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.supports_layers(dtype):
        pytest.skip("this CPU has no such product")
    cases = {
        "": [*DOCUMENT, 5],
        "judge": [*DOCUMENT, 6, 7],
        "critic": [*DOCUMENT, 8],
        "whole": [*DOCUMENT, 9],
        "scaled": [*DOCUMENT, 9],
        "caller": [*DOCUMENT[:40], *INVOCATION, *DOCUMENT[40:]],
    }
    cold = make(dtype=dtype, prefix_cache=False, draft_rows=0)
    expected = {name: ask(cold, name, prompt)[0] for name, prompt in cases.items()}
    assert len({tuple(found) for found in expected.values()}) == len(cases), (
        "adapters that do something"
    )
    late = (0, WHOLE_BLOCKS)
    for order, reused in (
        # The base's own block before the invocation is the caller's, too; what follows is another text.
        (["", "judge", "critic", "caller"], [(0, 0), late, late, (40, 0)]),
        (["judge", "critic", "", "judge"], [(0, 0), late, late, (len(cases["judge"]) - 1, 0)]),
        (["caller", "critic", "judge"], [(0, 0), (0, BLOCK), late]),
        # Who changes every layer, or scales columns, neither gives nor takes.
        (
            ["whole", "scaled", "judge", "whole"],
            [(0, 0), (0, 0), (0, 0), (len(cases["whole"]) - 1, 0)],
        ),
    ):
        world = make(dtype=dtype, draft_rows=0, prefill_budget=prefill_budget, shared_layers=SHARED)
        for name, counts in zip(order, reused, strict=True):
            found = ask(world, name, cases[name])
            assert found == (expected[name], *counts), (order, name)


def test_what_is_kept_is_what_is_read(make: Callable[..., EngineWorld]) -> None:
    """With what the cache keeps wiped out, the answer is another; else the test above proves nothing."""
    prompt = [*DOCUMENT, 6]
    world = make(draft_rows=0, shared_layers=SHARED)
    expected = ask(world, "judge", prompt)[0]
    other = make(draft_rows=0, shared_layers=SHARED)
    ask(other, "", [*DOCUMENT, 5])
    kept = other.engine._cache.residuals
    assert kept is not None
    kept.zero_()
    found = ask(other, "judge", prompt)
    assert found[2] == WHOLE_BLOCKS
    assert found[0] != expected


def test_tenants_do_not_share(make: Callable[..., EngineWorld]) -> None:
    world = make(draft_rows=0, shared_layers=SHARED)
    ask(world, "", [*DOCUMENT, 5], salt="acme")
    assert ask(world, "judge", [*DOCUMENT, 6])[1:] == (0, 0)
    assert ask(world, "judge", [*DOCUMENT, 6], salt="acme")[1:] == (0, WHOLE_BLOCKS)


def test_who_comes_at_once_waits_for_the_one_who_reads(make: Callable[..., EngineWorld]) -> None:
    world = make(start=False, draft_rows=0, shared_layers=SHARED)
    names = ["judge", "critic", "whole", ""]
    for name in names[:-1]:
        entry(world, name)
    ids = [world.submit([*DOCUMENT, 6], name) for name in names]
    world.engine.start()
    found = []
    for request_id in ids:
        finish = world.collector.wait(request_id)[1]
        assert finish is not None
        found.append(finish.cached_below_tokens)
    assert found == [0, WHOLE_BLOCKS, 0, WHOLE_BLOCKS]


def test_labels_are_scored_the_same(make: Callable[..., EngineWorld]) -> None:
    """The branches stand behind rows that begin above, and see them."""
    labels = ((9, 10), (11,), (12, 13, 14))

    def scores(world: EngineWorld, length: int) -> tuple[Any, int]:
        request_id = world.submit(prompt_of(length, length), "judge", labels=labels)
        finish = world.collector.wait(request_id)[1]
        assert finish is not None
        return finish.label_token_logprobs, finish.cached_below_tokens

    cold = make(prefix_cache=False, draft_rows=0)
    world = make(draft_rows=0, shared_layers=SHARED)
    # Of a prompt that ends with a block, the last is read: its logits begin the answer.
    for length, below in ((65, 64), (64, 32), (66, 64)):
        ask(world, "", prompt_of(80, length))
        assert scores(world, length) == (scores(cold, length)[0], below)


def test_vectors_are_the_same(make: Callable[..., EngineWorld]) -> None:
    """The last position's stands behind rows that begin above; the mean wants every row of all layers."""
    prompt = prompt_of(70, 93)
    cold = make(prefix_cache=False, draft_rows=0)
    world = make(draft_rows=0, shared_layers=SHARED)
    ask(world, "", prompt)
    for pooling, below in ((Pooling(kind="last"), 64), (Pooling(kind="mean"), 0)):
        finishes = [
            one.collector.wait(one.submit(prompt, "judge", pooling=pooling))[1]
            for one in (cold, world)
        ]
        expected, found = (finish for finish in finishes if finish is not None)
        assert found.embedding == expected.embedding
        assert (found.cached_tokens, found.cached_below_tokens) == (0, below)


def test_merged_weights_neither_give_nor_take_and_run_beside(
    make: Callable[..., EngineWorld],
) -> None:
    """A step of three passes: above, merged, and the rest."""
    prompt = [*DOCUMENT, 6]
    expected = ask(make(prefix_cache=False, draft_rows=0), "critic", prompt)[0]
    world = make(draft_rows=0, shared_layers=SHARED, merge_memory_bytes=64 << 20)
    assert ask(world, "judge", prompt, execution="merged")[1:] == (0, 0)
    assert ask(world, "", [*DOCUMENT, 5])[1:] == (0, 0)
    assert ask(world, "judge", [*DOCUMENT, 7], execution="merged")[1:] == (len(DOCUMENT), 0)
    entry(world, "critic")
    writing = world.submit([5, 6], "judge", execution="merged", max_tokens=200, ignore_eos=True)
    world.collector.wait_started(writing)
    assert ask(world, "critic", prompt) == (expected, 0, WHOLE_BLOCKS)
    world.engine.cancel(writing)


def test_churn_with_few_blocks_stays_exact(
    make: Callable[..., EngineWorld], base: Path, adapters: dict[str, Path]
) -> None:
    """Documents cut anywhere, all kinds of adapters and sums of them, cancellations, preemption, eviction."""
    block = make(start=False, shared_layers=SHARED).engine._cache.shape.block_bytes(torch.float32)
    limits: dict[str, Any] = {"max_batch": 4, "prefill_budget": 24, "draft_rows": 4}
    world = make(start=False, kv_memory_bytes=9 * block, shared_layers=SHARED, **limits)
    roomy = make(prefix_cache=False, **limits)
    # All at once, and none waits for its adapter: else a slow machine has room for each as it comes.
    for name in RECIPES:
        entry(world, name)
    source = random.Random(9)
    documents = [prompt_of(120, 92), prompt_of(110, 93)]
    sums: list[dict[str, float]] = [{"judge": 0.5, "critic": 0.5}, {"judge": 1.0, "whole": 0.5}]
    asked = []
    for i in range(36):
        name = source.choice(["judge", "judge", "critic", "critic", "", "whole", "caller", "sum"])
        weights = source.choice(sums) if name == "sum" else None
        prompt = source.choice(documents)[: source.randrange(40, 110)]
        prompt = prompt + (INVOCATION if name == "caller" else []) + prompt_of(3, 300 + i)
        call: dict[str, Any] = {
            "adapter": "" if name == "sum" else name,
            "weights": weights,
            "max_tokens": source.choice((3, 60)),
            "ignore_eos": True,
        }
        request_id = world.submit(prompt, **call)
        asked.append((request_id, prompt, call))
    world.engine.start()
    for request_id, _, _ in asked[5::8]:
        world.collector.wait_started(request_id)
        world.engine.cancel(request_id)
    num_below = 0
    for request_id, prompt, call in asked:
        tokens, finish, error = world.collector.wait(request_id)
        if error is not None:
            continue
        assert finish is not None
        num_below += finish.cached_below_tokens > 0
        assert tokens == roomy.collector.wait(roomy.submit(prompt, **call))[0], call
    assert not world.collector.errors
    assert num_below >= 5
    assert sum(step.num_preempted for step in world.collector.steps) > 0


def test_answers_are_pefts(
    make: Callable[..., EngineWorld], base: Path, adapters: dict[str, Path]
) -> None:
    world = make(shared_layers=SHARED, draft_rows=0)
    for name in ("", "judge", "critic"):
        prompt = [*DOCUMENT, 6]
        tokens = world.collector.wait(world.submit(prompt, name))[0]
        assert tokens == peft_greedy(base, adapters.get(name), prompt, 12), name


def test_the_pages_say_which_layers_an_adapter_leaves_alone(
    make: Callable[..., EngineWorld],
) -> None:
    world = make(start=False)
    found = {name: entry(world, name) for name in RECIPES}
    first = {name: found[name].first_layer for name in RECIPES}
    assert first == {"judge": 2, "critic": 3, "whole": 0, "caller": 2, "scaled": 0}
    pool = world.lora.pool
    pages = pool.try_allocate(found["judge"].rank)
    assert pages is not None
    back = copy_in(pool, pages, copy_out(pool, found["judge"]))
    assert back.first_layer == 2, "also when it comes back from host memory"
    for weights, least in (({"judge": 0.5, "critic": 0.5}, 2), ({"judge": 0.5, "whole": 0.5}, 0)):
        lease = world.compose(weights)
        assert lease.entry is not None
        assert lease.entry.first_layer == least
        lease.release()


def test_memory_is_planned_and_what_cannot_be_shared_is_refused(
    make: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [make(start=False, shared_layers=n).engine._cache.shape for n in (0, SHARED)]
    without, within = (shape.block_bytes(torch.float32) for shape in shapes)
    assert within - without == BLOCK * 64 * 4, (
        "a float32 for each position and number of the residual stream"
    )
    for options, says in (
        ({"shared_layers": 4}, "the base has 4 layers"),
        ({"shared_layers": 1, "prefix_cache": False}, "--no-prefix-cache"),
    ):
        with pytest.raises(ConfigError, match=says):
            make(start=False, **options)
    take_path("products", monkeypatch)
    with pytest.raises(ConfigError, match="operator by operator here: there is no native form of"):
        make(start=False, shared_layers=1)
