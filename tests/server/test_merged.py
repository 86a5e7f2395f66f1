"""One adapter folded into a copy of the base's weights: PEFT's merged model, and nobody else notices."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.errors import Cancelled, NotMergeable, Unavailable
from lorary.registry import BaseCard, Registry
from lorary.server.adapters.merging import LEAST_TOKENS
from lorary.server.engine.request import Pooling
from lorary.server.native import library as native
from tests.conftest import AdapterRecipe, build_adapter, build_llama, greedy, write_manifest
from tests.server.conftest import EngineWorld, registry_of, worlds
from tests.server.test_dora import take_path
from tests.server.test_engine_oracle import prompts
from tests.server.test_families import build as build_family
from tests.server.test_residency import wait_for
from tests.server.test_verification import recorded, with_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lorary.server.adapters.merging import Merging

MEMORY = 64 << 20
BITS: dict[str, Any] = {"prefix_cache": False, "draft_rows": 0}
TENSORS = "adapter_model.safetensors"


def merged_model(base: Path, adapter: Path) -> Any:
    """PEFT's own merge, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def answer(world: EngineWorld, request_id: str) -> tuple[list[int], bool]:
    """Return an answer's tokens, and whether its receipt will say that it was merged."""
    tokens, finish, error = world.collector.wait(request_id)
    assert error is None, error
    assert finish is not None
    return tokens, finish.is_merged


def merging_of(world: EngineWorld) -> Merging:
    assert world.merging is not None
    return world.merging


@pytest.fixture(scope="module")
def dora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of q/k/v and gate/up only a part, and magnitudes far from the norms that they began as."""
    recipe = AdapterRecipe(
        rank=9,
        alpha=27,
        seed=33,
        modules=("q_proj", "o_proj", "up_proj"),
        config={"use_dora": True, "use_rslora": True},
    )
    folder = tmp_path_factory.mktemp("merged") / "dora"
    write_manifest(tiny_base, build_adapter(tiny_base, folder, recipe))
    tensors = load_file(folder / TENSORS)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        if "magnitude" in key:
            tensors[key] = tensor * (0.6 + torch.rand(tensor.shape, generator=generator))
    save_file(tensors, folder / TENSORS)
    return folder


@pytest.fixture(scope="module")
def registry(
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    dora: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Registry:
    """``probed`` has golden probes; ``exchanged`` has them too, and they are another adapter's."""
    root = tmp_path_factory.mktemp("merged-registry")
    probes = recorded(tiny_base, tiny_adapters["bravo"])
    folders = {
        **{name: tiny_adapters[name] for name in ("alpha", "charlie", "echo")},
        "dora": dora,
        "probed": with_probes(tiny_adapters["bravo"], root / "probed", probes),
        "exchanged": with_probes(tiny_adapters["delta"], root / "exchanged", probes),
    }
    return registry_of(root, tiny_base, folders)


@pytest.fixture
def make(tiny_base: Path, registry: Registry) -> Iterator[Callable[..., EngineWorld]]:
    """As ``make_world``, over the registry above and with memory for a merged copy."""
    with worlds(tiny_base, registry) as made:
        yield functools.partial(made, merge_memory_bytes=MEMORY)


