"""The attack list: every folder here is refused, with the class and the reason that a person needs."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to make what must be refused
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lorary.errors import CorruptArtifact, IncompatibleAdapter, LoraryError, StorageError
from lorary.registry import BaseCard, Registry
from lorary.registry.folder import scan_folder
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
V0 = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"


def test_a_right_adapter_is_described(forge: Forge) -> None:
    spec = validate_adapter(forge.folder(), forge.card)
    assert spec.rank == 4
    assert spec.dtype == "F32"
    assert dict(spec.modules) == {
        f"model.layers.{layer}.self_attn.q_proj": (4, 2.0) for layer in (0, 1)
    }
    assert spec.num_bytes == 2 * (4 * 64 + 64 * 4) * 4


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")])
def test_half_precision_is_accepted(forge: Forge, dtype: Any, name: str) -> None:
    spec = validate_adapter(forge.folder(tensors=forge.tensors(dtype=dtype)), forge.card)
    assert spec.dtype == name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_values_that_are_not_finite(forge: Forge, value: float, side: str) -> None:
    tensors = forge.tensors()
    tensors[Q0.format(side)][1, 2] = value
    with pytest.raises(CorruptArtifact, match=rf"layers\.0\.self_attn\.q_proj\.lora_{side}.*NaN"):
        validate_adapter(forge.folder(tensors=tensors), forge.card)


def test_integers_in_place_of_floats(forge: Forge) -> None:
    folder = forge.folder()
    quantized = {name: array.astype(np.int8) for name, array in forge.tensors().items()}
    safetensors.numpy.save_file(quantized, folder / TENSORS)
    with pytest.raises(CorruptArtifact, match="I8"):
        validate_adapter(folder, forge.card)


def test_an_adapter_without_effect(forge: Forge) -> None:
    tensors = {n: a * 0 if "lora_B" in n else a for n, a in forge.tensors().items()}
    folder = forge.folder(tensors=tensors)
    with pytest.raises(IncompatibleAdapter, match="no effect"):
        validate_adapter(folder, forge.card)
    assert validate_adapter(folder, forge.card, allow_zero=True).rank == 4


def test_another_base(forge: Forge, other_card: BaseCard) -> None:
    with pytest.raises(IncompatibleAdapter, match="trained on base"):
        validate_adapter(forge.folder(), other_card)


def test_half_of_the_layers_missing(forge: Forge) -> None:
    tensors = {n: a for n, a in forge.tensors().items() if "layers.0" in n}
    with pytest.raises(CorruptArtifact, match="lacks 1 of the 2 modules"):
        validate_adapter(forge.folder(tensors=tensors), forge.card)


def test_more_modules_than_the_configuration_says(forge: Forge) -> None:
    tensors = forge.tensors() | forge.tensors(last="v_proj")
    with pytest.raises(CorruptArtifact, match="adapts 2 modules"):
        validate_adapter(forge.folder(tensors=tensors), forge.card)


def test_an_a_without_its_b(forge: Forge) -> None:
    tensors = forge.tensors()
    del tensors[Q0.format("B")]
    with pytest.raises(CorruptArtifact, match="A and B go together"):
        validate_adapter(forge.folder(tensors=tensors), forge.card)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.model.norm.weight", "overwrite the base"),
        ("base_model.model.lm_head.weight", "overwrite the base"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            "overwrite the base",
        ),
        ("base_model.model.model.embed_tokens.base_layer.weight", "overwrite the base"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "token table"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "token table"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.vera_A", "VeRA"),
        ("base_model.model.lm_head.lora_A.weight", "output head"),
        ("base_model.model.model.embed_tokens.lora_A.weight", "embedding"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "does not have"),
        ("base_model.model.../../etc/passwd.lora_A.weight", "does not have"),
        ("../../etc/passwd", "no LoRA matrix"),
        ("lora_A.weight", "no LoRA matrix"),
    ],
)
def test_a_tensor_that_does_not_belong(forge: Forge, name: str, reason: str) -> None:
    tensors = forge.tensors() | {name: np.ones((4, 64), np.float32)}
    with pytest.raises(IncompatibleAdapter, match=reason):
        validate_adapter(forge.folder(tensors=tensors), forge.card)


def test_shapes_of_another_base(forge: Forge) -> None:
    tensors = forge.tensors()
    tensors[Q0.format("A")] = np.ones((4, 32), np.float32)
    with pytest.raises(IncompatibleAdapter, match="maps 64 to 64"):
        validate_adapter(forge.folder(tensors=tensors), forge.card)


def test_ranks_that_disagree_with_the_configuration(forge: Forge) -> None:
    with pytest.raises(CorruptArtifact, match="rank 4"):
        validate_adapter(forge.folder(tensors=forge.tensors(rank=8)), forge.card)
    folder = forge.folder("pattern", config=forge.config(rank_pattern={"layers.0": 4, "q_proj": 8}))
    with pytest.raises(CorruptArtifact, match="rank 8"):
        validate_adapter(folder, forge.card)


def test_rank_over_the_servers_limit(forge: Forge) -> None:
    folder = forge.folder()
    with pytest.raises(IncompatibleAdapter, match="1 to 2 are accepted"):
        validate_adapter(folder, forge.card, max_rank=2)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"lora_alpha": 1e12}, IncompatibleAdapter, "drown"),
        ({"lora_alpha": 8193}, IncompatibleAdapter, "drown"),
        ({"alpha_pattern": {"q_proj": 1e12}}, IncompatibleAdapter, "drown"),
        ({"lora_alpha": 0}, CorruptArtifact, "positive"),
        ({"lora_alpha": -8}, CorruptArtifact, "positive"),
        ({"lora_alpha": True}, CorruptArtifact, "positive"),
        ({"lora_alpha": "8"}, CorruptArtifact, "positive"),
        ({"alpha_pattern": {"q_proj": None}}, CorruptArtifact, "positive"),
        ({"alpha_pattern": []}, CorruptArtifact, "object"),
        ({"r": 0}, IncompatibleAdapter, "rank 0"),
        ({"r": -4}, IncompatibleAdapter, "rank -4"),
        ({"r": 4.0}, CorruptArtifact, "whole number"),
        ({"r": 513}, IncompatibleAdapter, "512"),
        ({"r": 10**400}, IncompatibleAdapter, "512"),
        ({"rank_pattern": {"q_proj": 0}}, IncompatibleAdapter, "rank 0"),
        ({"rank_pattern": {"q_proj": "4"}}, CorruptArtifact, "whole number"),
        ({"rank_pattern": {"(": 4}}, CorruptArtifact, "regular expression"),
        ({"peft_type": "VERA"}, IncompatibleAdapter, "only 'LORA'"),
        ({"peft_type": ["LORA"]}, IncompatibleAdapter, "only 'LORA'"),
        ({"task_type": "SEQ_CLS"}, IncompatibleAdapter, "CAUSAL_LM"),
        ({"bias": "all"}, IncompatibleAdapter, "bias"),
        ({"use_dora": True}, CorruptArtifact, "A, B and magnitudes go together"),
        ({"lora_bias": True}, IncompatibleAdapter, "plain LoRA"),
        ({"init_lora_weights": "pissa"}, IncompatibleAdapter, "changes the base"),
        ({"init_lora_weights": "olora"}, IncompatibleAdapter, "changes the base"),
        ({"init_lora_weights": 1}, IncompatibleAdapter, "changes the base"),
        ({"layer_replication": [[0, 2], [0, 2]]}, IncompatibleAdapter, "layers of the base"),
        ({"auto_mapping": {"base_model_class": "os"}}, IncompatibleAdapter, "import"),
        ({"auto_map": {"AutoModel": "x.py"}}, IncompatibleAdapter, "auto_map"),
        ({"megatron_config": {"a": 1}}, IncompatibleAdapter, "megatron_config"),
        ({"modules_to_save": ["lm_head"]}, IncompatibleAdapter, "whole modules"),
        ({"target_parameters": ["experts"]}, IncompatibleAdapter, "bare parameters"),
        ({"trainable_token_indices": [1]}, IncompatibleAdapter, "token table"),
        ({"alora_invocation_tokens": "1"}, CorruptArtifact, "token ids"),
        ({"alora_invocation_tokens": [1, True]}, CorruptArtifact, "token ids"),
        ({"alora_invocation_tokens": [-1]}, CorruptArtifact, "token ids"),
        ({"alora_invocation_tokens": [1] * 513}, CorruptArtifact, "token ids"),
        ({"alora_invocation_tokens": [10**6]}, IncompatibleAdapter, "never be active"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, IncompatibleAdapter, "both"),
        ({"never_heard_of": 1}, IncompatibleAdapter, "never_heard_of"),
        ({"target_modules": None}, CorruptArtifact, "list of module names"),
        ({"target_modules": []}, CorruptArtifact, "list of module names"),
        ({"target_modules": [1]}, CorruptArtifact, "list of module names"),
        ({"target_modules": ["q_proj", "lm_head"]}, IncompatibleAdapter, "output head"),
        ({"target_modules": "("}, CorruptArtifact, "regular expression"),
        ({"target_modules": "nothing"}, CorruptArtifact, "does not target"),
        ({"use_rslora": "yes"}, CorruptArtifact, "true or false"),
        ({"fan_in_fan_out": 1}, CorruptArtifact, "true or false"),
        ({"layers_to_transform": [0]}, CorruptArtifact, "does not target"),
        ({"layers_to_transform": "0"}, CorruptArtifact, "whole numbers"),
        ({"layers_pattern": "(a+)+"}, CorruptArtifact, "module names"),
        ({"base_model_name_or_path": 1}, CorruptArtifact, "text"),
        ({"base_model_name_or_path": "x\n"}, CorruptArtifact, "text"),
    ],
)
def test_a_configuration_that_is_wrong_or_not_served(
    forge: Forge, changes: dict[str, Any], error: type[LoraryError], reason: str
) -> None:
    with pytest.raises(error, match=reason) as caught:
        validate_adapter(forge.folder(config=forge.config(**changes)), forge.card)
    assert len(str(caught.value)) < 600


def test_a_regular_expression_that_runs_for_ever(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.registry.module_patterns.MATCH_TIMEOUT_S", 0.5)
    folder = forge.folder(config=forge.config(target_modules=r"(.*)*(.*)*(.*)*(.*)*!"))
    with pytest.raises(CorruptArtifact, match="takes longer"):
        validate_adapter(folder, forge.card)


@pytest.mark.parametrize(
    "changes",
    [
        {"never_heard_of": None, "auto_mapping": None, "layer_replication": None},
        {"init_lora_weights": "gaussian", "loftq_config": {}, "lora_dropout": 0.1},
        {"target_modules": r".*\.self_attn\.q_proj"},
        {"target_modules": "model.layers.[01].self_attn.q_proj"},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"task_type": None},
        {"alora_invocation_tokens": [1, 2, 1]},
    ],
)
def test_what_peft_writes_is_understood(forge: Forge, changes: dict[str, Any]) -> None:
    validate_adapter(forge.folder(config=forge.config(**changes)), forge.card)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"r": NaN}', b'{"r": 1, "r": 2}'])
def test_a_configuration_that_is_no_json(forge: Forge, raw: bytes) -> None:
    folder = forge.folder()
    (folder / CONFIG).write_bytes(raw)
    with pytest.raises(CorruptArtifact, match="adapter_config"):
        validate_adapter(folder, forge.card)


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"format_version": 2}', b'{"format_version": 1}'])
def test_a_manifest_that_is_none(forge: Forge, raw: bytes) -> None:
    folder = forge.folder()
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(CorruptArtifact, match="manifest"):
        validate_adapter(folder, forge.card)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def bomb(path: Path) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1.0] * 100}))


def torch_saved(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "truncated"),
        (grow, "trailing"),
        (bomb, "claims a header"),
        (pickled, "pickle"),
        (torch_saved, "zip"),
        (empty, "too short"),
    ],
)
def test_tensors_that_are_no_safetensors(
    forge: Forge, damage: Callable[[Path], None], reason: str
) -> None:
    folder = forge.folder()
    damage(folder / TENSORS)
    with pytest.raises(CorruptArtifact, match=reason):
        validate_adapter(folder, forge.card)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin", "model.pt", "optimizer.pth", "x.pkl", "x.npy", "x.py", "x.so", "x.zip",
        "x.json", "adapter_model2.safetensors", "Adapter_Config.json", ".hidden", "a b.md", "ü.md",
        "report/x.py", "report/.x.md", "report/x.pt", "checkpoint/state.json",
    ],
)  # fmt: skip
def test_files_that_may_not_be_there(forge: Forge, name: str) -> None:
    folder = forge.folder()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(CorruptArtifact):
        validate_adapter(folder, forge.card)


@pytest.mark.parametrize(
    "magic",
    [b"\x80\x04\x95", b"PK\x03\x04", b"\x7fELF", b"\x1f\x8b\x08", b"#!/bin/sh", b"\x93NUMPY"],
)
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "report/curve.png", CONFIG])
def test_files_that_are_not_what_their_name_says(forge: Forge, name: str, magic: bytes) -> None:
    folder = forge.folder()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(magic + b"rest")
    with pytest.raises(CorruptArtifact, match="not what its name says"):
        validate_adapter(folder, forge.card)


def test_links_and_devices(forge: Forge, tmp_path: Path) -> None:
    secret = tmp_path / "secret.md"
    secret.write_text("secret")
    linked = forge.folder("linked")
    (linked / "README.md").symlink_to(secret)
    with pytest.raises(CorruptArtifact, match="symbolic link"):
        validate_adapter(linked, forge.card)
    weights = forge.folder("weights")
    (weights / TENSORS).rename(tmp_path / "elsewhere.safetensors")
    (weights / TENSORS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CorruptArtifact, match="symbolic link"):
        validate_adapter(weights, forge.card)
    report = forge.folder("report")
    (report / "report").symlink_to("/etc")
    with pytest.raises(CorruptArtifact):
        validate_adapter(report, forge.card)
    pipe = forge.folder("pipe")
    os.mkfifo(pipe / "README.md")
    with pytest.raises(CorruptArtifact, match="not a plain file"):
        validate_adapter(pipe, forge.card)
    setuid = forge.folder("setuid")
    (setuid / CONFIG).chmod(0o4755)
    with pytest.raises(CorruptArtifact, match="set-user"):
        validate_adapter(setuid, forge.card)


def test_a_hard_link_is_refused_from_strangers_only(
    forge: Forge, tmp_path: Path, registry: Registry
) -> None:
    folder = forge.folder()
    (tmp_path / "secret.md").write_text("secret")
    os.link(tmp_path / "secret.md", folder / "README.md")
    with pytest.raises(CorruptArtifact, match="hard link"):
        registry.push(folder, "a", base=forge.card)
    assert registry.list() == []
    validate_adapter(folder, forge.card)  # a registry's own folder is made of hard links


def test_too_many_or_too_large_files(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forge.folder()
    (folder / "report").mkdir()
    for i in range(254):
        (folder / "report" / f"{i}.txt").touch()
    with pytest.raises(CorruptArtifact, match="more than 256"):
        scan_folder(folder)
    with (forge.folder("large") / CONFIG).open("wb") as file:
        file.truncate(5 << 20)  # sparse: it takes no space
    with pytest.raises(CorruptArtifact, match="the limit is"):
        scan_folder(folder.parent / "large")


def test_needed_files(forge: Forge, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such adapter folder"):
        validate_adapter(tmp_path / "none", forge.card)
    folder = forge.folder()
    (folder / TENSORS).unlink()
    with pytest.raises(CorruptArtifact, match=f"no {TENSORS}"):
        validate_adapter(folder, forge.card)


def test_what_is_kept_and_what_is_left_out(forge: Forge) -> None:
    folder = forge.folder()
    (folder / ".cache").mkdir()
    (folder / "report").mkdir()
    for name in ("README.md", "report/loss.png", "tokenizer.json", ".gitattributes"):
        (folder / name).write_text(json.dumps("x"))
    files = scan_folder(folder)
    assert files.kept == ("README.md", "report/loss.png")
    assert files.left_out == (".cache/", ".gitattributes", "tokenizer.json")
