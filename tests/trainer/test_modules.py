"""LoRA on modules that are no language models: what is adapted, what stays, what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from lorary.errors import CorruptArtifact, InvalidRecipe
from lorary.trainer.modules import adaptable_modules, attach_lora, load_lora, save_lora

if TYPE_CHECKING:
    from pathlib import Path


def network(seed: int = 0) -> nn.Sequential:
    """Convolution, depthwise convolution, batch norm, linear layers; images [B, 3, 8, 8]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
        *(nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4)),
    )


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_linear_layers_and_whole_convolutions_are_adapted() -> None:
    assert adaptable_modules(network()) == ["0", "4", "5"]
    assert adaptable_modules(network(), skip=["5"]) == ["0", "4"]


def test_a_fresh_adapter_changes_nothing_and_training_changes_only_it() -> None:
    base, x = network().eval(), images()
    norm: Any = base[2]
    wanted, statistics = base(x), norm.running_mean.clone()
    wrapped = attach_lora(base, rank=2, heads=["5"])
    torch.testing.assert_close(wrapped.eval()(x), wanted)
    wrapped.train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        wrapped(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(norm.running_mean, statistics)
    with wrapped.eval().disable_adapter():
        assert torch.equal(wrapped(x), wanted)
    assert not torch.allclose(wrapped(x), wanted, atol=1e-3)


def test_saved_and_loaded_adapters_compute_the_same(tmp_path: Path) -> None:
    wrapped = attach_lora(network(), rank=2, heads=["5"])
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_lora(wrapped, tmp_path)
    again = load_lora(network(), tmp_path)
    assert torch.equal(again(images()), wrapped.eval()(images()))
    with pytest.raises(CorruptArtifact, match="is no adapter of this model"):
        load_lora(nn.Sequential(nn.Linear(3, 3)), tmp_path)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InvalidRecipe, match="no module 'head'; it has 0, 1, 2, 3, 4, 5"):
        attach_lora(network(), heads=["head"])
    with pytest.raises(InvalidRecipe, match="no linear layer or convolution"):
        attach_lora(nn.Sequential(nn.ReLU()))
