"""Plans from sensitivities: within the budget, better than chance, accepted where plans are read."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model, load_tokenizer
from lorary.bases.plan import read_plan
from lorary.errors import InvalidRecipe, InvalidRequest
from lorary.registry.cli_support import exit_code_of
from lorary.trainer.quantplan.allocate import allocate, mean_bits, parse_budget, plan_of
from lorary.trainer.quantplan.cli import app
from lorary.trainer.quantplan.run import make_plan, measure_point
from lorary.trainer.quantplan.sensitivity import compare_models, measure_sensitivity, rounded
from lorary.trainer.quantplan.text import Blocks, make_blocks
from lorary.trainer.quantplan.use import plan_facts
from lorary.trainer.train import fit_adapter, prepare
from tests.conftest import WORDS, build_llama

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.bases import Base
    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Sentences with a rule in them: each word decides the next, nearly always."""
    draw = random.Random(0)
    follow = {word: draw.sample(WORDS, 2) for word in WORDS}
    found = []
    for _ in range(9000):
        words = [draw.choice(WORDS)]
        while len(words) < 12:
            words.append(follow[words[-1]][draw.random() < 0.1])
        found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def learned(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny Llama that has learned the rule (else perplexity means nothing), with outliers.

    A few channels between ``up_proj`` and ``down_proj`` are scaled there and back: the same function, but
    blocks of ``down_proj`` now hold weights of very different sizes, as those of grown models do.
    """
    folder = build_llama(tmp_path_factory.mktemp("bases") / "learned", initializer_range=0.05)
    base = find_base(folder)
    model: Any = load_model(base, dtype=torch.float32).train()
    blocks = make_blocks(texts, load_tokenizer(base), count=960, length=48).calibration
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for ids in torch.split(blocks, 12):  # each once, so that nothing is learned by heart
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::32] /= 60
            layer.mlp.down_proj.weight[:, ::32] *= 60
    model.save_pretrained(folder)
    return find_base(folder)


@pytest.fixture(scope="module")
def blocks(learned: Base, texts: list[str]) -> Blocks:
    return make_blocks(texts, load_tokenizer(learned), count=100, length=48)


def test_a_plan_is_within_its_budget_and_better_than_random_ones_of_its_size(
    learned: Base, blocks: Blocks, quiet: Reporter
) -> None:
    planned = make_plan(
        learned, blocks, budget=7.0, quantization="nf4", device="cpu", reporter=quiet
    )
    chosen = planned.chosen
    assert 6.0 < chosen.bits <= 7.0
    whole = load_model(learned, dtype=torch.float32)
    shapes: dict[str, tuple[int, int]] = {
        name: tuple(whole.get_submodule(name).weight.shape) for name in planned.sensitivity
    }
    others = []
    for seed in range(4):
        draw = random.Random(seed)
        formats = allocate({name: draw.random() for name in shapes}, shapes, "nf4", 7.0)
        others.append(measure_point("random", learned, whole, formats, shapes, blocks, "cpu"))
        assert others[-1].bits == pytest.approx(chosen.bits, abs=0.5)
    assert chosen.perplexity < min(point.perplexity for point in others)
    assert chosen.divergence < min(point.divergence for point in others)
    ends = {point.name: point for point in planned.points}
    assert ends["nf4"].perplexity > chosen.perplexity > ends["whole"].perplexity


def test_sensitivity_is_the_divergence_that_one_layer_costs(learned: Base, blocks: Blocks) -> None:
    """Oracle: quantize one layer alone, and measure."""
    model: Any = load_model(learned, dtype=torch.float32)
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.v_proj", "mlp.up_proj")]
    told = measure_sensitivity(model, names, "nf4", blocks.calibration)
    whole = load_model(learned, dtype=torch.float32)
    for name in names:
        weight = model.get_submodule(name).weight
        kept = weight.detach().clone()
        weight.data = rounded(kept, "nf4")
        _, measured = compare_models(whole, model, blocks.calibration)
        weight.data = kept
        assert told[name] == pytest.approx(measured, rel=0.6), name


def test_the_command_writes_what_readers_of_plans_take(
    learned: Base, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(texts))
    output = tmp_path / "plan.yaml"
    args = [str(learned.path), "--budget", "6bits", "--text", str(corpus), "--threads", "1"]
    args += ["--samples", "8", "--length", "32", "--output", str(output), "--json"]
    assert exit_code_of(lambda: app(args=args, standalone_mode=False)) == 0
    said = json.loads(capsys.readouterr().out)
    formats = read_plan(output).resolve(learned)
    assert [name for name, kept in formats.items() if kept == "none"] == sorted(
        said["kept_whole"], key=list(formats).index
    )
    assert 0 < len(said["kept_whole"]) < len(formats)
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert set(figures["sensitivity_nats_per_token"]) == set(formats)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert exit_code_of(lambda: app(args=args, standalone_mode=False)) == 4


def test_int8_keeps_layers_that_read_one_input_alike() -> None:
    from lorary.server.adapters.layers import check_int8

    names = [f"l.{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    shapes = dict.fromkeys(names, (64, 64))
    saved = {name: float(name == "l.q_proj") for name in names}
    formats = allocate(saved, shapes, "int8", 12.5)
    check_int8(names, [name for name in names if formats[name] == "int8"])
    assert formats["l.q_proj"] == formats["l.k_proj"] == "none"
    assert mean_bits(formats, shapes) <= 12.5


def test_training_keeps_whole_what_the_plan_says(
    make_recipe: Callable[..., Recipe], quiet: Reporter, tmp_path: Path
) -> None:
    import bitsandbytes as bnb

    plan = tmp_path / "plan.yaml"
    plan.write_text("default: nf4\nrules: [{modules: '*.0.mlp.*', format: none}]\n")
    method = {"name": "qlora", "quantization_plan": str(plan)}
    recipe = make_recipe(method=method, training__max_steps=2)
    run = prepare(recipe)
    attached, _ = fit_adapter(run, tmp_path / "out", None, quiet)
    found = dict(attached.model.named_modules())
    kinds = {
        name.removesuffix(".base_layer"): type(module)
        for name, module in found.items()
        if name.endswith(".base_layer")
    }
    assert kinds
    for name, kind in kinds.items():
        assert (kind is torch.nn.Linear) == (".0.mlp." in name), name
        assert kind in (torch.nn.Linear, bnb.nn.Linear4bit)
    assert len(plan_facts(run.kind.formats)["quantization_plan"]["whole"]) == 3
    plan.write_text("default: nf4\nrules: [{modules: '*.1.mlp.*', format: none}]\n")
    assert prepare(recipe).identity != run.identity
    plan.write_text("default: int8\n")
    with pytest.raises(InvalidRecipe, match="make them the same"):
        prepare(recipe)
    with pytest.raises(InvalidRecipe, match="plan is set with lora"):
        make_recipe(method={"quantization_plan": str(plan)})


def test_a_whole_budget_needs_no_rules() -> None:
    shapes = {"a": (64, 64), "b": (64, 128)}
    formats = allocate(dict.fromkeys(shapes, 1.0), shapes, "nf4", 16.0)
    assert plan_of(formats, "nf4").formats(list(shapes)) == {"a": "none", "b": "none"}


@pytest.mark.parametrize("text", ["5.0MiB", "", "-1", "17bits", "bits"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no number of bits"):
        parse_budget(text)


def test_too_small_a_budget_and_too_little_text_are_refused(learned: Base) -> None:
    with pytest.raises(InvalidRequest, match=r"nf4 alone takes 4\.127"):
        allocate({"a": 1.0}, {"a": (64, 64)}, "nf4", 4.0)
    with pytest.raises(InvalidRequest, match="give more text"):
        make_blocks(["the cat"], load_tokenizer(learned), count=4, length=32)
