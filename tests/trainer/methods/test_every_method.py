"""Every method trains, and what the registry keeps and the engine serves of it computes what was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.errors import Cancelled
from lorary.registry import BaseCard, Registry
from lorary.trainer import fit as fit_module
from lorary.trainer import train as train_module
from lorary.trainer.methods.attach import METHODS, keep_unpacked
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.train import train
from tests.trainer.served import served_logprobs
from tests.trainer.test_train import _StopAfter, losses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]

CASES: dict[str, dict[str, Any]] = {
    # aLoRA is on from an invocation only: test_alora.py gives it one, and serves it.
    **{name: {} for name in METHODS if name != "alora"},
    "pissa": {"svd_iterations": 0},
    "vera": {"rank": 32},
    "adalora": {"target_rank": 2},
    "delta-lora": {"delta_start": 4, "delta_ratio": 1.0},
    "rslora-int8": {"quantization": "int8"},
    "dora-nf4": {"quantization": "nf4"},
    "adalora-nf4": {"quantization": "nf4"},
    "delta-lora-nf4": {"quantization": "nf4", "delta_start": 2},
    "pissa-and-lora-plus": {"optimizer": "lora-plus", "lr_ratio": 4.0},
    "full": {"rank": 64},  # as wide as the tiny base: nothing is cut off
}
RATES = {
    "vera": 1e-1,
    "lora-plus": 2e-3,
    "pissa": 1e-3,
    "olora": 1e-3,
    "loftq": 2e-3,
    "full": 1e-3,
}
TOKENS = torch.arange(3, 43).reshape(2, 20)
TOLERANCE = 2e-4
# Of what is served, over the same rounded base: int8 rounds activations by the row, too.
SERVED_TOLERANCE = {"none": 2e-4, "nf4": 2e-2, "int8": 0.1}


def name_of(case: str) -> str:
    """The method that a case begins with."""
    return max((name for name in METHODS if case.startswith(name)), key=len)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), quiet_libraries():
        result: torch.Tensor = model.eval()(TOKENS, use_cache=False).logits
    return result


@pytest.mark.parametrize("case", CASES)
def test_t8_what_is_kept_and_served_computes_what_was_trained(
    case: str,
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    from peft import PeftModel

    trained: list[torch.Tensor] = []
    evaluate = train_module._evaluate

    def spy(run: Any, model: Any, reporter: Any, who: str, task: str) -> Any:
        if who == "adapter":  # what is published; more than that may have been trained
            trained.append(logits(model))
            with model.disable_adapter():
                trained.append(logits(model))
        return evaluate(run, model, reporter, who, task)

    monkeypatch.setattr(train_module, "_evaluate", spy)
    name = name_of(case)
    recipe = make_recipe(
        method={"name": name, "rank": 4, **CASES[case]},
        training__max_steps=8,
        training__eval_every=4,
        training__learning_rate=RATES.get(name, 1e-2),
        evaluation={"skip_base": True, "num_golden_probes": 1, "report": False},
    )
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    history = [value for _, key, value in losses(tmp_path / "out") if key == "loss"]
    assert min(history[-3:]) < history[0]
    assert manifest.training["num_trainable"] > 0
    assert manifest.training["conversion_error"] < 1e-6

    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(tmp_path / "out", "a", base=BaseCard.from_folder(tiny_base))
    pulled = registry.pull("a", tmp_path / "pulled")
    kept = registry.manifest(registry.resolve("a"))
    assert kept.method.name == name
    assert kept.method.rank <= manifest.method.rank, "no more than the manifest says"
    assert kept.conversion is not None
    assert kept.conversion.max_error < 1e-6
    quantization = recipe.method.base_quantization
    base, served_base = (
        load_model(find_base(tiny_base), quantization=quantization, dtype=torch.float32)
        for _ in range(2)
    )
    for model in (base, served_base):
        keep_unpacked(model)
    bare = logits(base)
    with quiet_libraries():
        found = logits(PeftModel.from_pretrained(base, pulled))
    assert (found - trained[0]).abs().max() < TOLERANCE
    assert (bare - trained[1]).abs().max() < 1e-5, "with the adapter off, the base is the base"
    assert (bare - trained[0]).abs().max() > 10 * TOLERANCE

    served = served_logprobs(tiny_base, registry, "a", TOKENS[0].tolist(), served_base)
    difference = (served - found[0, :-1].log_softmax(-1)).abs().max()
    assert difference < SERVED_TOLERANCE[quantization]
    record_property("served", name)
    record_property(f"difference over {quantization}", f"{difference:.2e}")


RESUMED: dict[str, dict[str, Any]] = {
    "delta-lora": {"delta_start": 2},
    "adalora": {},
    "lora-fa": {},
    "lora-plus": {},
    "pissa": {},
    "vera": {"rank": 16},
    "eva": {},
    "dora": {},
    "full": {},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_that_of_an_unbroken_one(
    name: str,
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped at step 3 of 6: optimizer, method and weights go on from there, to the last bit."""
    from safetensors.torch import load_file

    recipe = make_recipe(
        method={"name": name, "rank": 4, **RESUMED[name]},
        evaluation={"skip_base": True, "num_golden_probes": 1, "report": False},
    )
    train(recipe, tmp_path / "whole", reporter=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_Steps", _StopAfter)
        with pytest.raises(Cancelled, match="stopped at step 3 of 6"):
            train(recipe, tmp_path / "broken", reporter=quiet)
    train(recipe, tmp_path / "broken", resume=True, reporter=quiet)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert [entry for entry in resumed if entry in whole] == whole
    expected, found = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("whole", "broken")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
