"""aLoRA in the mixed batch: PEFT's answers, and the base's keys and values before every invocation."""

from __future__ import annotations

import dataclasses
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import CorruptArtifact
from lorary.registry import BaseCard, Manifest, Registry
from lorary.registry.invocation import active_from
from lorary.server.adapters.loader import load_adapter
from lorary.server.engine.blocks import BLOCK
from tests.conftest import AdapterRecipe, build_adapter, build_adapters, peft_greedy
from tests.server.conftest import EngineWorld, registry_of, worlds
from tests.server.test_blocks import prompt_of
from tests.server.test_dora import take_path
from tests.server.test_verification import recorded, with_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

JUDGE, CRITIC = [70, 71, 72, 73, 74], [60, 61]


def alora(tokens: list[int]) -> dict[str, Any]:
    return {"alora_invocation_tokens": tokens}


RECIPES = {
    "judge": AdapterRecipe(rank=8, seed=41, config=alora(JUDGE)),
    "critic": AdapterRecipe(
        rank=4, alpha=8, seed=42, modules=("q_proj", "v_proj", "down_proj"), config=alora(CRITIC)
    ),
    "lora": AdapterRecipe(rank=12, seed=43),
}
DOCUMENT = prompt_of(3 * BLOCK + 10, 44)


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_adapters(tiny_base, tmp_path_factory.mktemp("alora"), RECIPES)


@pytest.fixture(scope="module")
def registry(
    tiny_base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    return registry_of(tmp_path_factory.mktemp("alora-registry"), tiny_base, adapters)


@pytest.fixture
def make(tiny_base: Path, registry: Registry) -> Iterator[Callable[..., EngineWorld]]:
    with worlds(tiny_base, registry) as made:
        yield made


ASKED: list[tuple[str, list[int]]] = [
    ("judge", [*prompt_of(20, 1), *JUDGE, 9, 10]),
    ("", prompt_of(24, 2)),
    ("critic", [*prompt_of(33, 3), *CRITIC]),
    ("lora", [*prompt_of(9, 4), *JUDGE]),
    # The last place counts; the one before is read by the base.
    ("judge", [*prompt_of(8, 5), *JUDGE, *prompt_of(8, 6), *JUDGE, 8]),
    # On from the first token.
    ("judge", [*JUDGE, 5, 6, 7]),
    # Another's invocation is nothing to it.
    ("critic", [*prompt_of(5, 7), *CRITIC, *JUDGE, 5]),
]


@pytest.fixture(scope="module")
def expected(tiny_base: Path, adapters: dict[str, Path]) -> list[list[int]]:
    return [peft_greedy(tiny_base, adapters.get(name), prompt, 12) for name, prompt in ASKED]


@pytest.mark.parametrize("prefill_budget", [512, 7])
@pytest.mark.parametrize("path", ["layers", "products", "torch"])
def test_mixed_batch_equals_peft_one_at_a_time(
    make: Callable[..., EngineWorld],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    prefill_budget: int,
) -> None:
    """With a budget of 7, chunks end before, in and behind invocations."""
    take_path(path, monkeypatch)
    world = make(prefill_budget=prefill_budget, start=False)
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name))
    ids = [world.submit(prompt, name) for name, prompt in ASKED]
    world.engine.start()
    for request_id, answer, (name, _) in zip(ids, expected, ASKED, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == answer, name or "base"
    assert max(s.num_distinct_adapters for s in world.collector.steps) >= 3


def test_the_oracle_can_tell(tiny_base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """An adapter that is on from the first token answers otherwise; else the test above proves nothing."""
    always = build_adapter(tiny_base, tmp_path / "always", AdapterRecipe(rank=8, seed=41))
    prompt = ASKED[0][1]
    answers = {
        tuple(peft_greedy(tiny_base, folder, prompt, 12))
        for folder in (adapters["judge"], always, None)
    }
    assert len(answers) == 3


def ask(world: EngineWorld, name: str, prompt: list[int]) -> tuple[list[float], int]:
    """Return the log probabilities of an answer, and how many tokens of its prompt were not read."""
    request_id = world.submit(prompt, name, logprobs=0, ignore_eos=True, max_tokens=8)
    found = world.collector.logprobs(request_id)
    finish = world.collector.wait(request_id)[1]
    assert finish is not None
    return found, finish.cached_tokens


def test_a_documents_keys_and_values_are_read_once_for_all(
    make: Callable[..., EngineWorld],
) -> None:
    """Base first or a judge first: what stands before an invocation is shared, and no bit differs."""
    judged, criticised = [*DOCUMENT, 5, *JUDGE, 6], [*DOCUMENT, 5, *CRITIC, 7]
    later = [*judged, 30, 31, *JUDGE, 6]
    cold = make(prefix_cache=False, draft_rows=0)
    cases = [("", [*DOCUMENT, 5, 8]), ("judge", judged), ("critic", criticised), ("judge", later)]
    expected = {(name, len(prompt)): ask(cold, name, prompt)[0] for name, prompt in cases}
    whole = len(DOCUMENT) + 1
    for order, reused in (
        ([0, 1, 2, 3], [0, whole, whole, whole]),
        ([1, 0, 2, 1, 3], [0, whole, whole, len(judged) - 1, whole]),
        ([2, 3, 1], [0, whole, whole]),
    ):
        world = make(draft_rows=0)
        for i, count in zip(order, reused, strict=True):
            name, prompt = cases[i]
            assert ask(world, name, prompt) == (expected[name, len(prompt)], count), (order, name)
        # A plain LoRA has read nothing that they may use, and the other way round.
        assert ask(world, "lora", judged)[1] == 0


def test_who_comes_at_once_waits_for_the_one_who_reads(
    make: Callable[..., EngineWorld], tiny_base: Path, adapters: dict[str, Path]
) -> None:
    world = make(start=False)
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name), pin=True)
    asked = [("judge", [*DOCUMENT, *JUDGE]), ("critic", [*DOCUMENT, *CRITIC]), ("", [*DOCUMENT, 9])]
    ids = [world.submit(prompt, name) for name, prompt in asked]
    world.engine.start()
    cached = []
    for request_id, (name, prompt) in zip(ids, asked, strict=True):
        tokens, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert tokens == peft_greedy(tiny_base, adapters.get(name), prompt, 12)
        cached.append((finish.cached_tokens, finish.cached_base_tokens))
    assert cached[0] == (0, 0)
    assert cached[1] == (len(DOCUMENT), len(DOCUMENT))
    assert cached[2] == (len(DOCUMENT), 0), "of the base's own prompts there is nothing before"
    read = sum(step.num_prefill_tokens for step in world.collector.steps)
    assert read == len(DOCUMENT) + len(JUDGE) + len(CRITIC) + 1


