"""The examples beside language models really learn, and leave their base as it was, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from examples.modules import cartpole, digits, style_transfer

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Small products are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Watched:
    """Stands for an example's ``attach_lora`` and remembers the base before, and the wrapper."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, example: ModuleType) -> None:
        self._attach = example.attach_lora
        self.before: dict[str, torch.Tensor] = {}
        self.wrapped: Any = None
        monkeypatch.setattr(example, "attach_lora", self)

    def __call__(self, model: Any, **options: Any) -> Any:
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        self.wrapped = self._attach(model, **options)
        return self.wrapped

    def assert_base_is_as_before(self) -> None:
        state = self.wrapped.get_base_model().state_dict()
        after = {n.replace(".base_layer.", "."): v for n, v in state.items() if ".lora_" not in n}
        assert after.keys() == self.before.keys()
        changed = [n for n, value in after.items() if not torch.equal(value, self.before[n])]
        assert not changed


def test_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, digits)
    found = digits.run(tmp_path)
    assert found["upright, base"] > 0.9
    assert found["turned, base"] < 0.4
    assert found["turned, adapter"] > 0.85
    assert found["upright, adapter off"] == found["upright, base"]
    watched.assert_base_is_as_before()


def test_style_transfer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, style_transfer)
    found, beside = style_transfer.run(tmp_path, steps=80)
    assert found["style loss, adapter"] < 0.6 * found["style loss, base"]
    assert found["content error, adapter"] < 0.06, "the picture is still to be seen"
    assert beside.shape[0] == 3
    watched.assert_base_is_as_before()


def test_cartpole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, cartpole)
    found = cartpole.run(tmp_path, steps=800)
    assert found["right cart, base"] > 100
    assert found["crossed cart, base"] < 20
    assert found["crossed cart, adapter"] > 100
    assert found["right cart, adapter off"] == found["right cart, base"]
    watched.assert_base_is_as_before()
