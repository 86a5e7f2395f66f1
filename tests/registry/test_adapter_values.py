"""The size of an adapter's change beside its base's weights, and who may lift the limit."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lorary.errors import IncompatibleAdapter, InvalidRequest
from lorary.registry.check import check_folder
from lorary.registry.folder import scan_folder
from lorary.registry.manifest import Accepted
from lorary.registry.validate import Limits, validate_adapter, validate_files
from lorary.registry.values import product_norm

if TYPE_CHECKING:
    from lorary.registry import Registry
    from tests.registry.conftest import Forge

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("shape", [(1, 5, 7), (4, 64, 32), (16, 8, 8)])
def test_the_norm_of_a_product_that_is_never_formed(shape: tuple[int, int, int]) -> None:
    rank, rows, columns = shape
    generator = np.random.default_rng(0)
    b, a = generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))
    assert product_norm(b, a) == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-12)


def loud(forge: Forge, ratio: float) -> dict[str, np.ndarray]:
    """Tensors whose change in layer 0 is ``ratio`` times its weight; alpha / r is 2."""
    tensors = forge.tensors()
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
    b *= ratio * forge.card.norms[Q0] / (2 * product_norm(b, a))
    return tensors


def test_a_change_far_larger_than_its_weight_is_refused_by_name_and_figure(forge: Forge) -> None:
    validate_adapter(forge.folder("below", tensors=loud(forge, 9.99)), forge.card)
    above = forge.folder("above", tensors=loud(forge, 10.01))
    with pytest.raises(IncompatibleAdapter, match=rf"{Q0}: its change is 10 times.*--max-ratio"):
        validate_adapter(above, forge.card)


def test_orthogonal_rows_are_not_judged_by_the_product_of_norms(forge: Forge) -> None:
    """‖B‖‖A‖ is beyond the limit and ‖BA‖ is 0: the cheap bound must not be what refuses."""
    tensors = forge.tensors(rank=4)
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
    a[:2], b[:, 2:] = 0, 0
    b[:, :2] *= 1e4
    validate_adapter(forge.folder(tensors=tensors), forge.card)


def test_a_base_whose_weights_are_nan_takes_no_adapter(forge: Forge) -> None:
    broken = dataclasses.replace(forge.card, norms=dict.fromkeys(forge.card.modules, math.nan))
    with pytest.raises(IncompatibleAdapter, match="nan"):
        validate_adapter(forge.folder(), broken)


def test_what_a_push_let_pass_passes_at_the_server_as_well(
    forge: Forge, registry: Registry
) -> None:
    folder = forge.folder("loud", tensors=loud(forge, 30))
    with pytest.raises(IncompatibleAdapter, match="30 times"):
        registry.push(folder, "a", base=forge.card)
    with pytest.raises(InvalidRequest, match="max_ratio"):
        registry.push(folder, "a", base=forge.card, max_ratio=math.inf)
    registry.push(folder, "a", base=forge.card, max_ratio=40)
    validate_adapter(registry.fetch(registry.resolve("a")), forge.card)
    silent = {n: a * 0 if "lora_B" in n else a for n, a in forge.tensors().items()}
    registry.push(forge.folder("silent", tensors=silent), "a", base=forge.card, allow_zero=True)
    validate_adapter(registry.fetch(registry.resolve("a")), forge.card)


def test_a_strangers_manifest_lifts_nothing_at_a_push(forge: Forge, registry: Registry) -> None:
    claims = dataclasses.replace(forge.manifest(), accepted=Accepted(max_ratio=1e9))
    folder = forge.folder(tensors=loud(forge, 30), manifest=claims)
    with pytest.raises(IncompatibleAdapter, match="30 times"):
        registry.push(folder, "a", base=forge.card)


def test_pissa_is_taken_on_the_base_that_it_left(forge: Forge, registry: Registry) -> None:
    folder = forge.folder(config=forge.config(init_lora_weights="pissa_niter_4"))
    with pytest.raises(IncompatibleAdapter, match="path_initial_model_for_weight_conversion"):
        registry.push(folder, "a", base=forge.card)
    registry.push(folder, "a", base=forge.card, residual_base=True)
    spec = validate_adapter(registry.fetch(registry.resolve("a")), forge.card)
    assert spec.rank == 4


def test_dora_is_kept_with_its_magnitudes(forge: Forge, registry: Registry) -> None:
    tensors = forge.tensors()
    for module in [m for m in forge.card.modules if m.endswith(".q_proj")]:
        rows = forge.card.modules[module][0]
        key = f"base_model.model.{module}.lora_magnitude_vector"
        tensors[key] = np.full(rows, 1.5, np.float32)
    dora = forge.folder("dora", tensors=tensors, config=forge.config(use_dora=True))
    registry.push(dora, "a", base=forge.card)
    kept = registry.fetch(registry.resolve("a"))
    assert validate_adapter(kept, forge.card).magnitudes
    (served,) = check_folder(dora, forge.card, servers=["lorary"]).as_given
    assert served.outcome == "loads"
    assert "not in a composition" in served.reasons[0]
    with pytest.raises(IncompatibleAdapter, match=r"no plain LoRA.*--to merged"):
        validate_files(scan_folder(kept, allow_hardlinks=True), forge.card, Limits())
    undeclared = forge.folder("undeclared", tensors=tensors)
    with pytest.raises(IncompatibleAdapter, match="does not say use_dora"):
        registry.push(undeclared, "a", base=forge.card)
    tensors[key][0] = 1e9
    huge = forge.folder("huge", tensors=tensors, config=forge.config(use_dora=True))
    with pytest.raises(IncompatibleAdapter, match="magnitude vector"):
        registry.push(huge, "a", base=forge.card)
