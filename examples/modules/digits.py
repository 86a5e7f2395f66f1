"""Teach a convolutional network turned digits with LoRA; `python examples/modules/digits.py`.

The base reads scikit-learn's handwritten digits (1,797 real ones, 8x8) and has never seen one lie on its
side. An adapter of a few thousand numbers teaches it; without the adapter the base is what it was.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lorary.trainer.modules import attach_lora, load_lora, save_lora


def build_network() -> nn.Sequential:
    """Return an untrained network from images [B, 1, 8, 8] to logits [B, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def fit(network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float) -> None:
    """Train what requires a gradient."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    network.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), 64):
            loss: Any = F.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose likeliest digit is right."""
    return float((network(images).argmax(-1) == labels).float().mean())


def run(folder: Path, *, seed: int = 0) -> dict[str, float]:
    """Train the base on upright digits and an adapter on turned ones; save and load the adapter.

    Returns:
        Accuracies on held-out images, and the number of trained values.
    """
    torch.manual_seed(seed)
    raw, targets = load_digits(return_X_y=True)
    upright = torch.tensor(raw / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(targets)
    turned = torch.rot90(upright, dims=(2, 3))
    order = torch.randperm(len(labels))
    test, train = order[:400], order[400:]

    network = build_network()
    fit(network, upright[train], labels[train], epochs=4, rate=5e-3)
    figures = {
        "upright, base": accuracy(network, upright[test], labels[test]),
        "turned, base": accuracy(network, turned[test], labels[test]),
    }
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    wrapped = attach_lora(network, rank=4, skip=["11"])  # the last layer stays as it is
    fit(wrapped, turned[train], labels[train], epochs=5, rate=2e-2)
    save_lora(wrapped, folder)

    again = build_network()
    again.load_state_dict(weights)
    loaded = load_lora(again, folder)
    figures["turned, adapter"] = accuracy(loaded, turned[test], labels[test])
    with wrapped.disable_adapter():
        figures["upright, adapter off"] = accuracy(wrapped, upright[test], labels[test])
    figures["trained values"] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    figures["base values"] = sum(value.numel() for value in weights.values())
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, value in run(Path(place)).items():
            print(f"{name:22} {value:g}")