@pytest.mark.parametrize("path", ["layers", "products", "torch"])
def test_equals_peft_merged_and_nobody_else_notices(
    make: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    dora: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    """The bits of base rows and of other adapters: before, while a merged copy exists, and after it."""
    take_path(path, monkeypatch)
    world = make(**BITS, start=False)
    assert (world.fused is not None) == (path == "layers")
    world.engine.start()
    asked = prompts(3)
    names = ["", "alpha", "charlie"]

    def bits() -> list[list[float]]:
        # One after the other: torch chooses its algorithm by the number of rows.
        return [
            world.collector.logprobs(world.submit(p, n, logprobs=0, max_tokens=6))
            for p, n in zip(asked, names, strict=True)
        ]

    for name in ("alpha", "charlie"):
        world.residency.load(world.registry.resolve(name))
    before = bits()
    folders = {**tiny_adapters, "dora": dora}
    for name in ("charlie", "dora"):
        model = merged_model(tiny_base, folders[name])
        ids = [world.submit(p, name, execution="merged") for p in asked]
        for request_id, prompt in zip(ids, asked, strict=True):
            assert answer(world, request_id) == (greedy(model, prompt), True), name
        merged = merging_of(world).merged()
        assert merged is not None
        assert merged.state == "ready"
        assert bits() == before
    if path == "layers":
        # Here a row's bits depend on no other row, so merged ones may run beside the others.
        long = world.submit(asked[0], "dora", execution="merged", max_tokens=60, ignore_eos=True)
        world.collector.wait_started(long)
        assert bits() == before
        assert answer(world, long)[1]
    copy = merging_of(world)._copy
    assert copy is not None
    assert copy.weights is not None
    held = [
        weakref.ref(cast("Any", group.weight if group.packed is None else group.packed))
        for group in copy.weights.in_place.values()
    ]
    # q/k/v, o and gate/up of both layers, each group whole; down is the base's own.
    assert len(held) == 6
    merging_of(world).drop(world.registry.resolve("dora").digest)
    del copy
    wait_for(lambda: all(one() is None for one in held))
    assert merging_of(world).merged() is None
    assert bits() == before


def test_a_transposed_layer(make: Callable[..., EngineWorld], tmp_path: Path) -> None:
    """GPT-2 keeps its weights the other way round, and its files lack the modules' prefix."""
    base = build_family("gpt2", tmp_path / "gpt2")
    recipe = AdapterRecipe(modules=("c_attn", "c_fc"), config={"fan_in_fan_out": True})
    folder = write_manifest(base, build_adapter(base, tmp_path / "adapter", recipe))
    store = Registry.open(tmp_path / "store", create=True)
    store.push(folder, "wide", base=BaseCard.from_folder(base))
    world = make(base, registry=store)
    model = merged_model(base, folder)
    for prompt in prompts(2):
        request_id = world.submit(prompt, "wide", execution="merged")
        assert answer(world, request_id) == (greedy(model, prompt), True)


@pytest.mark.parametrize("kind", ["nf4", "int8", "native int8"])
def test_what_the_base_is_rounded_to_the_copy_is_too(
    make: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
    kind: str,
) -> None:
    """The same log probabilities as of PEFT's merged model, saved, and rounded as a base of its own."""
    kernels = native.load()
    if kind == "native int8" and (isinstance(kernels, str) or not kernels.has_int8):
        pytest.skip("this CPU has no product with 8-bit weights")
    saved = build_llama(tmp_path / "saved")
    merged_model(tiny_base, tiny_adapters["alpha"]).save_pretrained(saved)

    def serve(folder: Path, **options: Any) -> EngineWorld:
        if kind == "native int8":
            return make(folder, int8=True, **BITS, **options)
        model = load_model(
            find_base(folder), quantization=cast("Any", kind), dtype=torch.float32, device="cpu"
        )
        return make(folder, model=model, **BITS, **options)

    ours, theirs = serve(tiny_base), serve(saved, merge_memory_bytes=0)
    asked: dict[str, Any] = {"logprobs": 0, "max_tokens": 6, "ignore_eos": True}
    for prompt in prompts(3):
        ids = [
            ours.submit(prompt, "alpha", execution="merged", **asked),
            theirs.submit(prompt, **asked),
        ]
        found, expected = (
            w.collector.logprobs(i) for w, i in zip((ours, theirs), ids, strict=True)
        )
        # PEFT adds B A up in another order, which may tip a weight over to the next of its few values.
        assert found == pytest.approx(expected, abs=2e-2)
        assert answer(ours, ids[0])[1]


def test_probes_decide(make: Callable[..., EngineWorld]) -> None:
    """Replayed on the merged weights, whether loads are verified or not; a refusal is remembered."""
    world = make()
    assert answer(world, world.submit([5, 6, 7], "probed", execution="merged", max_tokens=2))[1]
    merged = merging_of(world).merged()
    assert merged is not None
    assert merged.verdict is not None
    assert (merged.verdict.state, merged.verdict.num_probes) == ("passed", 3)
    request_id = world.submit([5, 6, 7], "exchanged", execution="merged")
    _, _, error = world.collector.wait(request_id)
    assert isinstance(error, NotMergeable)
    assert "golden probes" in str(error)
    with pytest.raises(NotMergeable, match="golden probes"):
        world.submit([5, 6, 7], "exchanged", execution="merged")
    assert not answer(world, world.submit([5, 6, 7], "exchanged", execution="batched"))[1]
    assert {key[0] for key in world.collector.outputs}.isdisjoint({"probe"})


def test_refused_with_the_reason(
    make: Callable[..., EngineWorld], tmp_path: Path, tiny_base: Path
) -> None:
    """Too large, or files that are not what is served: that call alone fails."""
    small = make(merge_memory_bytes=1000)
    _, _, error = small.collector.wait(small.submit([5, 6], "alpha", execution="merged"))
    assert isinstance(error, NotMergeable)
    assert "--merge-memory" in str(error)
    other = make(weights_from=build_llama(tmp_path / "other", seed=9))
    _, _, error = other.collector.wait(other.submit([5, 6], "alpha", execution="merged"))
    assert isinstance(error, NotMergeable)
    assert "another weight" in str(error)
    for world in (small, other):
        assert not answer(world, world.submit([5, 6], "alpha", execution="batched"))[1]


def test_one_at_a_time(make: Callable[..., EngineWorld]) -> None:
    """Another one has to wait while the copy is in use, and replaces it once it is not."""
    world = make(start=False)
    forward, is_held, may_go_on = world.engine._runner.forward, threading.Event(), threading.Event()
    passes = itertools.count(1)

    def held(batch: Any) -> torch.Tensor | list[int]:
        # In the middle of the answer, which else might be over before anybody else asks.
        if next(passes) == 3:
            is_held.set()
            assert may_go_on.wait(60)
        return forward(batch)

    world.engine._runner.forward = held  # type: ignore[method-assign]
    world.engine.start()
    long = world.submit([5, 6], "alpha", execution="merged", max_tokens=200, ignore_eos=True)
    assert is_held.wait(60)
    with pytest.raises(Unavailable, match="'alpha@1' is merged here and in use"):
        world.submit([5, 6], "charlie", execution="merged")
    world.engine.cancel(long)
    may_go_on.set()
    assert isinstance(world.collector.wait(long)[2], Cancelled)
    assert answer(world, world.submit([5, 6], "charlie", execution="merged"))[1]
    merged = merging_of(world).merged()
    assert merged is not None
    assert merged.digest == world.registry.resolve("charlie").digest


def test_prefixes_are_not_shared_between_the_two(make: Callable[..., EngineWorld]) -> None:
    world = make()
    prompt = list(range(3, 3 + 96))
    cached = []
    for execution in ("batched", "merged", "merged", "batched"):
        request_id = world.submit(prompt, "alpha", execution=execution, max_tokens=1)
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        cached.append(finish.cached_tokens)
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) >= 64