def test_rows_beside_it_keep_their_bits_and_so_does_it_in_any_company(
    make: Callable[..., EngineWorld],
) -> None:
    def run(names: list[int], **options: Any) -> list[list[float]]:
        world = make(start=False, draft_rows=0, prefix_cache=False, **options)
        for name in RECIPES:
            world.residency.load(world.registry.resolve(name))
        ids = [world.submit(ASKED[i][1], ASKED[i][0], logprobs=0, ignore_eos=True) for i in names]
        world.engine.start()
        return [world.collector.logprobs(i) for i in ids]

    # Base and LoRA beside aLoRAs, and beside each other.
    beside = run([1, 3, 0, 2])
    assert beside[:2] == run([1, 3])
    # Chunks that end in the invocation, and other neighbours.
    assert beside[2] == run([4, 0, 6], prefill_budget=11)[1]
    assert beside[2] == run([0])[0]


def test_churn_over_related_documents_stays_exact(
    make: Callable[..., EngineWorld], tiny_base: Path, adapters: dict[str, Path]
) -> None:
    """Two documents cut anywhere, all kinds of adapters, turns that grow, cancellations, few blocks."""
    block = make(start=False).engine._cache.shape.block_bytes(torch.float32)
    # All at once: who shares what with whom is then the same on any machine.
    world = make(max_batch=3, prefill_budget=24, kv_memory_bytes=14 * block, start=False)
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name))
    source = random.Random(7)
    documents = [prompt_of(80, 60), prompt_of(70, 61)]
    asked = []
    for i in range(20):
        name = source.choice(["judge", "judge", "critic", "", "lora"])
        # Now and then two invocations in one prompt, or the answer of a turn before.
        tail = source.choice([[], JUDGE, CRITIC]) + prompt_of(source.randrange(6), 200 + i)
        config = RECIPES[name].config if name else {}
        tail += [*config.get("alora_invocation_tokens", []), 9]
        prompt = source.choice(documents)[: source.randrange(28, 70)] + tail
        request_id = world.submit(prompt, name, max_tokens=5)
        asked.append((request_id, name, prompt))
        if i % 9 == 4:
            world.engine.cancel(request_id)
    world.engine.start()
    num_cached = num_of_base = 0
    for request_id, name, prompt in asked:
        tokens, finish, error = world.collector.wait(request_id)
        if error is not None:
            continue
        assert finish is not None
        num_cached += finish.cached_tokens > 0
        num_of_base += finish.cached_base_tokens > 0
        assert tokens == peft_greedy(tiny_base, adapters.get(name), prompt, 5), name or "base"
    assert num_of_base >= 4
    assert num_cached > num_of_base


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_answers_are_the_same(
    make: Callable[..., EngineWorld], prefix_cache: bool
) -> None:
    """Whoever loses its place reads again what it has: the base up to the invocation, then itself."""
    asked = [
        (name, [*prompt_of(14 + i, 50 + i), *RECIPES[name].config["alora_invocation_tokens"]])
        for i, name in enumerate(["judge", "critic"] * 3)
    ]

    def answers(world: EngineWorld) -> list[list[int]]:
        # All at once: one after the other they would find room.
        for name in ("judge", "critic"):
            world.residency.load(world.registry.resolve(name))
        ids = [world.submit(p, name, max_tokens=90, ignore_eos=True) for name, p in asked]
        world.engine.start()
        return [world.collector.wait(i)[0] for i in ids]

    roomy = make(prefix_cache=prefix_cache, start=False)
    memory = 8 * roomy.engine._cache.shape.block_bytes(torch.float32)
    tight = make(prefix_cache=prefix_cache, kv_memory_bytes=memory, start=False)
    assert answers(tight) == answers(roomy)
    assert sum(step.num_preempted for step in tight.collector.steps) > 0


