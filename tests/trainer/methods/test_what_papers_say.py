"""Each method against its definition: a literal implementation, PEFT's own, or the algebra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.errors import InvalidRecipe
from lorary.trainer.encoding import Row
from lorary.trainer.methods.attach import attach
from lorary.trainer.methods.method import ADAPTER, Setting, lora_layers
from lorary.trainer.methods.optimizers import own_optimizer
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.recipe import MethodRecipe
from lorary.trainer.report.weights import module_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

IDS = torch.tensor([[1, 9, 12, 40, 7, 2, 30], [1, 30, 31, 8, 2, 2, 11]])
TARGETS = ("q_proj", "down_proj")


def base_of(tiny_base: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return load_model(find_base(tiny_base), dtype=dtype, **options)


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with quiet_libraries():
        logits = model(ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def trainable(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class LiteralLora(nn.Module):
    """``W x + s B A x`` over a weight that may be written."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.weight = linear.weight.detach().clone()
        self.a, self.b, self.scale = nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() + self.scale * (x @ self.a.t()) @ self.b.t()


@pytest.mark.parametrize("start", [0, 3])
def test_delta_lora_takes_the_steps_that_writing_w_takes(tiny_base: Path, start: int) -> None:
    """Algorithm 1 of 2309.02411, W written after every step beyond K, in double precision."""
    ratio, steps = 0.7, 9
    recipe = MethodRecipe(
        name="delta-lora", rank=3, delta_start=start, delta_ratio=ratio, target_modules=TARGETS
    )
    torch.manual_seed(0)
    method = attach(base_of(tiny_base), recipe, gradient_checkpointing=False)
    literal = base_of(tiny_base).requires_grad_(False)
    twins: dict[str, LiteralLora] = {}
    for name, layer in lora_layers(method.model).items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        assert a.dtype == torch.float64
        twin = LiteralLora(
            literal.get_submodule(name), a.detach(), b.detach(), layer.scaling[ADAPTER]
        )
        parent, _, last = name.rpartition(".")
        setattr(literal.get_submodule(parent), last, twin)
        twins[name] = twin
    first = {name: twin.weight.clone() for name, twin in twins.items()}
    optimizers = [torch.optim.AdamW(trainable(m), lr=1e-2) for m in (method.model, literal)]
    for step in range(1, steps + 1):
        before = {n: (t.b @ t.a).detach().clone() for n, t in twins.items()}
        for model, optimizer in zip((method.model, literal), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if step > start:
            for name, twin in twins.items():
                moved = (twin.b @ twin.a).detach() - before[name]
                twin.weight += ratio * twin.scale * moved
        method.after_step(step)
        for name, layer in lora_layers(method.model).items():
            for ours, theirs in (("lora_A", twins[name].a), ("lora_B", twins[name].b)):
                found = getattr(layer, ours)[ADAPTER].weight
                torch.testing.assert_close(found, theirs, rtol=0, atol=1e-11)
    torch.testing.assert_close(loss_of(method.model), loss_of(literal), rtol=0, atol=1e-12)
    reported = {found.name: found.delta_norm for found in module_changes(method.model)}
    for name, twin in twins.items():
        moved = twin.weight - first[name]
        assert moved.norm() > 1e-3, "W has moved"
        whole = (moved + twin.scale * twin.b @ twin.a).norm().item()
        assert reported[name] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("name", "init"), [("pissa", "pissa"), ("olora", "olora")])
def test_residual_starts_take_the_steps_that_pefts_take(
    tiny_base: Path, name: Any, init: str
) -> None:
    """PEFT subtracts the start from the base in memory; here the base stays what it is."""
    import peft

    options: dict[str, Any] = {"svd_iterations": 0} if name == "pissa" else {}
    recipe = MethodRecipe(name=name, rank=4, alpha=6.0, target_modules=TARGETS, **options)
    base = base_of(tiny_base, torch.float32)
    untouched = {key: value.clone() for key, value in base.state_dict().items()}
    ours = attach(base, recipe, gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        init_lora_weights=init,  # type: ignore[arg-type]
    )
    theirs = peft.get_peft_model(base_of(tiny_base, torch.float32), config)
    assert loss_of(ours.model).item() == pytest.approx(loss_of(base_of(tiny_base)).item(), abs=1e-5)
    for model in (ours.model, theirs):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    wanted = lora_layers(theirs)
    for key, layer in lora_layers(ours.model).items():
        product, other = (
            x.lora_B[ADAPTER].weight @ x.lora_A[ADAPTER].weight for x in (layer, wanted[key])
        )
        torch.testing.assert_close(product, other, rtol=0, atol=1e-5)
        assert torch.equal(layer.get_base_layer().weight, untouched[f"{key}.weight"])


def test_loftq_answers_best_to_what_nf4_lost(tiny_base: Path) -> None:
    """Eckart–Young: nothing of this rank comes nearer to W − Q."""
    recipe = MethodRecipe(name="loftq", rank=8, alpha=12.0)
    found = find_base(tiny_base)
    quantized = load_model(found, quantization="nf4", dtype=torch.float32)
    method = attach(quantized, recipe, gradient_checkpointing=False, setting=Setting(base=found))
    from bitsandbytes.functional import dequantize_4bit

    whole = base_of(tiny_base, torch.float32)
    for name, layer in lora_layers(method.model).items():
        weight = layer.get_base_layer().weight
        q = dequantize_4bit(weight.data, weight.quant_state).view(
            layer.out_features, layer.in_features
        )
        lost = whole.get_submodule(name).weight - q
        answer = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
        rest = torch.linalg.svdvals(lost)[8:].norm()
        assert torch.allclose((lost - layer.scaling[ADAPTER] * answer).norm(), rest, rtol=1e-4)


