from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorary.errors import BaseNotFound, CorruptArtifact
from lorary.registry import BaseCard
from lorary.registry.base import CARD_FILE


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that may be changed."""
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    (copy / CARD_FILE).unlink(missing_ok=True)
    return copy


def test_modules_are_those_of_the_live_model(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    card = BaseCard.from_folder(base, "tiny")
    model = AutoModelForCausalLM.from_pretrained(base)
    live = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert live.pop("lm_head") == (card.vocab_size, card.hidden_size)
    assert dict(card.modules) == live
    assert card.head_modules == ("lm_head",)
    assert (card.name, card.architecture, card.num_layers) == ("tiny", "LlamaForCausalLM", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_are_those_of_the_weights(base: Path, dtype: torch.dtype) -> None:
    weights = base / "model.safetensors"
    state = {n: t.to(dtype) for n, t in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(state, weights)
    card = BaseCard.from_folder(base)
    assert card.norms.keys() == card.modules.keys()
    for module, norm in card.norms.items():
        assert norm == pytest.approx(float(state[f"{module}.weight"].double().norm()), rel=1e-5)


def test_a_kept_card_without_norms_is_read_anew(base: Path) -> None:
    first = BaseCard.from_folder(base)
    kept = json.loads((base / CARD_FILE).read_text())
    del kept["card"]["norms"]
    (base / CARD_FILE).write_text(json.dumps(kept))
    assert BaseCard.from_folder(base) == first
    assert "norms" in json.loads((base / CARD_FILE).read_text())["card"]


def test_gpt2_weights_are_transposed_and_prefixed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "with")
    card = BaseCard.from_folder(tmp_path / "with")
    assert card.modules["transformer.h.0.attn.c_attn"] == (96, 32)
    assert card.modules["transformer.h.0.mlp.c_proj"] == (32, 128)
    assert len(card.modules) == 4
    # The published checkpoints are of the bare model, without the prefix.
    shutil.copytree(tmp_path / "with", tmp_path / "without", ignore=lambda *_: [CARD_FILE])
    weights = tmp_path / "without" / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in state.items()}, weights
    )
    assert BaseCard.from_folder(tmp_path / "without").modules == card.modules


def test_fingerprint_does_not_depend_on_shards_or_folder(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded, ignore=lambda *_: ["model.safetensors"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(sharded, max_shard_size="60KB")
    shutil.copy(base / "config.json", sharded / "config.json")
    assert (sharded / "model.safetensors.index.json").exists()
    assert BaseCard.from_folder(sharded).fingerprint == BaseCard.from_folder(base).fingerprint


def change_weight(base: Path) -> None:
    weights = base / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)


def change_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (base / "config.json").write_text(json.dumps(config))


def change_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + " ")


def change_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ other }}")


@pytest.mark.parametrize(
    "change", [change_weight, change_config, change_tokenizer, change_template]
)
def test_fingerprint_changes_with_everything_that_counts(
    base: Path, change: Callable[[Path], None]
) -> None:
    before = BaseCard.from_folder(base).fingerprint
    change(base)
    assert BaseCard.from_folder(base).fingerprint != before


def test_fingerprint_ignores_what_a_re_save_changes(base: Path) -> None:
    before = BaseCard.from_folder(base).fingerprint
    config = json.loads((base / "config.json").read_text())
    config |= {"_name_or_path": "/elsewhere", "transformers_version": "99"}
    (base / "config.json").write_text(json.dumps(config))
    assert BaseCard.from_folder(base).fingerprint == before


def test_the_card_is_kept_until_a_file_changes(base: Path) -> None:
    first = BaseCard.from_folder(base)
    kept = json.loads((base / CARD_FILE).read_text())
    kept["card"]["fingerprint"] = "sha256:kept"
    (base / CARD_FILE).write_text(json.dumps(kept))
    assert BaseCard.from_folder(base).fingerprint == "sha256:kept"
    stat = (base / "model.safetensors").stat()
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert BaseCard.from_folder(base) == first


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format_version": 1, "stamp": []}'])
def test_a_damaged_kept_card_is_not_used(base: Path, content: str) -> None:
    first = BaseCard.from_folder(base)
    (base / CARD_FILE).write_text(content)
    assert BaseCard.from_folder(base) == first


def test_a_folder_that_is_no_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="no such folder"):
        BaseCard.from_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseNotFound, match=r"no config\.json"):
        BaseCard.from_folder(tmp_path / "empty")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(BaseNotFound, match="safetensors"):
        BaseCard.from_folder(base)


def test_a_damaged_base_is_refused(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CorruptArtifact, match="truncated"):
        BaseCard.from_folder(base)
    (base / "config.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="architecture"):
        BaseCard.from_folder(base)


def test_an_index_cannot_point_out_of_its_folder(base: Path) -> None:
    index = {"weight_map": {"w": "../model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptArtifact, match="outside"):
        BaseCard.from_folder(base)
