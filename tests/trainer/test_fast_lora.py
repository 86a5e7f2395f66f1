"""The fast LoRA forward: PEFT's outputs and gradients, whole or quantized base, or PEFT itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.trainer import fast_lora
from lorary.trainer.loop import selected_logits
from lorary.trainer.methods.attach import attach, linear_names
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.recipe import MethodRecipe

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 9, 12, 40, 7, 2], [1, 30, 31, 8, 2, 2]])
LABELS = torch.tensor([[-100, -100, -100, 40, 7, 2], [-100, -100, -100, 8, 2, -100]])


def wrap(base: Path, *, quantization: Any = "none", dtype: torch.dtype, **method: Any) -> Any:
    torch.manual_seed(0)
    model = load_model(find_base(base), quantization=quantization, dtype=dtype)
    name: Any = "lora" if quantization == "none" else "qlora"
    recipe = MethodRecipe(name=name, quantization=quantization, rank=4, **method)
    wrapped = attach(model, recipe, gradient_checkpointing=False).model
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    return wrapped


def peft_only(model: Any) -> Any:
    """The same model with PEFT's own forward back in every layer."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    return plain


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    with quiet_libraries():
        logits, targets = selected_logits(model, IDS, LABELS)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_fast_forward_has_pefts_loss_and_gradients(
    tiny_base: Path, dtype: torch.dtype, tolerance: float
) -> None:
    fast = wrap(tiny_base, dtype=dtype)
    loss, gradients = loss_and_gradients(fast)
    expected_loss, expected = loss_and_gradients(peft_only(fast))
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * 7 * 2  # layers, linear modules, A and B
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base_has_pefts_loss_and_gradients(tiny_base: Path, quantization: Any) -> None:
    fast = wrap(tiny_base, quantization=quantization, dtype=torch.float32)
    loss, gradients = loss_and_gradients(fast)
    expected_loss, expected = loss_and_gradients(peft_only(fast))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-2, name


def test_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    options: Any = {"dtype": torch.float64, "requires_grad": True}
    x, a, b = (torch.randn(*shape, **options) for shape in ((5, 6), (2, 6), (3, 2)))
    w = torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: fast_lora._apply_linear(t[0], w, *t[1:], 1.5), (x, a, b)
    )
    assert torch.autograd.gradcheck(
        lambda *t: fast_lora._apply_update((t[0] @ w.t()).clone(), t[0], *t[1:], 1.5), (x, a, b)
    )


def test_disabled_adapter_is_the_base(tiny_base: Path) -> None:
    model = wrap(tiny_base, dtype=torch.float32).eval()
    base = load_model(find_base(tiny_base), dtype=torch.float32)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    assert not torch.allclose(model(IDS).logits, base(IDS).logits)


def test_dropout_is_used_in_training_only(tiny_base: Path) -> None:
    model = wrap(tiny_base, dtype=torch.float32, dropout=0.5)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    torch.testing.assert_close(model(IDS).logits, peft_only(model)(IDS).logits)


def test_selected_logits_are_the_models_own(tiny_base: Path) -> None:
    """Only learned positions reach the head, and what they give is what the whole would give."""
    model = wrap(tiny_base, dtype=torch.float32).eval()
    logits, targets = selected_logits(model, IDS, LABELS)
    everything = model(IDS).logits
    assert targets.tolist() == [40, 7, 2, 8, 2]
    expected = torch.cat([everything[0, 2:5], everything[1, 2:4]])
    torch.testing.assert_close(logits, expected)


def test_padding_on_the_right_changes_nothing(tiny_base: Path) -> None:
    model = wrap(tiny_base, dtype=torch.float32).eval()
    alone, _ = selected_logits(model, IDS[1:, :5], LABELS[1:, :5])
    padded, _ = selected_logits(model, IDS, LABELS)
    torch.testing.assert_close(padded[3:], alone)


def test_all_linear_is_found_in_the_model_and_never_the_head(tiny_base: Path) -> None:
    names = linear_names(load_model(find_base(tiny_base), dtype=torch.float32))
    assert names == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    ]


def test_unknown_target_module_names_the_ones_there_are(tiny_base: Path) -> None:
    from lorary.errors import InvalidRecipe

    with pytest.raises(InvalidRecipe, match="down_proj, gate_proj"):
        wrap(tiny_base, dtype=torch.float32, target_modules=("qproj",))