def test_labels_are_scored_by_the_adapter(
    make: Callable[..., EngineWorld], tiny_base: Path, adapters: dict[str, Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prompt, labels = [*DOCUMENT[:40], *JUDGE], ((5, 6, 7), (8,), (5, 9))
    world = make(prefill_budget=16)
    finish = world.collector.wait(world.submit(prompt, "judge", labels=labels))[1]
    assert finish is not None
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapters["judge"])).eval()
    for label, score in zip(labels, finish.label_logprobs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *label]])).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)
        expected = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(label))
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "invocation", "expected"),
    [
        ([1, 2, 3], [], 0),
        ([1, 2, 3], [1, 2], 0),
        ([1, 2, 1, 2, 3], [1, 2], 2),
        ([1, 1, 1], [1, 1], 1),
        ([1, 2, 1], [1, 2], 0),
        ([2, 1, 2], [1, 2, 3], None),
        ([], [1], None),
    ],
)
def test_the_last_place_of_the_invocation_counts(
    prompt: list[int], invocation: list[int], expected: int | None
) -> None:
    assert active_from(prompt, invocation) == expected


@pytest.mark.parametrize("named", [(), (1, 2)])
def test_a_version_whose_manifest_names_another_invocation_is_not_loaded(
    registry: Registry, tiny_base: Path, tmp_path: Path, named: tuple[int, ...]
) -> None:
    """Calls are looked through by the manifest: the adapter would be on where the base must be."""
    card = BaseCard.from_folder(tiny_base)
    modules = frozenset(card.modules)
    folder = tmp_path / "judge"
    shutil.copytree(registry.fetch(registry.resolve("judge")), folder)
    assert load_adapter(folder, card, modules=modules, max_rank=64).rank == 8
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    method = dataclasses.replace(manifest.method, invocation_tokens=named)
    (folder / "manifest.json").chmod(0o644)
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, method=method).to_json())
    with pytest.raises(CorruptArtifact, match="its manifest names"):
        load_adapter(folder, card, modules=modules, max_rank=64)


def test_golden_probes_are_replayed_from_the_invocation_on(
    make: Callable[..., EngineWorld], tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    probes = recorded(tiny_base, adapters["judge"], suffix=JUDGE)
    card = BaseCard.from_folder(tiny_base)
    store = Registry.open(tmp_path / "store", create=True)
    store.push(with_probes(adapters["judge"], tmp_path / "sound", probes), "sound", base=card)
    bare = recorded(tiny_base, adapters["critic"])
    store.push(with_probes(adapters["critic"], tmp_path / "bare", bare), "bare", base=card)
    world = make(registry=store, verify="enforce")
    world.residency.load(store.resolve("sound"), timeout_s=60)
    with pytest.raises(CorruptArtifact, match="lacks the adapter's invocation"):
        world.residency.load(store.resolve("bare"), timeout_s=60)
