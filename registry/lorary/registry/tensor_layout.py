"""Which tensors an adapter must hold, under which names and in which shapes; anything else is reported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Final

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.adapter_config import AdapterConfig
from lorary.registry.base import BaseCard
from lorary.registry.findings import Report
from lorary.registry.folder import TENSORS_FILE
from lorary.registry.safetensors_file import TensorInfo
from lorary.registry.strict_json import show
from lorary.registry.values import ModuleTensors

PREFIX: Final = "base_model.model."
LORA_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|(?P<magnitude>magnitude_vector))"
)


def lora_key(module: str, side: str) -> str:
    """Return the tensor name of a module's A or B."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def magnitude_key(module: str) -> str:
    """Return the tensor name of a module's DoRA magnitudes."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def sort_by_module(
    tensors: Mapping[str, TensorInfo], card: BaseCard, report: Report, *, dora: bool
) -> dict[str, ModuleTensors]:
    """Sort tensors by the base's modules: one A and one B each; anything else is reported."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = LORA_KEY.fullmatch(name)
        if match is None or (match["magnitude"] and not dora):
            report(IncompatibleAdapter(_why_not_lora(name)))
        elif match["module"] not in card.modules:
            report(IncompatibleAdapter(_why_not_module(match["module"], card)))
        else:
            sides.setdefault(match["module"], {})[match["side"] or "magnitude"] = info
    modules: dict[str, ModuleTensors] = {}
    for module, found in sides.items():
        missing = {"A": lora_key(module, "A"), "B": lora_key(module, "B")}
        if dora:
            missing["magnitude"] = magnitude_key(module)
        for side in found:
            missing.pop(side)
        for key in missing.values():
            together = "A, B and magnitudes" if dora else "A and B"
            report(CorruptArtifact(f"{TENSORS_FILE} lacks tensor {key}; {together} go together"))
        if not missing:
            modules[module] = ModuleTensors(found["A"], found["B"], found.get("magnitude"))
    return modules


def _why_not_lora(name: str) -> str:
    if "lora_magnitude_vector" in name:
        reason = "it belongs to DoRA, but adapter_config.json does not say use_dora"
    elif "lora_embedding" in name or "trainable_tokens" in name:
        reason = "it adapts the token table, which all adapters share; target linear layers only"
    elif "vera_" in name:
        reason = "it belongs to VeRA; only plain LoRA is served"
    else:
        reason = (
            "it is no LoRA matrix of the form 'base_model.model.<module>.lora_A.weight', and loading "
            "it could overwrite the base for everybody. Save with save_embedding_layers=False and "
            "without modules_to_save"
        )
    return f"{TENSORS_FILE} holds tensor {show(name)}: {reason}"


def _why_not_module(module: str, card: BaseCard) -> str:
    if module in card.head_modules:
        return (
            f"adapter targets the output head {module}, which is not served (its size is the "
            "vocabulary, and it may be tied to the token table). Train without it in target_modules."
        )
    if any(part.startswith(("embed", "wte", "wpe")) for part in module.split(".")):
        return (
            f"adapter targets the embedding {show(module)}, which all adapters share; "
            "target linear layers only"
        )
    near = next((m for m in card.modules if m.endswith("." + module.rpartition(".")[2])), "")
    hint = f" (it has {near})" if near else ""
    return (
        f"adapter targets module {show(module)}, which base '{card.name}' ({card.architecture}, "
        f"{card.num_layers} layers) does not have{hint}"
    )


def check_targets(config: AdapterConfig, found: Set[str], card: BaseCard, report: Report) -> None:
    """Compare the modules that the configuration means with those that have tensors."""
    if not isinstance(config.target_modules, str):
        for head in sorted(config.targets(card.head_modules)):
            report(IncompatibleAdapter(_why_not_module(head, card)))
    wanted = config.targets(card.modules.keys())
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing:
        report(
            CorruptArtifact(
                f"{TENSORS_FILE} lacks {len(missing)} of the {len(wanted)} modules that "
                f"adapter_config.json targets, such as {missing[0]}"
            )
        )
    if extra:
        report(
            CorruptArtifact(
                f"{TENSORS_FILE} adapts {len(extra)} modules that adapter_config.json does not "
                f"target, such as {extra[0]}"
            )
        )


def is_shaped(module: str, found: ModuleTensors, rank: int, card: BaseCard, report: Report) -> bool:
    """Tell whether a module's tensors have the shapes of the base and of the configuration."""
    out_features, in_features = card.modules[module]
    needed: list[tuple[TensorInfo, tuple[int, ...], int]] = [
        (found.a, (rank, in_features), 1),
        (found.b, (out_features, rank), 0),
    ]
    if found.magnitude is not None:
        needed.append((found.magnitude, (out_features,), 0))
    is_right = True
    for info, wanted, wide_dim in needed:
        if info.shape == wanted:
            continue
        is_right = False
        problem = f"tensor {info.name} has shape {list(info.shape)}, and {list(wanted)} is needed"
        if len(info.shape) == len(wanted) == 2 and info.shape[wide_dim] == wanted[wide_dim]:
            report(CorruptArtifact(f"{problem}: adapter_config.json gives {module} rank {rank}"))
        else:
            report(
                IncompatibleAdapter(
                    f"{problem}: in base '{card.name}' {module} maps {in_features} to {out_features} "
                    "features"
                )
            )
    return is_right
