"""Ranks 1 to 128 and the bare base in one batch, over few pages, in every way the engine can work.

Every case answers the same traffic: prompts that begin alike, so that the prefix cache is hit where
it is on; more adapters than the pool holds, so that pages change hands under running streams.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.server.native import library as native
from tests.conftest import AdapterRecipe, build_adapter, peft_greedy, wait_until
from tests.server.conftest import EngineWorld, registry_of
from tests.server.test_dora import take_path
from tests.server.test_engine_quantized import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorary.registry import Registry

RANKS = (1, 2, 8, 9, 64, 128)
# Rank rows come in pages of 8 on a CPU: 29 pages for all of them.
NUM_PAGES = 20
NUM_TOKENS = 6
BASE = ""


@dataclass(frozen=True)
class Asked:
    """One request, and what PEFT in float32 answers when it is alone."""

    adapter: str
    prompt: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Ranked:
    """Adapters of many ranks, by name, in a registry of their own, and traffic over them."""

    base: Path
    registry: Registry
    folders: dict[str, Path]
    traffic: tuple[Asked, ...]


@pytest.fixture(scope="module")
def ranked(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    root = tmp_path_factory.mktemp("ranked")
    folders = {}
    for rank in RANKS:
        # Scaled so that all of them move the answers alike.
        recipe = AdapterRecipe(rank=rank, alpha=6 * rank**0.5, seed=rank)
        name = f"rank-{rank}"
        folders[name] = build_adapter(tiny_base, root / name, recipe)
    source = random.Random(11)
    stems = [[source.randrange(3, 118) for _ in range(50)] for _ in range(2)]
    traffic = []
    for round_number in range(2):
        for i, name in enumerate((*folders, BASE)):
            # Two in a row that begin alike for the same adapter.
            for _ in range(2):
                stem = stems[(i + round_number) % 2]
                tail = [source.randrange(3, 118) for _ in range(source.randrange(1, 6))]
                prompt = tuple(stem[: source.randrange(35, 50)] + tail)
                expected = peft_greedy(
                    tiny_base, folders.get(name), prompt, NUM_TOKENS, ignore_eos=True
                )
                traffic.append(Asked(name, prompt, tuple(expected)))
    registry = registry_of(root, tiny_base, folders)
    return Ranked(tiny_base, registry, folders, tuple(traffic))


@pytest.fixture
def ways(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[EngineWorld]]:
    """The worlds of a test, closed at its end; ``operators`` keeps layers from running natively."""
    take_path("products" if request.param == "operators" else "layers", monkeypatch)
    worlds: list[EngineWorld] = []
    yield worlds
    for world in worlds:
        world.close()


def start(worlds: list[EngineWorld], ranked: Ranked, **options: Any) -> EngineWorld:
    """Return a world whose pool holds about two thirds of the adapters; ``ask`` starts its engine."""
    probe = EngineWorld(ranked.base, ranked.registry, start=False)
    page = probe.lora.pool.page_bytes
    probe.close()
    world = EngineWorld(
        ranked.base,
        ranked.registry,
        adapter_memory_bytes=page * NUM_PAGES,
        max_batch=4,
        start=False,
        **options,
    )
    worlds.append(world)
    return world


def ask(world: EngineWorld, ranked: Ranked) -> list[str]:
    """Send the whole traffic at once; return its ids."""
    ids = [
        world.submit(a.prompt, a.adapter, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
        for a in ranked.traffic
    ]
    # The engine answers faster than adapters come: it begins when there are some to be mixed.
    wait_until(
        lambda: sum(a.state == "resident" for a in world.residency.snapshot()) >= 2, seconds=60
    )
    world.engine.start()
    return ids


def check_work(world: EngineWorld, ids: list[str], *, prefix_cache: bool) -> None:
    """The traffic did what it is for: adapters shared steps, pages changed hands, prompts were cut."""
    finishes = [world.collector.wait(i)[1] for i in ids]
    assert (sum(f.cached_tokens for f in finishes if f is not None) > 0) is prefix_cache
    assert max(s.num_distinct_adapters for s in world.collector.steps) >= 2
    assert len(world.residency.snapshot()) < len(RANKS)


def test_ranks_change_the_answer(ranked: Ranked) -> None:
    """Else the tests below would prove nothing."""
    prompt = ranked.traffic[0].prompt
    answers = {
        tuple(peft_greedy(ranked.base, folder, prompt, NUM_TOKENS, ignore_eos=True))
        for folder in (None, *ranked.folders.values())
    }
    assert len(answers) >= len(RANKS)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prefill_budget", [512, 7])
@pytest.mark.parametrize("ways", ["layers", "operators"], indirect=True)
def test_dense_base_equals_peft(
    ways: list[EngineWorld], ranked: Ranked, prefill_budget: int, prefix_cache: bool
) -> None:
    world = start(ways, ranked, prefill_budget=prefill_budget, prefix_cache=prefix_cache)
    ids = ask(world, ranked)
    for request_id, asked in zip(ids, ranked.traffic, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tuple(tokens) == asked.expected, asked.adapter or "base"
    check_work(world, ids, prefix_cache=prefix_cache)


class Oracle:
    """One PEFT model with every adapter."""

    def __init__(self, model: Any, folders: dict[str, Path]) -> None:
        from peft import PeftModel

        (first, folder), *rest = folders.items()
        self._model: Any = PeftModel.from_pretrained(model, str(folder), adapter_name=first).eval()
        for name, other in rest:
            self._model.load_adapter(str(other), name)

    def logprobs(self, adapter: str, prompt: tuple[int, ...], tokens: list[int]) -> list[float]:
        """Log probabilities of the tokens behind the prompt."""
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            if adapter:
                self._model.set_adapter(adapter)
                logits = self._model(ids).logits[0]
            else:
                with self._model.disable_adapter():
                    logits = self._model(ids).logits[0]
        logprobs = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 :]
        return [float(logprobs[i, token]) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prefill_budget", [512, 7])
@pytest.mark.parametrize(
    ("ways", "quantization"),
    [("layers", "native int8"), ("operators", "native int8"), ("operators", "nf4")],
    indirect=["ways"],
)
def test_quantized_base_is_near_peft(
    ways: list[EngineWorld],
    ranked: Ranked,
    quantization: str,
    prefill_budget: int,
    prefix_cache: bool,
) -> None:
    """Log probabilities, within what rounding to few bits may move them (``TOLERANCE``)."""
    options: dict[str, Any] = {"prefill_budget": prefill_budget, "prefix_cache": prefix_cache}
    base = find_base(ranked.base)

    def load(kind: Any) -> Any:
        return load_model(base, quantization=kind, dtype=torch.float32, device="cpu")

    if quantization == "nf4":
        world = start(ways, ranked, model=load("nf4"), **options)
        oracle = Oracle(load("nf4"), ranked.folders)
    else:
        kernels = native.load()
        assert not isinstance(kernels, str), kernels
        if not kernels.has_int8:
            pytest.skip("this CPU has no product with 8-bit weights")
        world = start(ways, ranked, int8=True, **options)
        oracle = Oracle(load("none"), ranked.folders)
    ids = ask(world, ranked)
    tolerance = TOLERANCE[quantization]
    num_telling = 0
    for request_id, asked in zip(ids, ranked.traffic, strict=True):
        found = world.collector.logprobs(request_id)
        tokens = world.collector.wait(request_id)[0]
        expected = oracle.logprobs(asked.adapter, asked.prompt, tokens)
        assert found == pytest.approx(expected, abs=tolerance), asked.adapter
        without = oracle.logprobs(BASE, asked.prompt, tokens)
        num_telling += found != pytest.approx(without, abs=2 * tolerance)
    # The tolerance is far from hiding an adapter that is not there.
    assert num_telling >= 0.9 * sum(asked.adapter != BASE for asked in ranked.traffic)
    check_work(world, ids, prefix_cache=prefix_cache)
