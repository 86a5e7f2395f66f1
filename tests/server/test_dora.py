"""DoRA in the mixed batch: PEFT's answers, in one step with LoRA rows and base rows that never notice."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorary.bases import find_base
from lorary.bases.load import Quantization, load_model
from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry import BaseCard, Registry
from lorary.server.adapters.columns import column_scales
from lorary.server.adapters.layers import LoraModel
from lorary.server.adapters.loader import LoadedAdapter
from lorary.server.native import decoder
from lorary.server.native import library as native
from tests.conftest import AdapterRecipe, build_adapter, build_llama, peft_greedy, write_manifest
from tests.server.beside_peft import check_logprobs
from tests.server.conftest import EngineWorld, registry_of, worlds
from tests.server.test_engine_oracle import prompts
from tests.server.test_residency import wait_for
from tests.server.test_verification import recorded, with_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TENSORS = "adapter_model.safetensors"
DORA = {"use_dora": True}
RECIPES = {
    "lora": AdapterRecipe(rank=12, seed=31),
    "small": AdapterRecipe(rank=4, alpha=8, seed=32, config=DORA),
    # Of q/k/v and gate/up only a part: the rest keeps what the base says.
    "partial": AdapterRecipe(
        rank=16,
        alpha=16,
        seed=33,
        modules=("q_proj", "o_proj", "up_proj", "down_proj"),
        config={**DORA, "use_rslora": True, "rank_pattern": {"o_proj": 3}},
    ),
    # No multiple of anything; with its column scales it takes two pages.
    "odd": AdapterRecipe(rank=9, alpha=27, seed=34, config=DORA),
}
NAMES = ["small", "", "lora", "partial", "odd", "", "lora", "odd"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases everywhere, for column scales leave them alone."""
    folder = tmp_path_factory.mktemp("dora") / "base"
    build_llama(folder, seed=5, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders whose magnitudes are far from the norms that they began as."""
    root = tmp_path_factory.mktemp("dora-adapters")
    made = {}
    for name, recipe in RECIPES.items():
        folder = write_manifest(base, build_adapter(base, root / name, recipe))
        tensors = load_file(folder / TENSORS)
        generator = torch.Generator().manual_seed(recipe.seed)
        for key, tensor in tensors.items():
            if "magnitude" in key:
                tensors[key] = tensor * (0.6 + torch.rand(tensor.shape, generator=generator))
        save_file(tensors, folder / TENSORS)
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def registry(
    base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    return registry_of(tmp_path_factory.mktemp("dora-registry"), base, adapters)


@pytest.fixture
def make(base: Path, registry: Registry) -> Iterator[Callable[..., EngineWorld]]:
    with worlds(base, registry) as made:
        yield made


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next world add adapters in native layers, in native products, or by torch operators."""
    if path != "layers":
        monkeypatch.setattr(decoder, "FAMILIES", {})
    if path == "torch":
        monkeypatch.setattr(native, "load", lambda: "not wanted here")


@pytest.mark.parametrize("prefill_budget", [512, 7])
@pytest.mark.parametrize("path", ["layers", "products", "torch"])
def test_mixed_batch_equals_peft_one_at_a_time(
    make: Callable[..., EngineWorld],
    base: Path,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    prefill_budget: int,
) -> None:
    take_path(path, monkeypatch)
    world = make(prefill_budget=prefill_budget, start=False)
    assert (world.fused is not None) == (path == "layers")
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name))
    asked = prompts(len(NAMES))
    ids = [world.submit(p, n) for p, n in zip(asked, NAMES, strict=True)]
    world.engine.start()
    for request_id, name, prompt in zip(ids, NAMES, asked, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == peft_greedy(base, adapters.get(name), prompt, 12), name or "base"
    assert max(s.num_distinct_adapters for s in world.collector.steps) >= 3


def test_magnitudes_change_the_answers(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The oracle can tell DoRA from its LoRA half; else the test above would prove nothing."""
    from peft import PeftModel

    plain = tmp_path / "plain"
    plain.mkdir()
    config = (adapters["small"] / "adapter_config.json").read_text()
    (plain / "adapter_config.json").write_text(
        config.replace('"use_dora": true', '"use_dora": false')
    )
    tensors = load_file(adapters["small"] / TENSORS)
    save_file({k: v for k, v in tensors.items() if "magnitude" not in k}, plain / TENSORS)
    logits = []
    for folder in (adapters["small"], plain):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        with torch.inference_mode():
            logits.append(model(torch.tensor([prompts(1)[0]])).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.5


@pytest.mark.parametrize("int8", [False, True])
def test_other_rows_keep_their_bits_and_so_does_it_in_any_company(
    make: Callable[..., EngineWorld], int8: bool
) -> None:
    """Log probabilities beside DoRA rows, beside base rows, and alone with prompts cut elsewhere."""
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if int8 and not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    asked = prompts(4, longest=20)

    def run(names: list[str], **options: Any) -> list[list[float]]:
        world = make(start=False, draft_rows=0, prefix_cache=False, int8=int8, **options)
        for name in set(names) - {""}:
            world.residency.load(world.registry.resolve(name))
        ids = [
            world.submit(p, n, logprobs=0, ignore_eos=True)
            for p, n in zip(asked, names, strict=True)
        ]
        world.engine.start()
        return [world.collector.logprobs(i) for i in ids]

    beside = run(["", "lora", "odd", "small"])
    assert beside[:2] == run(["", "lora", "", ""])[:2]
    assert beside[2] == run(["small", "", "odd", "partial"], prefill_budget=5)[2]
    assert beside[2] == run(["", "", "odd", ""], max_batch=1)[2]


@pytest.mark.parametrize("storage", ["auto", "bfloat16", "int8"])
def test_scales_leave_and_come_back_with_their_adapter(
    make: Callable[..., EngineWorld], storage: str
) -> None:
    """From files, from host memory into other pages, and again from files: the same bits."""
    prompt = prompts(1)[0]
    world = make(adapter_dtype=storage, host_adapter_memory_bytes=1 << 24, prefix_cache=False)

    def ask() -> list[float]:
        return world.collector.logprobs(
            world.submit(prompt, "odd", logprobs=0, ignore_eos=True, max_tokens=6)
        )

    def scales() -> list[torch.Tensor]:
        lease = world.residency.acquire(resolved)
        assert lease.entry is not None
        found = [c[lease.entry.columns].clone() for g in world.lora.pool.groups for c in g.columns]
        lease.release()
        return found

    resolved = world.registry.resolve("odd")
    first, (resident,) = ask(), world.residency.snapshot()
    kept = scales()
    assert resident.num_pages == 2
    wait_for(lambda: world.residency.demote(resolved.digest))
    assert world.residency.has_copy(resolved.digest)
    # Others take its pages, so that it comes back to different ones.
    world.residency.load(world.registry.resolve("lora"))
    assert ask() == first
    assert all(map(torch.equal, kept, scales()))
    assert world.residency.host_stats().num_hits == 1
    world.residency.unload(resolved.digest)
    wait_for(lambda: [r.name for r in world.residency.snapshot()] == ["lora"])
    assert ask() == first


def test_churn_over_few_pages_stays_exact(
    make: Callable[..., EngineWorld], base: Path, adapters: dict[str, Path]
) -> None:
    """Pages that held rank rows come to hold column scales, and the other way round."""
    page = make(start=False).lora.pool.page_bytes
    world = make(adapter_memory_bytes=page * 5, max_batch=3)
    names = [[*RECIPES, ""][(7 * i) % 5] for i in range(15)]
    asked = prompts(15, longest=8)
    ids = [world.submit(p, n, max_tokens=6) for p, n in zip(asked, names, strict=True)]
    for request_id, name, prompt in zip(ids, names, asked, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == peft_greedy(base, adapters.get(name), prompt, 6), name or "base"


# As in test_engine_quantized, where the reasons are; PEFT's products with nf4 are in float32 here.
TOLERANCE = {"nf4": 0.1, "int8": 0.1}


def check_against_peft(
    world: EngineWorld,
    adapters: dict[str, Path],
    load: Callable[[], Any],
    tolerance: float,
) -> None:
    check_logprobs(
        world,
        adapters,
        load,
        tolerance,
        prompts=prompts(4, longest=6),
        names=["small", "", "odd", "lora"],
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_a_base_that_bitsandbytes_quantized(
    make: Callable[..., EngineWorld],
    base: Path,
    adapters: dict[str, Path],
    quantization: Quantization,
) -> None:
    """Norms are those of the dequantized weights, here as in PEFT."""

    def load() -> Any:
        return load_model(
            find_base(base), quantization=quantization, dtype=torch.float32, device="cpu"
        )

    def kept_as_loaded() -> Any:
        """PEFT dequantizes what a layer has laid out anew at its first product, and gets other weights."""
        model = load()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    check_against_peft(make(model=load()), adapters, kept_as_loaded, TOLERANCE[quantization])


def test_over_a_base_in_8_bits_of_ours(
    make: Callable[..., EngineWorld], base: Path, adapters: dict[str, Path]
) -> None:
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    check_against_peft(make(int8=True), adapters, load, 0.3)


def test_in_bfloat16_it_is_as_near_as_lora(make: Callable[..., EngineWorld], base: Path) -> None:
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.supports_layers(torch.bfloat16):
        pytest.skip("this CPU does not multiply bfloat16")
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    found = []
    for world in (make(dtype=torch.bfloat16), make(model=rounded.float())):
        ids = [
            world.submit(p, name, labels=((5, 9, 30, 44), (7,)))
            for p, name in zip(prompts(4), ["small", "odd", "", "lora"], strict=True)
        ]
        finishes = [world.collector.wait(i)[1] for i in ids]
        found.append(torch.tensor([f.label_logprobs for f in finishes if f is not None]))
    assert found[0].shape == (4, 2)
    assert (found[0] - found[1]).abs().max() < found[1].abs().max() / 256


def test_golden_probes_pass_and_find_exchanged_magnitudes(
    make: Callable[..., EngineWorld], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    store = Registry.open(tmp_path / "store", create=True)
    card = BaseCard.from_folder(base)
    probes = recorded(base, adapters["odd"])
    store.push(with_probes(adapters["odd"], tmp_path / "sound", probes), "sound", base=card)
    exchanged = with_probes(adapters["odd"], tmp_path / "exchanged", probes)
    tensors = load_file(exchanged / TENSORS)
    save_file(
        {k: v.roll(1).contiguous() if "magnitude" in k else v for k, v in tensors.items()},
        exchanged / TENSORS,
    )
    store.push(exchanged, "exchanged", base=card)
    world = make(registry=store, verify="enforce")
    world.residency.load(store.resolve("sound"), timeout_s=60)
    with pytest.raises(CorruptArtifact, match="golden probes"):
        world.residency.load(store.resolve("exchanged"), timeout_s=60)
    assert [r.name for r in world.residency.snapshot()] == ["sound"]


def test_a_composition_with_dora_is_refused(
    make: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where its parts are there, else when they have come; nothing of it stays held."""
    world = make()
    load, may_come = world.residency._load, threading.Event()

    def loaded(resolved: Any) -> Any:
        assert may_come.wait(60)
        return load(resolved)

    monkeypatch.setattr(world.residency, "_load", loaded)
    asked = [
        world.submit([5, 6], weights=weights)
        for weights in ({"lora": 0.5, "small": 0.5}, {"odd": 0.5})
    ]
    may_come.set()
    for request_id in asked:
        _, _, error = world.collector.wait(request_id)
        assert isinstance(error, IncompatibleAdapter)
        assert "is DoRA" in str(error)
        assert "@1' is DoRA" in str(error)
    with pytest.raises(IncompatibleAdapter, match=r"'small@1' is DoRA.*no part of a weighted sum"):
        world.compose({"lora": 0.5, "small": 0.5})
    assert world.compositions.num_in_use == 0
    assert all(r.num_holders == 0 for r in world.residency.snapshot())
    # By itself it is served as ever.
    assert world.collector.wait(world.submit([5, 6], "small"))[2] is None


def test_an_output_without_a_direction_is_refused(base: Path) -> None:
    """A row of zeros has no length to divide by: neither infinities nor NaN reach a pool."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    module = "model.layers.1.self_attn.k_proj"
    model.get_submodule(module).weight.data[3] = 0
    lora = LoraModel(model, memory_bytes=1 << 22, dtype=torch.float32)
    b = torch.randn(32, 2)
    b[3] = 0
    adapter = LoadedAdapter(
        rank=2, tensors={module: (torch.randn(2, 64), b)}, magnitudes={module: torch.ones(32)}
    )
    with pytest.raises(IncompatibleAdapter, match=r"1\.self_attn\.k_proj: output 3 .* length 0"):
        column_scales(lora.groups, adapter)


def test_norms_are_of_the_weights_of_every_kind_of_layer() -> None:
    """GPT-2's transposed layers: in PEFT's own words, m / |(W^T + B A) rows|."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2))
    module = "transformer.h.0.attn.c_attn"
    weight = model.get_submodule(module).weight.detach().t().clone()
    a, b, m = torch.randn(4, 32), torch.randn(96, 4), torch.rand(96) + 0.5
    lora = LoraModel(model, memory_bytes=1 << 22, dtype=torch.float32)
    adapter = LoadedAdapter(rank=4, tensors={module: (a, b)}, magnitudes={module: m})
    found = column_scales(lora.groups, adapter)
    assert found.keys() == {module}
    assert torch.allclose(found[module], m / (weight + b @ a).norm(dim=1), rtol=1e-5)
