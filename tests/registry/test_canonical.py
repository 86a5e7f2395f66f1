from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from lorary.errors import IncompatibleAdapter
from lorary.registry.canonical import content_digest, write_canonical
from lorary.registry.folder import scan_folder
from lorary.registry.layouts import AdapterSpec
from lorary.registry.manifest import Accepted, Task
from lorary.registry.safetensors_file import Array, read_header, read_tensor
from lorary.registry.validate import Limits, validate_files

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def canonicalise(forge: Forge, folder: Path, dest: str) -> tuple[Path, AdapterSpec]:
    files = scan_folder(folder)
    path = forge.root / dest
    path.mkdir()
    anything = Limits(accepted=Accepted(max_ratio=math.inf))
    write_canonical(files, validate_files(files, forge.card, anything), forge.card, path)
    return path, validate_files(scan_folder(path), forge.card, anything)


def load(folder: Path) -> dict[str, Array]:
    header = read_header(folder / TENSORS)
    return {name: read_tensor(folder / TENSORS, info) for name, info in header.tensors.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("alpha", [1, 4, 8, 512])
def test_a_power_of_two_is_folded_exactly(forge: Forge, dtype: Any, alpha: int) -> None:
    tensors = forge.tensors(dtype=dtype)
    folder = forge.folder(tensors=tensors, config=forge.config(lora_alpha=alpha))
    path, spec = canonicalise(forge, folder, "out")
    assert {lora.scale for lora in spec.modules.values()} == {1.0}
    for name, folded in load(path).items():
        scale = alpha / 4 if "lora_B" in name else 1.0
        assert folded.dtype == dtype
        assert np.array_equal(folded.astype(np.float64), tensors[name].astype(np.float64) * scale)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_scale_that_half_precision_cannot_carry_gives_float32(forge: Forge, dtype: Any) -> None:
    tensors = forge.tensors(dtype=dtype)
    folder = forge.folder(tensors=tensors, config=forge.config(lora_alpha=3, use_rslora=True))
    path, _ = canonicalise(forge, folder, "out")
    for name, folded in load(path).items():
        if "lora_A" in name:
            assert folded.dtype == dtype
        else:
            assert folded.dtype == np.float32
            assert np.array_equal(folded, (tensors[name].astype(np.float64) * 1.5).astype("f4"))


def test_float16_that_would_overflow_gives_float32(forge: Forge) -> None:
    tensors = forge.tensors(dtype=np.float16)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = 60_000
    path, spec = canonicalise(forge, forge.folder(tensors=tensors), "out")
    assert load(path)[name][0, 0] == 120_000
    assert spec.dtype == "F32"


def test_a_product_beyond_float32_is_refused(forge: Forge) -> None:
    tensors = forge.tensors()
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = 3e38
    with pytest.raises(IncompatibleAdapter, match="beyond float32"):
        canonicalise(forge, forge.folder(tensors=tensors), "out")


def test_the_canonical_form_of_a_canonical_form_is_itself(forge: Forge) -> None:
    folder = forge.folder(config=forge.config(lora_alpha=5, use_rslora=True))
    once, _ = canonicalise(forge, folder, "once")
    twice, _ = canonicalise(forge, once, "twice")
    for name in (CONFIG, TENSORS):
        assert (once / name).read_bytes() == (twice / name).read_bytes()


def test_equal_adapters_written_differently_become_equal_bytes(forge: Forge) -> None:
    listed = [m for m in forge.card.modules if m.endswith(".q_proj")]
    first, _ = canonicalise(forge, forge.folder("a"), "one")
    config = forge.config(
        r=8,
        lora_alpha=1,
        rank_pattern={"q_proj": 4},
        alpha_pattern={r".*\.q_proj": 8},
        target_modules=list(reversed(listed)),
        lora_dropout=0.5,
        init_lora_weights="gaussian",
    )
    tensors = dict(reversed(forge.tensors().items()))
    second, _ = canonicalise(forge, forge.folder("b", tensors=tensors, config=config), "two")
    for name in (CONFIG, TENSORS):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_configuration_is_plain_lora(forge: Forge) -> None:
    tensors = forge.tensors() | forge.tensors(rank=2, last="v_proj")
    config = forge.config(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        base_model_name_or_path="/home/ada/models/tiny",
    )
    path, _ = canonicalise(forge, forge.folder(tensors=tensors, config=config), "out")
    written = json.loads((path / CONFIG).read_text())
    assert written["r"] == written["lora_alpha"] == 4
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert set(written["rank_pattern"].values()) == {2}
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["use_rslora"] is written["use_dora"] is False
    # A folder of the training machine means nothing elsewhere.
    assert written["base_model_name_or_path"] == forge.card.name


def test_some_layers_only_are_named_in_full(forge: Forge) -> None:
    tensors = {n: a for n, a in forge.tensors().items() if "layers.1." in n}
    config = forge.config(layers_to_transform=[1])
    path, _ = canonicalise(forge, forge.folder(tensors=tensors, config=config), "out")
    written = json.loads((path / CONFIG).read_text())
    assert written["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_the_digest_is_the_same_on_every_machine() -> None:
    """The figure is written down: should it change, every registry out there would be invalid."""
    digest = content_digest(
        base_fingerprint="sha256:00", task=Task(), config="11" * 32, tensors="22" * 32
    )
    assert digest == "sha256:f2ca0fc32baf9814ddae24143da972537014176e3681b539b7863c2d0ba8ef09"


def test_the_digest_covers_base_and_task() -> None:
    def of(base: str = "b", config: str = "c", tensors: str = "t", **task: Any) -> str:
        task_of = Task(**task)
        return content_digest(base_fingerprint=base, task=task_of, config=config, tensors=tensors)

    digests = {
        of(), of(base="x"), of(config="x"), of(tensors="x"), of(template="x"), of(labels=("x",)),
        of(stop=("x",)), of(kind="classification"), of(max_new_tokens=1),
    }  # fmt: skip
    assert len(digests) == 9