def test_eva_starts_along_the_inputs_and_shares_ranks_out(tiny_base: Path) -> None:
    torch.manual_seed(0)
    rows = [
        Row(input_ids=tuple(torch.randint(3, 60, (24,)).tolist()), num_prompt=20)
        for _ in range(120)
    ]
    method = attach(
        base_of(tiny_base, torch.float32),
        MethodRecipe(name="eva", rank=4),
        gradient_checkpointing=False,
        setting=Setting(rows=rows),
    )
    layers = lora_layers(method.model)
    ranks = [layer.r[ADAPTER] for layer in layers.values()]
    assert sum(ranks) == 4 * 14
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8
    assert method.describe().rank == max(ranks)
    for layer in layers.values():
        a = layer.lora_A[ADAPTER].weight
        torch.testing.assert_close(a @ a.t(), torch.eye(len(a)), rtol=0, atol=1e-3)
        assert layer.scaling[ADAPTER] == 2.0
    # Of all directions of the first layer's inputs, its own explain the most.
    name, layer = next(iter(layers.items()))
    inputs = []
    handle = layer.register_forward_hook(lambda _m, x, _y: inputs.append(x[0].flatten(0, 1)))
    for row in rows:
        loss_of(method.model, torch.tensor([row.input_ids]))
    handle.remove()
    x = torch.cat(inputs)
    x = (x - x.mean(0)).detach()
    explained = (x @ layer.lora_A[ADAPTER].weight.t()).pow(2).sum()
    best = torch.linalg.svdvals(x)[: layer.r[ADAPTER]].pow(2).sum()
    assert explained > 0.95 * best, name


@pytest.mark.parametrize("rows", [[], [Row(input_ids=(1, 5, 9), num_prompt=1)]])
def test_eva_refuses_too_little_data(tiny_base: Path, rows: list[Row]) -> None:
    """PEFT would go round these rows for ever."""
    with pytest.raises(InvalidRecipe, match="needs 8 tokens of training data or more"):
        attach(
            base_of(tiny_base, torch.float32),
            MethodRecipe(name="eva", rank=4),
            gradient_checkpointing=False,
            setting=Setting(rows=rows),
        )


def test_lora_fa_freezes_a_and_does_not_keep_the_inputs(
    tiny_base: Path, make_recipe: Callable[..., Recipe]
) -> None:
    kept = {}
    for name in ("lora", "lora-fa"):
        recipe = make_recipe(method={"name": name, "rank": 4})
        torch.manual_seed(0)
        method = attach(
            base_of(tiny_base, torch.float32), recipe.method, gradient_checkpointing=False
        )
        optimizer = own_optimizer(method.model, recipe)
        kept[name] = kept_bytes(method.model)
        if name == "lora":
            assert optimizer is None
            continue
        before = {n: p.detach().clone() for n, p in method.model.named_parameters()}
        for _ in range(2):
            loss_of(method.model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        changed = {n for n, p in method.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in method.own if "lora_B" in n}
        assert any("lora_A" in n for n in method.own), "a checkpoint holds A, too"
    assert kept["lora-fa"] < 0.9 * kept["lora"]


def kept_bytes(model: Any) -> int:
    """What autograd keeps of a forward pass beside parameters, every memory counted once."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in sizes.items() if address not in parameters)


@pytest.mark.parametrize(("ratio", "wanted"), [(0.0, 16.0), (3.0, 3.0)])
def test_lora_plus_gives_b_its_own_rate(
    tiny_base: Path, make_recipe: Callable[..., Recipe], ratio: float, wanted: float
) -> None:
    recipe = make_recipe(method={"name": "lora-plus", "lr_ratio": ratio})
    method = attach(base_of(tiny_base, torch.float32), recipe.method, gradient_checkpointing=False)
    optimizer = own_optimizer(method.model, recipe)
    names = {id(p): n for n, p in method.model.named_parameters()}
    rates: dict[str, set[float]] = {"lora_A": set(), "lora_B": set()}
    for group in optimizer.param_groups:
        for side in sides(names[id(p)] for p in group["params"]):
            rates[side].add(group["lr"])
    assert {side: len(found) for side, found in rates.items()} == {"lora_A": 1, "lora_B": 1}
    assert rates["lora_A"].pop() == 1e-2
    assert rates["lora_B"].pop() == pytest.approx(1e-2 * wanted)


def sides(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".") if part in ("lora_A", "lora_B")}


def test_adalora_adds_pefts_penalty_and_comes_down_to_its_budget(tiny_base: Path) -> None:
    recipe = MethodRecipe(name="adalora", rank=6, target_rank=2)
    method = attach(
        base_of(tiny_base, torch.float32),
        recipe,
        gradient_checkpointing=False,
        setting=Setting(max_steps=9),
    )
    with quiet_libraries():
        with_penalty = method.model(IDS, labels=IDS).loss
        alone = method.model.base_model.model(IDS, labels=IDS).loss
    penalty = method.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx((with_penalty - alone).item(), rel=1e-4)
    optimizer = torch.optim.AdamW(trainable(method.model), lr=1e-2)
    for step in range(1, 10):
        loss_of(method.model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    left = sum(
        int((p != 0).sum()) for name, p in method.model.named_parameters() if "lora_E" in name
    )
    assert left == 2 * 14
