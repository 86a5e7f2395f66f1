"""Whole runs over the tiny base: what they write, what stops them, and what resuming gives."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import (
    AlreadyExists,
    BaseNotFound,
    Cancelled,
    IncompatibleAdapter,
    InvalidRecipe,
    StorageError,
    TrainingFailed,
)
from lorary.registry.manifest import Manifest
from lorary.trainer import fit as fit_module
from lorary.trainer.output import write_output
from lorary.trainer.train import prepare, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Every loss of a run, exactly."""
    rows = jsonl(folder / "report" / "history.jsonl")
    return [
        (row["step"], key, row[key]) for row in rows for key in ("loss", "eval_loss") if key in row
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_run_learns_and_writes_a_standard_folder(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(training__max_steps=40, training__eval_every=20)
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    assert files == {
        *("adapter_config.json", "adapter_model.safetensors", "manifest.json", "report"),
        *("report/metrics.json", "report/examples.jsonl", "report/history.jsonl"),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "checkpoints and drafts are gone"
    assert manifest == Manifest.from_json((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.metrics is not None
    assert manifest.metrics.adapter["accuracy"] == 1.0
    assert manifest.metrics.adapter["exact"] == 1.0
    assert manifest.metrics.base["exact"] < 0.5
    assert manifest.metrics.num_examples == manifest.data["num_test"] == 12
    assert manifest.base.fingerprint.startswith("sha256:")
    assert manifest.method.target_modules[0] == "down_proj"
    assert manifest.training["recipe"]["training"]["max_steps"] == 40
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == (tiny_base.name)
    examples = jsonl(tmp_path / "out" / "report" / "examples.jsonl")
    assert len(examples) == 12
    assert examples[0]["prediction"]["adapter"] == examples[0]["target"]


def test_golden_probes_are_what_a_fresh_load_computes(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorary.trainer.quiet import quiet_libraries

    manifest = train(make_recipe(), tmp_path / "out", reporter=quiet)
    assert len(manifest.golden_probes) == 3
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with quiet_libraries():
        model = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    for probe in manifest.golden_probes:
        with torch.inference_mode():
            logits = model(torch.tensor([probe.token_ids])).logits[0, -1]
        assert len(probe.top_token_ids) == 16
        expected = torch.tensor(probe.top_logits)
        torch.testing.assert_close(logits[list(probe.top_token_ids)], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "delta-lora"])
def test_an_adapter_of_the_late_layers_changes_no_other_and_is_accepted(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path, method: str
) -> None:
    from lorary.registry import BaseCard, Registry

    recipe = make_recipe(method__name=method, method__layers_to_transform=[1])
    train(recipe, tmp_path / "out", reporter=quiet)
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(tmp_path / "out", "late", base=BaseCard.from_folder(tiny_base))
    kept = tensors(registry.fetch(registry.resolve("late")))
    assert len(kept) == 2 * 7
    assert all(".layers.1." in name for name in kept)


def test_published_adapter_is_accepted_by_the_registry(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path
) -> None:
    from lorary.registry import BaseCard, Registry

    train(make_recipe(), tmp_path / "out", reporter=quiet)
    registry = Registry.open(tmp_path / "registry", create=True)
    version = registry.push(tmp_path / "out", "tiny", base=BaseCard.from_folder(tiny_base))
    assert version.version == 1


def test_same_seed_gives_the_same_run(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        train(make_recipe(), tmp_path / name, reporter=quiet)
    train(make_recipe(training__seed=1), tmp_path / "c", reporter=quiet)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


class _StopAfter(fit_module._Steps):
    """Sends a signal to this process at the end of step 3, as a person or a cluster would."""

    number = signal.SIGTERM

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "dropout"), [(signal.SIGTERM, 0.2), (signal.SIGINT, 0.0)])
def test_resumed_run_has_the_very_losses_and_weights_of_an_unbroken_one(
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    dropout: float,
) -> None:
    """Stopped between two validations, so neither the plan nor the generator may lose its place."""
    recipe = make_recipe(method__dropout=dropout, training__gradient_accumulation=2)
    train(recipe, tmp_path / "whole", reporter=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(_StopAfter, "number", number)
        patch.setattr(fit_module, "_Steps", _StopAfter)
        with pytest.raises(Cancelled, match="stopped at step 3 of 6"):
            train(recipe, tmp_path / "broken", reporter=quiet)
    assert not (tmp_path / "broken").exists()
    train(recipe, tmp_path / "broken", resume=True, reporter=quiet)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert [entry for entry in resumed if entry in whole] == whole
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_handlers_are_restored(make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(make_recipe(), tmp_path / "out", reporter=quiet)
    assert signal.getsignal(signal.SIGTERM) is before


def test_resume_takes_whole_checkpoints_of_the_same_run_only(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checkpoints = tmp_path / "out", tmp_path / "out.checkpoints"
    with pytest.raises(InvalidRecipe, match="holds no whole checkpoint"):
        train(make_recipe(), out, resume=True, reporter=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_Steps", _StopAfter)
        with pytest.raises(Cancelled):
            train(make_recipe(), out, reporter=quiet)
    with pytest.raises(IncompatibleAdapter, match="another recipe, base or data"):
        train(make_recipe(training__learning_rate=1e-3), out, resume=True, reporter=quiet)
    # A checkpoint that was being written when the process died has no marker.
    (checkpoints / "checkpoint-3" / "lorary.json").unlink()
    (checkpoints / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    train(make_recipe(), out, resume=True, reporter=quiet)
    assert losses(out)[-1][0] == 6


def test_loss_that_is_not_finite_stops_the_run(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = (torch.full((1, 4), torch.nan), torch.tensor([0]))
    monkeypatch.setattr("lorary.trainer.loop.selected_logits", lambda *_args: nan)
    with pytest.raises(TrainingFailed, match=r"the loss is nan at step 1\. Lower"):
        train(make_recipe(), tmp_path / "out", reporter=quiet)
    assert not (tmp_path / "out").exists()


def test_memory_that_ran_out_says_which_knobs_to_turn(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr("lorary.trainer.loop.selected_logits", fail)
    with pytest.raises(TrainingFailed, match=r"Lower training\.batch_size \(4\)"):
        train(make_recipe(), tmp_path / "out", reporter=quiet)


def test_full_disk_is_a_storage_error_and_keeps_the_old_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write_output(tmp_path / "out", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_existing_output_is_replaced_by_force_only(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    recipe = make_recipe(training__max_steps=1)
    train(recipe, tmp_path / "out", reporter=quiet)
    with pytest.raises(AlreadyExists, match="--force"):
        train(recipe, tmp_path / "out", reporter=quiet)
    (tmp_path / "out" / "note").touch()
    train(recipe, tmp_path / "out", force=True, reporter=quiet)
    assert not (tmp_path / "out" / "note").exists()
    (tmp_path / "precious").mkdir()
    with pytest.raises(AlreadyExists, match="not the output of a training run"):
        train(recipe, tmp_path / "precious", force=True, reporter=quiet)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"base": "no-such-base"}, BaseNotFound, "no-such-base"),
        ({"training__device": "abacus"}, InvalidRecipe, "'abacus'"),
        ({"training__max_length": 5}, InvalidRecipe, "Raise it"),
        ({"method__target_modules": ["q_prj"]}, InvalidRecipe, "q_prj"),
        ({"method__layers_to_transform": [1, 7]}, InvalidRecipe, r"names \[7\].*in layers 0 to 1"),
        ({"method__layers_to_transform": [7]}, InvalidRecipe, r"names \[7\].*in layers 0 to 1"),
        ({"method__layers_to_transform": [1, 1]}, InvalidRecipe, "repeats a number"),
    ],
)
def test_what_cannot_work_is_found_before_any_output(
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        train(make_recipe(**changes), tmp_path / "out", reporter=quiet)
    assert not list(tmp_path.iterdir())


def test_early_stopping_keeps_the_best_step(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    """A rate far too high makes validation worse and worse: the run ends after its patience."""
    recipe = make_recipe(
        training__max_steps=60,
        training__eval_every=1,
        training__patience=2,
        training__learning_rate=0.5,
        training__warmup=0.0,
    )
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    facts = manifest.training
    assert facts["steps"] < 60
    validation = {step: v for step, key, v in losses(tmp_path / "out") if key == "eval_loss"}
    assert facts["best_step"] == min(validation, key=lambda step: validation[step])


def test_without_validation_every_step_is_taken(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    recipe = make_recipe(data__num_validation=0, evaluation={"skip_base": True})
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    assert (manifest.training["steps"], manifest.training["best_step"]) == (6, 6)
    assert manifest.metrics is not None
    assert manifest.metrics.base == {}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_qlora_trains_on_a_quantized_base(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, quantization: str
) -> None:
    recipe = make_recipe(method={"name": "qlora", "rank": 4, "quantization": quantization})
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    assert manifest.base.quantization == quantization
    history = [value for _, key, value in losses(tmp_path / "out") if key == "loss"]
    assert history[-1] < history[0]


def test_gradient_checkpointing_gives_the_same_losses(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    train(make_recipe(), tmp_path / "a", reporter=quiet)
    train(make_recipe(training__gradient_checkpointing=True), tmp_path / "b", reporter=quiet)
    for one, other in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=1e-4)


def test_prepare_writes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prepared = prepare(make_recipe())
    assert len(prepared.train_rows) == len(prepared.splits.train) == 110 - 18
    assert prepared.recipe.training.device == "cpu"
    assert not list(tmp_path.iterdir())
