"""Packed samples teach what they teach alone: loss and gradients are equal, and models that leak are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lorary.errors import InvalidRecipe
from lorary.trainer import grouped_attention
from lorary.trainer.batches import IGNORED, collate
from lorary.trainer.encoding import Row
from lorary.trainer.loop import selected_logits
from lorary.trainer.packing import PackedRows, check_isolation, join, plan_packs
from tests.conftest import TINY_SIZES

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = [
    Row(input_ids=(5, 6, 7, 8, 9, 10, 11), num_prompt=3),
    Row(input_ids=(40, 41), num_prompt=1),
    Row(input_ids=(20, 21, 22, 23, 24, 25), num_prompt=1, unlearned=((2, 4),)),
]


def summed(model: Any, rows: list[Row]) -> torch.Tensor:
    batch = collate(rows, pad_token_id=2)
    logits, targets = selected_logits(
        model, batch["input_ids"], batch["labels"], batch.get("position_ids")
    )
    return F.cross_entropy(logits, targets, reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "lorary_grouped"])
def test_packed_row_has_the_loss_and_gradients_of_its_samples(
    tiny_base: Path, attention: str
) -> None:
    grouped_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float64, attn_implementation=attention
    )
    # A second, shorter row: its padding must stay apart as well.
    packed = summed(model, [join(SAMPLES), SAMPLES[1]])
    alone = [summed(model, [sample]) for sample in (*SAMPLES, SAMPLES[1])]
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-10, atol=1e-10)
    expected = [
        sum(parts) for parts in zip(*(gradients(model, loss) for loss in alone), strict=True)
    ]
    for found, wanted in zip(gradients(model, packed), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_without_positions_samples_would_see_each_other(tiny_base: Path) -> None:
    """That the test above can fail."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    batch = collate([join(SAMPLES)], pad_token_id=2)
    logits, targets = selected_logits(model, batch["input_ids"], batch["labels"])
    leaked = F.cross_entropy(logits, targets, reduction="sum")
    assert abs(leaked - sum(summed(model, [sample]) for sample in SAMPLES)) > 1e-3


def test_joined_row_masks_and_counts_as_its_samples_do() -> None:
    row = join(SAMPLES)
    assert row.input_ids == tuple(token for sample in SAMPLES for token in sample.input_ids)
    assert row.is_learned() == [flag for sample in SAMPLES for flag in sample.is_learned()]
    batch = collate([row, SAMPLES[1]], pad_token_id=2)
    assert batch["position_ids"][0].tolist() == [*range(7), *range(2), *range(6)]
    assert batch["position_ids"][1].tolist() == [*range(2), *range(13)]
    assert (batch["labels"][1, 2:] == IGNORED).all()


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80), seed=st.integers(0, 3))
def test_every_sample_is_in_one_row_that_holds_it(lengths: list[int], seed: int) -> None:
    packs = plan_packs(lengths, max_length=64, seed=seed)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(sizes) <= 64
    # No two rows would fit into one, or best fit had put them there.
    assert len(sizes) < 2 or sum(sorted(sizes)[:2]) > 64


def test_packed_rows_are_nearly_full() -> None:
    samples = [Row(input_ids=tuple(range(2 + i % 50)), num_prompt=1) for i in range(1000)]
    rows = PackedRows(samples, max_length=128, seed=0)
    assert rows.lengths == [len(row.input_ids) for row in rows]
    assert sum(rows.lengths) > 0.97 * 128 * len(rows)


def test_model_whose_positions_are_its_own_is_refused(tiny_base: Path) -> None:
    """A recurrent model knows no mask at all."""
    from transformers import MambaConfig, MambaForCausalLM

    check_isolation(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16))
    config = MambaConfig(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8)

    class Positioned(MambaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(InvalidRecipe, match="would see each other in this base"):
        check_isolation(Positioned(config).float())


def test_sliding_windows_and_other_families_keep_samples_apart() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = {**TINY_SIZES, "vocab_size": 160}
    check_isolation(Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, sliding_window=4)).float())
    check_isolation(GPT2LMHeadModel(GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4)))
