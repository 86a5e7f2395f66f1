"""Adapters of other methods, made by PEFT, compute the same as the LoRA that the registry keeps of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry import BaseCard, Registry
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 2e-5
WEIGHTS = "adapter_model.safetensors"


def configs() -> dict[str, Any]:
    from peft import AdaLoraConfig, LoHaConfig, LoraConfig, MissConfig, VeraConfig

    some = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return {
        "vera": VeraConfig(r=16, save_projection=True, **some),
        "vera-of-a-rank-above-the-width": VeraConfig(
            r=100, save_projection=True, target_modules=["v_proj"], task_type="CAUSAL_LM"
        ),
        "miss": MissConfig(r=8, **some),
        "miss-that-does-not-divide": MissConfig(r=6, **some),
        "miss-mini": MissConfig(r=8, mini_r=4, init_weights="mini", **some),
        "loha": LoHaConfig(r=4, alpha=6, **some),
        "loha-with-patterns": LoHaConfig(
            r=3, alpha=3, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7}, **some
        ),
        "loha-of-a-rank-above-the-width": LoHaConfig(r=9, alpha=9, **some),
        "loha-in-some-layers": LoHaConfig(r=2, alpha=2, layers_to_transform=[1], **some),
        "adalora": AdaLoraConfig(init_r=6, target_r=3, total_step=9, lora_alpha=11, **some),
        "adalora-of-what-peft-ignores": AdaLoraConfig(
            init_r=4, target_r=3, total_step=9, alpha_pattern={"v_proj": 3}, use_rslora=True, **some
        ),
        "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, **some),
        "dora-with-patterns": LoraConfig(
            r=4, lora_alpha=6, use_dora=True, rank_pattern={"q_proj": 2}, use_rslora=True, **some
        ),
    }


@pytest.fixture(scope="module")
def base_model(tiny_base: Path) -> Callable[[], Any]:
    """Gives the tiny base, fresh each time."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens).logits
    return result


def train(model: Any, config: Any, folder: Path) -> torch.Tensor:
    """Save a random adapter; return what PEFT computes with it."""
    from peft import get_peft_model

    torch.manual_seed(0)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.normal_(0, 0.2)
    peft.save_pretrained(folder)
    return logits(peft)


