"""Full fine-tuning: the steps are plain training's, and what is published is the best of its rank."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.errors import IncompatibleAdapter, InvalidRecipe, InvalidRequest
from lorary.registry.weight_diff import compare_weights
from lorary.trainer.methods.attach import attach
from lorary.trainer.methods.full import best_of_rank
from lorary.trainer.methods.method import ADAPTER, lora_layers
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.recipe import MethodRecipe
from lorary.trainer.report.ranks import read_run
from lorary.trainer.report.weights import module_changes
from lorary.trainer.train import train
from tests.trainer.methods.test_what_papers_say import IDS, TARGETS, loss_of, trainable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe


def test_a_change_of_low_rank_is_found_again_and_a_cut_one_loses_its_tail() -> None:
    torch.manual_seed(0)
    change = torch.randn(48, 5).double() @ torch.randn(5, 32).double()
    found, values, error = best_of_rank(change, 5)
    assert (found.b.shape, found.a.shape) == ((48, 5), (5, 32))
    torch.testing.assert_close(found.b @ found.a, change.float(), rtol=1e-5, atol=1e-5)
    assert error < 1e-6
    assert values[5] < 1e-12 * values[0]
    _, values, error = best_of_rank(change, 3)
    exact = torch.linalg.svdvals(change)
    torch.testing.assert_close(values, exact)
    assert error == pytest.approx(float(exact[3:].norm() / exact.norm()), rel=1e-6)
    nothing, values, error = best_of_rank(torch.zeros(4, 3).double(), 2)
    assert error == 0
    assert not (nothing.b @ nothing.a).any()
    assert not values.any()


def test_it_takes_the_steps_of_the_base_itself_and_publishes_its_change(tiny_base: Path) -> None:
    def base() -> Any:
        return load_model(find_base(tiny_base), dtype=torch.float32)

    recipe = MethodRecipe(name="full", rank=64, target_modules=TARGETS)
    method = attach(base(), recipe, gradient_checkpointing=False)
    literal = base().requires_grad_(False)
    for name in lora_layers(method.model):
        literal.get_submodule(name).weight.requires_grad_(True)
    assert sum(p.numel() for p in trainable(method.model)) == sum(
        p.numel() for p in trainable(literal)
    )
    for model in (method.model, literal):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.equal(loss_of(method.model), loss_of(literal))
    with method.model.disable_adapter():
        torch.testing.assert_close(loss_of(method.model), loss_of(base()))
    method.cut()
    with quiet_libraries(), torch.no_grad():
        found = method.model(IDS, use_cache=False).logits
        wanted = literal(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for name, layer in lora_layers(method.model).items():
        moved = literal.get_submodule(name).weight.detach() - layer.get_base_layer().weight
        product = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
        torch.testing.assert_close(product, moved, rtol=0, atol=1e-5)
    for one in module_changes(method.model):
        assert one.kept_energy == pytest.approx(one.energy)


def test_it_keeps_steps_that_the_dtype_of_the_base_cannot_tell_apart(tiny_base: Path) -> None:
    model = load_model(find_base(tiny_base), dtype=torch.bfloat16)
    recipe = MethodRecipe(name="full", rank=4, target_modules=TARGETS)
    method = attach(model, recipe, gradient_checkpointing=False)
    with torch.no_grad():
        for parameter in trainable(method.model):
            parameter.mul_(1 + 2**-12)  # half a unit in bfloat16's last place is 2^-9
    method.cut()
    ratios = [one.ratio for one in module_changes(method.model)]
    assert ratios == pytest.approx([2**-12] * len(ratios), rel=1e-3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_only_linear_layers_can_be_trained(tiny_base: Path) -> None:
    model = load_model(find_base(tiny_base), dtype=torch.float32)
    recipe = MethodRecipe(name="full", target_modules=("embed_tokens",))
    with pytest.raises(InvalidRecipe, match="which is no linear layer"):
        attach(model, recipe, gradient_checkpointing=False)


def test_the_report_shows_what_the_cut_cost_and_another_runs_ranks(
    make_recipe: Callable[..., Recipe], quiet: Reporter, tmp_path: Path
) -> None:
    shown = {
        "evaluation": {"report": True, "num_attention_maps": 0, "num_golden_probes": 1},
        "training__max_steps": 3,
    }
    train(make_recipe(**shown), tmp_path / "lora", reporter=quiet)
    recipe = make_recipe(**shown, method={"name": "full", "rank": 2}, training__learning_rate=1e-3)
    manifest = train(recipe, tmp_path / "full", reporter=quiet, beside=[tmp_path / "lora"])
    rows = json.loads((tmp_path / "full/report/weights.json").read_text())["modules"]
    squares = [[value**2 for value in row["singular_values"]] for row in rows]
    tails = [sum(row[2:]) / sum(row) for row in squares]
    uncut = manifest.training["uncut"]
    assert manifest.training["conversion_error"] == pytest.approx(max(tails) ** 0.5, rel=1e-4)
    whole = sum(map(sum, squares))
    kept = sum(sum(row[:2]) for row in squares)
    assert uncut["kept_share"] == pytest.approx(kept / whole, rel=1e-4)
    assert 0.1 < uncut["kept_share"] < 0.99
    assert uncut["rank_90"] > 2
    assert {row["published_rank"] for row in rows} == {2}
    figures = json.loads((tmp_path / "full/report/metrics.json").read_text())
    assert figures["uncut"]["base"] == uncut["metrics"]
    assert figures["uncut"]["adapter"] == figures["adapter"]
    page = (tmp_path / "full/report/report.html").read_text()
    assert "<th>fully tuned</th>" in page
    assert f"<td>{uncut['kept_share']:.1%}</td>" in page
    both = [page.count(f"<td>{name}</td>") for name in ("full, rank 2", "beside: lora, rank 4")]
    assert both == [8, 8], "seven kinds of module, and all"
    diff = compare_weights(
        *(tmp_path / name / "adapter_model.safetensors" for name in ("full", "lora"))
    )
    overlap = statistics.median(one.overlap for one in diff if one.overlap is not None)
    assert f"<td>{overlap:.3f}</td>" in page

    plain = (tmp_path / "lora/report/report.html").read_text()
    assert "fully tuned" not in plain
    with pytest.raises(InvalidRequest, match="shows other runs in the report"):
        train(make_recipe(), tmp_path / "other", reporter=quiet, beside=[tmp_path / "lora"])
    with pytest.raises(IncompatibleAdapter, match="this run's base is another one"):
        read_run(tmp_path / "lora", "sha256:other")
    (tmp_path / "lora/report/weights.json").unlink()
    with pytest.raises(InvalidRequest, match="cannot be shown beside this run"):
        read_run(tmp_path / "lora", manifest.base.fingerprint)
