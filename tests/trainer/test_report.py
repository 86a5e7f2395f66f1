"""The report: its numbers against dense algebra and a plain model, its page in a real browser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model, load_tokenizer
from lorary.registry.cli import app as registry_app
from lorary.registry.cli_support import exit_code_of
from lorary.trainer.evaluate import Evaluation
from lorary.trainer.examples import Example
from lorary.trainer.metrics import label_sums, text_sums
from lorary.trainer.progress import Reporter
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.report.attention import attention_changes, total_variation
from lorary.trainer.report.examples import compare_examples
from lorary.trainer.report.weights import ModuleChange, module_changes
from lorary.trainer.train import train
from tests.trainer.browser import open_page

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.trainer.recipe import Recipe

PROMPT = [1, 9, 12, 40, 33, 8]
PICTURES = {
    *("loss_curve.png", "schedule.png", "confusion.png", "reliability.png"),
    *("attention-1.png", "attention-2.png", "weight_change.png", "effective_rank.png"),
    "singular_values.png",
}


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """Train with a report; a row and a name hold what a page must not run or load."""
    recipe = make_recipe(
        description="<script>alert(1)</script> & $x_1$",
        training__max_steps=3,
        evaluation={"report": True, "num_resamples": 100},
    )
    train(recipe, tmp_path / "out", reporter=Reporter(quiet=True))
    return tmp_path / "out" / "report"


def test_a_browser_opens_the_report_and_sees_every_picture(
    run: Path, record_property: Callable[[str, object], None]
) -> None:
    opened = open_page(run / "report.html")
    assert opened.console == []
    assert opened.title == "tiny · report"
    assert len(opened.widths) == len(PICTURES)
    assert all(width > 100 for width in opened.widths.values()), opened.widths
    record_property("pictures", len(opened.widths))
    record_property("console", len(opened.console))
    # The same eyes see what is wrong with a page that is broken.
    page = (run / "report.html").read_text()
    broken = page.replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    (run / "broken.html").write_text(broken.replace("</body>", "<script>1</script></body>"))
    opened = open_page(run / "broken.html")
    assert min(opened.widths.values()) == 0
    assert any("Content Security Policy" in line for line in opened.console)


def test_the_page_is_one_file_that_a_registry_keeps_and_shows(
    run: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorary.registry import BaseCard, Registry

    page = (run / "report.html").read_text()
    assert "<script" not in page, "a description is text"
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$" in page
    assert "http" not in page.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    for part in ("Base and adapter", "Examples", "Attention", "Weights", "Data", "Run lock"):
        assert f">{part}" in page
    assert {path.name for path in run.glob("*.png")} == PICTURES
    figures = json.loads((run / "metrics.json").read_text())
    assert sum(map(sum, figures["confusion"]["adapter"])) == 12
    assert sum(one["count"] for one in figures["reliability"]["base"]) == 12
    assert figures["uncertainty"]["accuracy"]["difference"]["low"] <= 1
    registry = Registry.open(run.parent.parent / "registry", create=True)
    version = registry.push(run.parent, "tiny", base=BaseCard.from_folder(tiny_base))
    kept = {entry.path for entry in registry.manifest(registry.resolve("tiny")).files}
    assert version.version == 1
    assert {"report/report.html", "report/attention-1.png"} <= kept
    command = ["show", "tiny", "--registry", str(run.parent.parent / "registry"), "--json"]
    assert exit_code_of(lambda: registry_app(command, standalone_mode=False)) == 0
    shown = json.loads(capsys.readouterr().out)["report"]
    assert Path(shown).read_text() == page


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "nf4"])
def test_changes_of_modules_are_those_of_the_merged_weights(tiny_base: Path, method: str) -> None:
    import peft

    base = find_base(tiny_base)
    model: Any = load_model(
        base, dtype=torch.float32, quantization="nf4" if method == "nf4" else "none"
    )
    targets = ["q_proj", "down_proj"]
    config: Any = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_dora=method == "dora"
    )
    if method == "vera":
        config = peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"])
    with quiet_libraries():
        wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "vera_lambda" in name:
                parameter.normal_(0, 0.3)
    found = {one.name: one for one in module_changes(wrapped)}
    assert len(found) == 4
    assert {one.layer for one in found.values()} == {0, 1}
    layers = wrapped.get_base_model().get_submodule
    before = {name: _dense(layers(name).get_base_layer()) for name in found}
    if method == "nf4":  # merging quantizes anew, so the product itself is the oracle
        after = {
            name: before[name] + layers(name).get_delta_weight("default").detach() for name in found
        }
    else:
        merged = wrapped.merge_and_unload()
        after = {name: merged.get_submodule(name).weight.detach() for name in found}
    for name, one in found.items():
        delta = after[name] - before[name]
        assert one.weight_norm == pytest.approx(float(before[name].norm()), rel=1e-4)
        assert one.ratio == pytest.approx(float(delta.norm() / before[name].norm()), rel=1e-3)
        values = torch.linalg.svdvals(delta)
        top = list(one.singular_values[:4])
        assert top == pytest.approx(values[:4].tolist(), rel=1e-2)
        if method != "dora":
            assert len(one.singular_values) == 4


@pytest.mark.parametrize("method", ["lora", "pissa", "delta-lora"])
def test_the_report_shows_what_is_published(
    make_recipe: Callable[..., Recipe], tmp_path: Path, method: str
) -> None:
    """Some methods begin with a part of W, or move it: the product of A and B is not their change."""
    from safetensors.torch import load_file

    recipe = make_recipe(
        method={"name": method, "rank": 4},
        training__max_steps=3,
        evaluation={"report": True, "num_attention_maps": 0, "num_resamples": 0},
    )
    train(recipe, tmp_path / "out", reporter=Reporter(quiet=True))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    modules = json.loads((tmp_path / "out" / "report" / "weights.json").read_text())["modules"]
    assert len(modules) == 14
    for one in modules:
        name = f"base_model.model.{one['name']}"
        a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        rank = config["rank_pattern"].get(one["name"], config["r"])
        alpha = config["alpha_pattern"].get(one["name"], config["lora_alpha"])
        delta = alpha / rank * b @ a
        assert one["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-3)


def test_effective_rank_counts_directions_that_are_used_alike() -> None:
    def change(*values: float) -> ModuleChange:
        return ModuleChange(
            name="x", layer=0, kind="x", delta_norm=1, weight_norm=1, singular_values=values
        )

    assert change(2, 2, 2, 2).effective_rank == pytest.approx(4)
    assert change(1).effective_rank == pytest.approx(1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert change(3, 1).effective_rank == pytest.approx(math.exp(entropy))
    assert change().effective_rank == 0


def test_directions_that_hold_most_and_the_stable_rank() -> None:
    one = ModuleChange(
        name="x",
        layer=0,
        kind="x",
        delta_norm=1,
        weight_norm=1,
        singular_values=(3.0, 2.0, 1.0, 1.0),
        published_rank=2,
    )
    assert [one.directions_for(share) for share in (0.5, 0.6, 0.61, 0.9, 1)] == [1, 1, 2, 3, 4]
    assert one.stable_rank == pytest.approx(15 / 9)
    assert one.kept_energy / one.energy == pytest.approx(13 / 15)


def test_attention_before_is_the_bare_bases(
    tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    from peft import PeftModel

    base = find_base(tiny_base)
    plain: Any = load_model(base, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = plain(torch.tensor([PROMPT]), output_attentions=True).attentions
    model: Any = load_model(base, dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(model, tiny_adapters["bravo"])
    (found,) = attention_changes(model, load_tokenizer(base), [PROMPT])
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found.before, expected[found.layer][0].mean(0))
    assert found.moved.shape == (2, 4)
    assert found.moved[found.layer].mean() == found.moved.mean(1).max()
    assert 0.01 < float(found.moved.max()) < 1
    assert len(found.tokens) == len(PROMPT)
    apart = torch.eye(2)
    assert total_variation(apart, apart.flip(0)) == 1
    assert total_variation(apart, apart) == 0


def test_examples_are_won_lost_or_the_same() -> None:
    test = [Example(inputs={"text": str(i)}, target=target) for i, target in enumerate("aaab")]
    references = [one.target for one in test]

    def answered(*said: str) -> Evaluation:
        return Evaluation.of(label_sums(said, said, references), said, said)

    groups = compare_examples(test, answered(*"abab"), answered(*"aabb"), "accuracy").groups
    indices = {name: [pair.index for pair in pairs] for name, pairs in groups.items()}
    assert indices == {"won": [1], "lost": [2], "same": [0, 3]}
    said = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "the sun is a sun"]
    wanted = [Example(inputs={}, target=text) for text in ("the cat sat on the mat", "the sun")]
    before, after = (
        Evaluation.of(text_sums("bleu", one, [w.target for w in wanted]), one, one) for one in said
    )
    outcomes = compare_examples(wanted, before, after, "bleu")
    assert outcomes.metric == "chrf", "BLEU of a short sentence is nearly always 0"
    assert [pair.index for pair in outcomes.groups["won"]] == [1]
    assert [pair.index for pair in outcomes.groups["lost"]] == [0]


def _dense(layer: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(layer)
    return weight.detach().float().clone()