@pytest.mark.parametrize("path", ["layers", "torch"])
def test_vectors_on_merged_weights_are_pefts(
    make: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    take_path(path, monkeypatch)
    world = make()
    prompt = prompts(1)[0]
    asked = world.submit(prompt, "alpha", execution="merged", pooling=Pooling(kind="mean"))
    _, finish, error = world.collector.wait(asked)
    assert error is None
    assert finish is not None
    assert finish.is_merged
    body = merged_model(tiny_base, tiny_adapters["alpha"]).model
    with torch.inference_mode():
        hidden = body(torch.tensor([prompt])).last_hidden_state[0]
    assert finish.embedding == pytest.approx(hidden.mean(0).tolist(), abs=1e-4)


def test_when_memory_runs_short_the_copy_goes_first(
    make: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """A step on merged weights runs out of memory: ``auto`` goes on batched, ``merged`` ends and says why."""
    world = make(merge_share=0.5, start=False)
    runner = world.engine._runner
    forward = runner.forward
    num_together, are_both_there = 0, threading.Event()

    def limited(batch: Any) -> torch.Tensor | list[int]:
        nonlocal num_together
        assert are_both_there.wait(60)
        are_together = batch.merged is not None and batch.num_decode == 2
        num_together += are_together
        if are_together and num_together == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(batch)

    world.engine.start()
    assert answer(world, world.submit([5, 6], "alpha", execution="merged", max_tokens=1))[1]
    runner.forward = limited  # type: ignore[method-assign]
    asked = prompts(2)
    must = world.submit(asked[1], "alpha", execution="merged", max_tokens=200, ignore_eos=True)
    auto = world.submit(asked[0], "alpha", execution="auto", max_tokens=20)
    are_both_there.set()
    model = merged_model(tiny_base, tiny_adapters["alpha"])
    # Greedy tokens in float32: the same on either weights, so that nothing was lost or made twice.
    assert answer(world, auto) == (greedy(model, asked[0], 20), False)
    _, _, error = world.collector.wait(must)
    assert isinstance(error, Unavailable)
    assert "memory ran short" in str(error)
    assert num_together == 3
    assert merging_of(world).merged() is None
    with pytest.raises(Unavailable, match="memory ran short"):
        world.submit([5, 6], "alpha", execution="merged")
    assert world.engine._scheduler.max_batch == 8


def test_auto_merges_who_dominates(
    make: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a real engine, with short windows; answers of others stay batched."""
    world = make(merge_share=0.6, draft_rows=0, start=False)
    merging = merging_of(world)
    # Windows of passes and not of seconds, in which a slow machine may make too few tokens to judge by.
    monkeypatch.setattr(merging._traffic, "_clock", itertools.count().__next__)
    monkeypatch.setattr(merging._traffic, "_since", 0)
    monkeypatch.setattr(merging._traffic, "_window_s", LEAST_TOKENS)
    world.engine.start()

    def is_building() -> bool:
        merged = merging.merged()
        return merged is not None and merged.state == "building"

    answers: list[bool] = []
    for _ in range(200):
        ids = [
            world.submit([5, 6, 7, i], "charlie", execution="auto", max_tokens=40, ignore_eos=True)
            for i in range(8)
        ]
        answers = [answer(world, request_id)[1] for request_id in ids]
        if all(answers):
            break
        wait_for(lambda: not is_building())
    assert all(answers)
    assert not answer(world, world.submit([5, 6], "alpha", execution="auto"))[1]
    assert not answer(world, world.submit([5, 6], "charlie", execution="batched"))[1]
    assert sum(s.num_merged_rows for s in world.collector.steps) > 0
