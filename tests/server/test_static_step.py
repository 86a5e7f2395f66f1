"""Decode steps in fixed shapes are the steps that they stand for: here eagerly, in Triton's interpreter.

On a GPU the same steps are captured (``test_gpu``).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import ConfigError
from lorary.server.adapters.layers import LoraModel
from lorary.server.engine import assemble as assemble_module
from lorary.server.engine import runner as runner_module
from lorary.server.engine.static_step import Form, sizes_up_to
from lorary.server.engine.upload import pack, unpack
from lorary.server.native import library as native
from tests.conftest import peft_greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorary.server.engine.batch import Batch
    from tests.server.conftest import EngineWorld

pytest.importorskip("triton", reason="Triton has no wheel for this system")

NAMES = ["bravo", "", "echo", "alpha", "bravo"]


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that take the way of a GPU: Triton's kernels, and all that a step says in one copy."""
    monkeypatch.setattr(native, "load", lambda: "not wanted here")
    through_triton = functools.partial(LoraModel, ops="triton")
    monkeypatch.setattr(assemble_module, "LoraModel", through_triton)

    def uploaded(parts: Sequence[torch.Tensor], _device: torch.device) -> list[torch.Tensor]:
        return unpack(pack(parts, pin=False), parts)

    monkeypatch.setattr(runner_module, "upload", uploaded)
    monkeypatch.setattr(runner_module, "is_beside", lambda _device: False)


@pytest.mark.usefixtures("like_a_gpu")
def test_steps_in_fixed_shapes_equal_others_bit_by_bit_in_the_cache(
    make_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """While answers begin and end at their own times: logits, keys and values, and PEFT's tokens."""
    world = make_world(max_batch=5, max_rank=33, cuda_graphs=True, draft_rows=0, start=False)
    runner, cache, steps = world.engine._runner, world.engine._cache, world.engine._runner.static
    assert steps is not None
    assert steps.forms[0] == Form(5, 8, 33)
    static = steps.forward
    forms: set[Form | None] = set()

    def both(batch: Batch) -> torch.Tensor | None:
        """Make a step twice, in its form and without."""
        forms.add(steps.form_of(batch))
        found = static(batch)
        if found is None:
            return None
        found = found.clone()
        kept = [part[:, : cache.num_blocks].clone() for part in (cache.k, cache.v)]
        runner.static = None
        expected = runner.forward(batch)
        runner.static = steps
        assert isinstance(expected, torch.Tensor)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4
        for part, before in zip((cache.k, cache.v), kept, strict=True):
            assert (part[:, : cache.num_blocks] - before).abs().max() < 1e-5
        return found

    steps.forward = both  # type: ignore[method-assign]
    for name in {*NAMES} - {""}:
        world.residency.load(world.registry.resolve(name))
    asked = [[5 + i, 9, 30 + i, 11] * (1 + 3 * i) for i in range(len(NAMES))]
    lengths = [3, 8, 5, 7, 6]
    ids = [
        world.submit(prompt, name, max_tokens=length, ignore_eos=True)
        for prompt, name, length in zip(asked, NAMES, lengths, strict=True)
    ]
    world.engine.start()
    for request_id, name, prompt, length in zip(ids, NAMES, asked, lengths, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        adapter = tiny_adapters.get(name)
        assert tokens == peft_greedy(tiny_base, adapter, prompt, length, ignore_eos=True)
    # Prompts have no form; decode steps of five, four, two and one row have, with adapters or none left.
    assert {None, Form(5, 8, 33), Form(4, 8, 33), Form(1, 8, 0)} <= forms


@pytest.mark.usefixtures("like_a_gpu")
def test_what_is_too_large_for_every_form_runs_without(
    make_world: Callable[..., EngineWorld],
) -> None:
    world = make_world(max_batch=1, max_rank=8, cuda_graphs=True, start=False)
    static = world.engine._runner.static
    assert static is not None
    assert [form.rank for form in static.forms] == [8, 0]

    def form(rank: int) -> Form | None:
        plan: Any = type("Plan", (), {"chunks": (), "num_decode": 1, "longest": 3})
        entry: Any = type("Entry", (), {"rank": rank})
        segments: Any = type("Segments", (), {"entries": (entry,)})
        batch: Any = type("Batch", (), {"plan": plan, "segments": segments, "merged": None})
        return static.form_of(batch)

    assert form(8) == Form(1, 8, 8)
    assert form(9) is None


def test_sizes_reach_the_most_and_go_no_further() -> None:
    assert sizes_up_to(48, 1, 2) == [1, 2, 4, 8, 16, 32, 48]
    assert sizes_up_to(128, 16, 4) == [16, 64, 128]
    assert sizes_up_to(64, 64, 8) == [64]
    assert sizes_up_to(3, 64, 8) == [3]


def test_without_a_gpu_it_is_refused(make_world: Callable[..., EngineWorld]) -> None:
    with pytest.raises(ConfigError, match="--cuda-graphs needs an NVIDIA GPU"):
        make_world(cuda_graphs=True, start=False)
