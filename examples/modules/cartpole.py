"""Teach a Q-network a cart that is wired the wrong way round, with LoRA; `python examples/modules/cartpole.py`.

The base balances gymnasium's CartPole (deep Q-learning: Mnih et al. 2015, doi 10.1038/nature14236, with the
double estimate of van Hasselt et al. 2016, arXiv 1509.06461). Then the motor's wires are crossed, and every
push goes the other way. An adapter learns the new cart; without it the base still drives the old one.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.trainer.modules import attach_lora, load_lora, save_lora

CARTS = 8
DISCOUNT = 0.98


def build_network() -> nn.Sequential:
    """Return an untrained network from states [B, 4] to the values of both pushes [B, 2]."""
    return nn.Sequential(
        *(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
    )


def make_carts(count: int, *, crossed: bool) -> Any:
    """Return ``count`` carts that are driven together; with ``crossed``, a push goes the other way."""
    carts = gymnasium.make_vec("CartPole-v1", count, vectorization_mode="vector_entry_point")
    if crossed:
        cart: Any = carts.unwrapped
        cart.force_mag = -cart.force_mag
    return carts


def fit(network: nn.Module, *, crossed: bool, steps: int, seed: int, rate: float) -> None:
    """Train what requires a gradient, by driving; the weights that drove best are kept."""
    carts = make_carts(CARTS, crossed=crossed)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer, random = torch.optim.Adam(trained, lr=rate), np.random.default_rng(seed)
    target = copy.deepcopy(network)
    best, longest = copy.deepcopy(network.state_dict()), 0.0
    seen: list[tuple[Tensor, ...]] = []
    states, _ = carts.reset(seed=seed)
    was_done = np.zeros(CARTS, dtype=bool)
    for step in range(steps):
        explore = max(0.05, 1 - step / (0.4 * steps))
        pushes = best_pushes(network, states)
        pushes = np.where(random.random(CARTS) < explore, random.integers(0, 2, CARTS), pushes)
        after, rewards, fell, timed_out, _ = carts.step(pushes)
        kept = ~was_done  # the step after an end only sets the cart up again
        row = (states, pushes, rewards, after, fell)
        seen.append(tuple(torch.as_tensor(part[kept]) for part in row))
        states, was_done = after, fell | timed_out
        if step % 100 == 0:
            target.load_state_dict(network.state_dict())
            memory = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        if step >= 100:
            rows = torch.as_tensor(random.integers(0, len(memory[0]), 128))
            loss: Any = q_loss(network, target, [part[rows] for part in memory])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 10.0)
            optimizer.step()
        if step % 100 == 99:
            lasted = mean_steps(network, crossed=crossed, seed=seed)
            if lasted > longest:
                best, longest = copy.deepcopy(network.state_dict()), lasted
    carts.close()
    network.load_state_dict(best)


def q_loss(network: nn.Module, target: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the Huber loss of values against reward and the next state's discounted value."""
    states, pushes, rewards, after, fell = batch
    with torch.no_grad():
        best = network(after).argmax(-1, keepdim=True)
        later = target(after).gather(1, best)[:, 0] * ~fell
    values = network(states).gather(1, pushes.long()[:, None])[:, 0]
    return F.smooth_l1_loss(values, rewards.float() + DISCOUNT * later)


@torch.inference_mode()
def best_pushes(network: nn.Module, states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the push of the greater value for each cart."""
    pushes: np.ndarray[Any, Any] = network(torch.as_tensor(states)).argmax(-1).numpy()
    return pushes


def mean_steps(network: nn.Module, *, crossed: bool, seed: int = 1000, episodes: int = 20) -> float:
    """Return for how many steps the pole stays up, at most 500, over the starts of ``seed``."""
    carts = make_carts(episodes, crossed=crossed)
    states, _ = carts.reset(seed=seed)
    is_up, lasted = np.ones(episodes, dtype=bool), np.zeros(episodes)
    while is_up.any():
        states, _, fell, timed_out, _ = carts.step(best_pushes(network, states))
        lasted += is_up
        is_up &= ~(fell | timed_out)
    carts.close()
    return float(lasted.mean())


def run(folder: Path, *, steps: int = 1000, seed: int = 0) -> dict[str, float]:
    """Train the base on the right cart and an adapter on the crossed one; save and load the adapter.

    Returns:
        Mean steps that the pole stays up, and the number of trained values.
    """
    torch.manual_seed(seed)
    network = build_network()
    fit(network, crossed=False, steps=steps, seed=seed, rate=2e-3)
    figures = {
        "right cart, base": mean_steps(network, crossed=False),
        "crossed cart, base": mean_steps(network, crossed=True),
    }
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    wrapped = attach_lora(network, rank=4)
    fit(wrapped, crossed=True, steps=steps, seed=seed, rate=5e-3)
    save_lora(wrapped, folder)

    again = build_network()
    again.load_state_dict(weights)
    loaded = load_lora(again, folder)
    figures["crossed cart, adapter"] = mean_steps(loaded, crossed=True)
    with wrapped.disable_adapter():
        figures["right cart, adapter off"] = mean_steps(wrapped, crossed=False)
    figures["trained values"] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    figures["base values"] = sum(value.numel() for value in weights.values())
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, value in run(Path(place)).items():
            print(f"{name:24} {value:g}")