@pytest.mark.parametrize("kind", configs())
def test_logits_are_those_of_the_original(
    kind: str, base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    from peft import PeftModel

    wanted = train(base_model(), configs()[kind], tmp_path / "trained")
    registry.push(tmp_path / "trained", "a", base=card)
    pulled = registry.pull("a", tmp_path / "pulled")
    base = base_model()
    bare = logits(base)
    found = logits(PeftModel.from_pretrained(base, pulled))
    assert (found - wanted).abs().max() < TOLERANCE
    assert (bare - wanted).abs().max() > 100 * TOLERANCE
    manifest = registry.manifest(registry.resolve("a"))
    assert manifest.method.name == kind.partition("-")[0]
    assert manifest.conversion is not None
    assert manifest.conversion.max_error < 1e-6
    if kind.startswith("dora"):
        assert json.loads((pulled / "adapter_config.json").read_text())["use_dora"] is True
        assert not (pulled / "original").exists()
    else:
        assert validate_adapter(pulled, card).rank <= 64
        original = (tmp_path / "trained" / WEIGHTS).read_bytes()
        assert (pulled / "original" / WEIGHTS).read_bytes() == original
    again = registry.push(pulled, "b", base=card)
    assert again.digest == registry.resolve("a").digest


def test_the_error_is_measured_and_not_assumed(
    base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    """MiSS is a matter of placing numbers: no error. VeRA multiplies: some, and it is the true one."""
    for name in ("miss", "vera"):
        train(base_model(), configs()[name], tmp_path / name)
        registry.push(tmp_path / name, name, base=card)
    conversions = [registry.manifest(registry.resolve(n)).conversion for n in ("miss", "vera")]
    assert conversions[0] is not None
    assert conversions[1] is not None
    assert conversions[0].max_error == 0.0
    original = safetensors.numpy.load_file(tmp_path / "vera" / WEIGHTS)
    kept = safetensors.numpy.load_file(registry.fetch(registry.resolve("vera")) / WEIGHTS)
    errors = []
    for key in kept:
        if key.endswith("lora_A.weight"):
            module = key.removesuffix("lora_A.weight")
            a, b = (kept[f"{module}lora_{side}.weight"].astype("f8") for side in "AB")
            whole_a, whole_b = (original[f"base_model.vera_{s}"].astype("f8") for s in "AB")
            change = (
                np.diag(original[f"{module}vera_lambda_b"].astype("f8"))
                @ whole_b[: b.shape[0]]
                @ np.diag(original[f"{module}vera_lambda_d"].astype("f8"))
                @ whole_a[:, : a.shape[1]]
            )
            errors.append(np.linalg.norm(b @ a - change) / np.linalg.norm(change))
    assert 0 < conversions[1].max_error < 1e-7
    assert conversions[1].max_error == pytest.approx(max(errors), rel=1e-3)


def test_half_precision_stays_where_it_holds_the_values(
    base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    train(base_model(), configs()["miss"], tmp_path / "trained")
    weights = tmp_path / "trained" / WEIGHTS
    state = {n: t.bfloat16() for n, t in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(state, weights)
    registry.push(tmp_path / "trained", "a", base=card)
    assert validate_adapter(registry.fetch(registry.resolve("a")), card).dtype == "BF16"


def test_originals_are_kept_as_the_push_says(
    base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train(base_model(), lora, tmp_path / "lora")
    train(base_model(), configs()["miss"], tmp_path / "miss")
    kept = {}
    for name, originals in {"lora": True, "miss": False}.items():
        registry.push(tmp_path / name, name, base=card, originals=originals)
        manifest = registry.manifest(registry.resolve(name))
        kept[name] = {f.path for f in manifest.files if f.path.startswith("original/")}
    assert kept == {"lora": {"original/adapter_config.json", f"original/{WEIGHTS}"}, "miss": set()}
    assert registry.verify().is_ok


def test_pissa_is_right_on_the_base_that_it_left(
    base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    pissa = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    torch.manual_seed(0)
    model = get_peft_model(base_model(), pissa)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "raw")
    wanted = logits(model)
    residual = tmp_path / "residual"
    bare = model.unload()
    bare.save_pretrained(residual)
    with pytest.raises(IncompatibleAdapter, match="path_initial_model_for_weight_conversion"):
        registry.push(tmp_path / "raw", "a", base=card)
    left = BaseCard.from_folder(residual)
    registry.push(tmp_path / "raw", "a", base=left, residual_base=True)
    found = logits(PeftModel.from_pretrained(bare, registry.pull("a", tmp_path / "a")))
    assert (found - wanted).abs().max() < TOLERANCE


def test_ranks_that_adalora_took_away_are_left_out(
    base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    """Saved as PEFT does it, in the ranks that are left, and with zeros in all ranks: the same LoRA."""
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(base_model(), config)
    kept = {
        f"model.layers.{layer}.self_attn.q_proj.lora_E.default": flags
        for layer, flags in enumerate([[True, False, False, True], [False, True, False, False]])
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
            if "lora_E" in name:
                parameter *= torch.tensor(kept[name.removeprefix("base_model.model.")])[:, None]
    wanted = logits(model)
    for folder, pattern in {"zeros": None, "left": kept}.items():
        model.peft_config["default"].rank_pattern = pattern
        model.save_pretrained(tmp_path / folder)
        registry.push(tmp_path / folder, folder, base=card)
    assert registry.resolve("zeros").digest == registry.resolve("left").digest
    pulled = registry.pull("left", tmp_path / "pulled")
    assert sorted(lora.rank for lora in validate_adapter(pulled, card).modules.values()) == [1, 2]
    found = logits(PeftModel.from_pretrained(base_model(), pulled))
    assert (found - wanted).abs().max() < TOLERANCE
    path = tmp_path / "left" / "adapter_config.json"
    nothing = json.loads(path.read_text())
    for name, flags in nothing["rank_pattern"].items():
        nothing["rank_pattern"][name] = [False] * len(flags)
    path.write_text(json.dumps(nothing))
    with pytest.raises(IncompatibleAdapter, match="taken all ranks"):
        registry.push(tmp_path / "left", "none", base=card)


@pytest.fixture
def miss(base_model: Callable[[], Any], tmp_path: Path) -> Path:
    train(base_model(), configs()["miss"], tmp_path / "miss")
    return tmp_path / "miss"


def test_originals_travel_with_a_version(miss: Path, card: BaseCard, anywhere: Registry) -> None:
    anywhere.push(miss, "a", base=card)
    kept = anywhere.fetch(anywhere.resolve("a"))
    assert (kept / "original" / WEIGHTS).read_bytes() == (miss / WEIGHTS).read_bytes()
    validate_adapter(kept, card)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"init_weights": "bat"}, IncompatibleAdapter, "full rank"),
        ({"init_weights": "evil"}, IncompatibleAdapter, "no MiSS that is known"),
        ({"mini_r": 0, "init_weights": "mini"}, CorruptArtifact, "mini_r"),
        ({"r": 7}, IncompatibleAdapter, r"\[7, 64\] is needed"),
        ({"target_modules": ["q_proj"]}, IncompatibleAdapter, "could change the base"),
        ({"target_modules": ["q_proj", "up_proj"]}, CorruptArtifact, "lacks tensor"),
        ({"target_modules": ["nothing"]}, CorruptArtifact, "no linear module"),
        ({"auto_mapping": {"parent_library": "os"}}, IncompatibleAdapter, "classes to import"),
        ({"modules_to_save": ["lm_head"]}, IncompatibleAdapter, "whole modules"),
        ({"unheard_of": 1}, IncompatibleAdapter, "unheard_of"),
        ({"peft_type": "IA3"}, IncompatibleAdapter, "full rank"),
        ({"peft_type": "PROMPT_TUNING"}, IncompatibleAdapter, "no weights"),
        ({"peft_type": "LOKR"}, IncompatibleAdapter, "only 'LORA'"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(
    changes: dict[str, Any],
    error: type[Exception],
    reason: str,
    miss: Path,
    card: BaseCard,
    registry: Registry,
) -> None:
    config = miss / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(error, match=reason):
        registry.push(miss, "a", base=card)
    assert registry.list() == []
    assert not list(Path(registry.url.removeprefix("file://")).glob("tmp/*"))


def test_hostile_tensors_of_other_methods(miss: Path, card: BaseCard, registry: Registry) -> None:
    weights = miss / WEIGHTS
    honest = safetensors.numpy.load_file(weights)
    key = next(iter(honest))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({key: np.full_like(honest[key], np.nan)}, CorruptArtifact, "NaN"),
        ({key: honest[key] * 1e30}, IncompatibleAdapter, "times as large"),
        (
            {"base_model.model.model.norm.weight": np.ones(64, "f4")},
            IncompatibleAdapter,
            "could ch",
        ),
    ]
    for changed, error, reason in cases:
        safetensors.numpy.save_file(honest | changed, weights)
        with pytest.raises(error, match=reason):
            registry.push(miss, "a", base=card)
    shutil.copy(weights, miss / "adapter_model2.safetensors")
    with pytest.raises(CorruptArtifact, match="may not be"):
        registry.push(miss, "a", base=card)


def test_vera_without_its_matrices_and_loha_of_a_rank_beyond_the_limit(
    base_model: Callable[[], Any], card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    from peft import VeraConfig

    with pytest.warns(UserWarning, match="save_projection"):
        bare = VeraConfig(
            r=4, save_projection=False, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
    train(base_model(), bare, tmp_path / "vera")
    with pytest.raises(IncompatibleAdapter, match="save_projection=True"):
        registry.push(tmp_path / "vera", "a", base=card)
    wide = BaseCard(
        name="wide", fingerprint=card.fingerprint, architecture="LlamaForCausalLM", hidden_size=1024,
        num_layers=1, vocab_size=8, modules={"model.layers.0.self_attn.q_proj": (1024, 1024)},
        head_modules=(),
    )  # fmt: skip
    config = {"peft_type": "LOHA", "r": 4000, "alpha": 1, "target_modules": ["q_proj"]}
    folder = tmp_path / "loha"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({"x": np.ones(1, "f4")}, folder / WEIGHTS)
    with pytest.raises(IncompatibleAdapter, match="is a LoRA of rank 1024; the limit is 512"):
        registry.push(folder, "a", base=wide)
