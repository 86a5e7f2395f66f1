"""Quantization plans: what they say, and every way in which they can be wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import linear_names, load_model
from lorary.bases.plan import QuantizationPlan, Rule, parse_plan, read_plan
from lorary.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    f"model.layers.{layer}.{path}"
    for layer in (0, 1, 11)
    for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]


def rule(modules: str, kept: Any) -> dict[str, Any]:
    return {"modules": modules, "format": kept}


def test_the_first_rule_that_matches_decides() -> None:
    rules = [rule("model.layers.0.*", "none"), rule("*.down_proj", "nf4")]
    formats = parse_plan({"default": "int8", "rules": rules}, "plan").formats(NAMES)
    assert list(formats) == NAMES
    assert formats["model.layers.0.mlp.down_proj"] == "none"
    assert formats["model.layers.1.mlp.down_proj"] == "nf4"
    assert formats["model.layers.11.self_attn.q_proj"] == "int8"


@pytest.mark.parametrize("is_json", [True, False])
def test_a_file_is_yaml_or_json(tmp_path: Path, is_json: bool) -> None:
    path = tmp_path / "plan"
    raw = {"default": "int8", "rules": [rule("*.down_proj", "none")]}
    text = "default: int8\nrules:\n  - modules: '*.down_proj'\n    format: none\n"
    path.write_text(json.dumps(raw) if is_json else text)
    assert read_plan(path) == QuantizationPlan("int8", (Rule("*.down_proj", "none"),))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (None, "is None; it is a mapping with default and rules"),
        ({"rules": []}, "lacks 'default'"),
        ({"default": "int4"}, "default is 'int4'.*Did you mean 'int8'"),
        ({"default": ["nf4"]}, "default is .*; it is one of none, int8, nf4"),
        ({"default": "nf4", "rule": []}, "unknown key 'rule'.*Did you mean 'rules'"),
        ({"default": "nf4", "rules": {}}, "rules is {}; it is a list"),
        ({"default": "nf4", "rules": ["*"]}, r"rule 1 is '\*'; it is a mapping"),
        ({"default": "nf4", "rules": [{"modules": "*"}]}, "rule 1 lacks 'format'"),
        ({"default": "nf4", "rules": [rule("*", "fp4")]}, "format is 'fp4'.*Did you mean 'nf4'"),
        ({"default": "nf4", "rules": [rule("", "none")]}, "modules is ''; it is a glob"),
        (
            {"default": "nf4", "rules": [rule("*.down_prj", "none")]},
            r"matches no linear layer of this base. Did you mean '\*.down_proj'",
        ),
        (
            {"default": "nf4", "rules": [rule("lm_head", "none")]},
            "never quantized",
        ),
        (
            {"default": "nf4", "rules": [rule("*", "none"), rule("*.down_proj", "int8")]},
            "rule 2 .* decides nothing",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_the_nearest_word(raw: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_plan(raw, "the plan").formats(NAMES)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("default: [")
    for name in ("absent", "broken"):
        with pytest.raises(ConfigError, match=f"{name}' cannot be read"):
            read_plan(tmp_path / name)


def test_bitsandbytes_quantizes_what_the_plan_says_and_nothing_else(tiny_base: Path) -> None:
    import bitsandbytes as bnb

    base = find_base(tiny_base)
    plan = QuantizationPlan("nf4", (Rule("*.1.mlp.*", "none"),))
    formats = plan.resolve(base)
    assert list(formats) == linear_names(base)
    model = load_model(base, quantization=formats, dtype=torch.float32)
    for name, kept in formats.items():
        kind = bnb.nn.Linear4bit if kept == "nf4" else torch.nn.Linear
        assert type(model.get_submodule(name)) is kind, name
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_formats_that_bitsandbytes_cannot_mix_are_refused(tiny_base: Path) -> None:
    base = find_base(tiny_base)
    formats = QuantizationPlan("nf4", (Rule("*.down_proj", "int8"),)).resolve(base)
    with pytest.raises(ConfigError, match="int8 and nf4 were asked for"):
        load_model(base, quantization=formats)
    with pytest.raises(ConfigError, match="'lm_head' is to be kept in nf4"):
        load_model(base, quantization={"lm_head": "nf4"})


def test_loading_tells_how_far_it_is(tiny_base: Path) -> None:
    said: list[tuple[int, int]] = []
    load_model(find_base(tiny_base), progress=lambda done, total: said.append((done, total)))
    total = said[-1][1]
    assert total > len(linear_names(find_base(tiny_base)))
    assert said == [(done, total) for done in range(1, total + 1)]
