"""Give an image network another style with LoRA; `python examples/modules/style_transfer.py OUT.png`.

Fast neural style (Johnson et al. 2016, arXiv 1603.08155): a small network turns a picture into its styled
version in one pass, and is trained on what a fixed network sees in both. Here that fixed network has random
filters, which are enough to tell textures apart (Ustyuzhaninov et al. 2016, arXiv 1606.00021), so nothing is
downloaded. The base only redraws pictures; each style is an adapter of it. Pictures: scikit-learn's two.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from lorary.trainer.modules import attach_lora, load_lora, save_lora

PATCH = 48
CONTENT_WEIGHT = 4.0


class Residual(nn.Module):
    """Two convolutions beside a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape [B, channels, H, W]."""
        change: Tensor = self.second(F.relu(self.first(x)))
        return x + change


def build_network() -> nn.Sequential:
    """Return an untrained network from pictures [B, 3, H, W] in [0, 1] to pictures of the same size."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, padding_mode="reflect"), nn.ReLU()),
        *(Residual(32), Residual(32), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(32, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        *(nn.Conv2d(16, 3, 3, padding=1, padding_mode="reflect"), nn.Sigmoid()),
    )


class Eye(nn.Module):
    """Random filters of three sizes, fixed: what content and style are compared by."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv2d(3, 24, size, stride=2) for size in (3, 7, 11))
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Return one feature map [B, 24, h, w] for each filter size."""
        return [F.relu(one(pictures - 0.5)) for one in self.filters]


def grams(maps: list[Tensor]) -> list[Tensor]:
    """Return each map's correlations of channels [B, 24, 24]: its texture, wherever things are."""
    flat = [one.flatten(2) for one in maps]
    return [one @ one.transpose(1, 2) / one.shape[2] for one in flat]


def style_loss(maps: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Return the squared distance to a style's correlations, relative to their own size."""
    pairs = zip(grams(maps), wanted, strict=True)
    return torch.stack([F.mse_loss(g, w.expand_as(g)) / w.square().mean() for g, w in pairs]).mean()


def picture(name: str) -> Tensor:
    """Return one of scikit-learn's photographs at half its size, [3, H, W] in [0, 1]."""
    pixels = torch.tensor(load_sample_image(name)).permute(2, 0, 1).float() / 255
    return F.avg_pool2d(pixels, 2)


def patches(image: Tensor, count: int) -> Tensor:
    """Cut random squares, [count, 3, PATCH, PATCH]."""
    tops = torch.randint(image.shape[1] - PATCH, (count,)).tolist()
    lefts = torch.randint(image.shape[2] - PATCH, (count,)).tolist()
    squares = zip(tops, lefts, strict=True)
    return torch.stack([image[:, t : t + PATCH, x : x + PATCH] for t, x in squares])


def fit(
    network: nn.Module, image: Tensor, eye: Eye, style: list[Tensor] | None, *, steps: int
) -> None:
    """Train what requires a gradient: to redraw patches, and to redraw them in ``style`` if there is one."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(steps):
        given = patches(image, 4)
        drawn = network(given)
        loss: Any = F.mse_loss(drawn, given)
        if style is not None:
            # Content is what is where, roughly: compared at an eighth of the size.
            loss = F.mse_loss(F.avg_pool2d(drawn, 8), F.avg_pool2d(given, 8))
            loss = CONTENT_WEIGHT * loss + style_loss(eye(drawn), style)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(folder: Path, *, steps: int = 200, seed: int = 0) -> tuple[dict[str, float], Tensor]:
    """Train the base and one style's adapter; save and load the adapter.

    Returns:
        Losses on the half of the picture that was not trained on, and that half as given, as the base
        redraws it and as the adapter does, beside each other, [3, H, 3 W].
    """
    torch.manual_seed(seed)
    content, eye = picture("china.jpg"), Eye()
    left, right = content.chunk(2, dim=2)
    style = grams(eye(picture("flower.jpg")[None]))
    network = build_network()
    fit(network, left, eye, None, steps=steps)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    wrapped = attach_lora(network, rank=8)
    fit(wrapped, left, eye, style, steps=steps)
    save_lora(wrapped, folder)

    again = build_network()
    again.load_state_dict(weights)
    loaded = load_lora(again, folder)
    held_out = right[None, :, : right.shape[1] // 8 * 8, : right.shape[2] // 8 * 8]
    with torch.inference_mode():
        drawn = loaded(held_out)
        with loaded.disable_adapter():
            redrawn = loaded(held_out)
        figures = {
            "style loss, picture": float(style_loss(eye(held_out), style)),
            "style loss, base": float(style_loss(eye(redrawn), style)),
            "style loss, adapter": float(style_loss(eye(drawn), style)),
            "content error, base": float(F.mse_loss(redrawn, held_out)),
            "content error, adapter": float(F.mse_loss(drawn, held_out)),
            "trained values": sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
            "base values": sum(value.numel() for value in weights.values()),
        }
    return figures, torch.cat([held_out, redrawn, drawn], dim=3)[0]


if __name__ == "__main__":
    from PIL import Image

    with tempfile.TemporaryDirectory() as place:
        found, beside = run(Path(place))
    for name, value in found.items():
        print(f"{name:24} {value:.4g}")
    if sys.argv[1:]:
        pixels = (beside.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(sys.argv[1])
