"""The trainer's attention on a CPU is the model's own: outputs, gradients, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.errors import ConfigError
from lorary.trainer import grouped_attention

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 9, 12, 40, 7, 2], [1, 30, 31, 8, 2, 2]])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_model_has_eagers_logits_and_gradients(
    tiny_base: Path, dtype: torch.dtype, tolerance: float
) -> None:
    grouped_attention.register()
    model: Any = load_model(find_base(tiny_base), dtype=dtype, attn_implementation="eager")
    results = []
    for name in ("eager", grouped_attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(IDS, use_cache=False).logits.float()
        logits.logsumexp(-1).sum().backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.float().clone()
        results.append((logits.detach(), gradient))
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_padded_batch_with_a_mask_is_that_of_eager(tiny_base: Path) -> None:
    grouped_attention.register()
    model: Any = load_model(find_base(tiny_base), dtype=torch.float32, attn_implementation="eager")
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = model(IDS, attention_mask=mask).logits
    model.set_attn_implementation(grouped_attention.NAME)
    found = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("foreign", [{"softcap": 30.0}, {"s_aux": torch.ones(2)}, {"dropout": 0.1}])
def test_what_it_cannot_compute_is_refused(foreign: dict[str, Any]) -> None:
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ConfigError, match="use eager"):
        grouped_attention.grouped_attention(None, q, q, q, None, **foreign)


def test_only_known_architectures_use_it() -> None:
    assert grouped_attention.suits(SimpleNamespace(model_type="llama"))
    assert not grouped_attention.suits(SimpleNamespace(model_type="gemma2"))
    soft = SimpleNamespace(model_type="llama", attn_logit_softcapping=30.0)
    assert not grouped_attention.suits(soft)
