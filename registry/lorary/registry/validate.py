"""Decide whether a folder is an adapter of a base; whatever is not proven right is refused.

1. Files: only known names, no links, no pickles, sizes within limits (``folder``).
2. Manifest, if there is one: trained on exactly this base.
3. ``adapter_config.json``: plain LoRA, every key understood or switched off (``adapter_config``).
4. Header: checked by our own parser (``safetensors_file``).
5. Keys: exactly one A and one B for every module that the configuration targets in *this* base.
6. Shapes: those of the base; ranks: those of the configuration.
7. Values: finite, and at least one module has an effect.

A refusal is ``CorruptArtifact`` when the files contradict themselves or are not what they claim, and
``IncompatibleAdapter`` when they are sound, but not for this base or this server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.adapter_config import AdapterConfig, parse_config
from lorary.registry.base import BaseCard
from lorary.registry.folder import TENSORS_FILE, AdapterFolder, read_bytes, scan_folder
from lorary.registry.manifest import Manifest
from lorary.registry.safetensors_file import (
    TensorInfo,
    infinity,
    largest_magnitude,
    read_header,
    read_tensors,
)
from lorary.registry.strict_json import show

MAX_RANK: Final = 512
PREFIX: Final = "base_model.model."
_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_WIDTH: Final = {"F16": 2, "BF16": 2, "F32": 4}


class ModuleLora(NamedTuple):
    """Rank of one module's A and B, and the factor on their product."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What a validated adapter needs of a server.

    Attributes:
        rank: the largest rank of any module.
        modules: module name to ``(rank, scale)``; the scale is 1.0 everywhere in canonical form.
        num_bytes: bytes of tensor data.
        dtype: the widest dtype of any tensor: ``F32``, ``BF16`` or ``F16``.
        config: the checked configuration.
    """

    rank: int
    modules: Mapping[str, ModuleLora]
    num_bytes: int
    dtype: str
    config: AdapterConfig


def lora_key(module: str, side: str) -> str:
    """Return the tensor name of a module's A or B."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def validate_adapter(
    folder: Path, card: BaseCard, *, max_rank: int = MAX_RANK, allow_zero: bool = False
) -> AdapterSpec:
    """Check everything about the adapter in ``folder``; returning means that it may be served.

    Args:
        folder: a PEFT folder, with or without ``manifest.json``.
        card: the base that is to carry it.
        max_rank: largest rank of any module.
        allow_zero: accept an adapter that changes nothing.

    Raises:
        CorruptArtifact: files that are not what they claim, NaN, contradictions.
        IncompatibleAdapter: another base, an unserved kind or option, a rank over the limit.
        StorageError: the folder is missing or cannot be read.
    """
    files = scan_folder(folder, allow_hardlinks=True)
    return validate_files(files, card, max_rank=max_rank, allow_zero=allow_zero)


def validate_files(
    files: AdapterFolder, card: BaseCard, *, max_rank: int = MAX_RANK, allow_zero: bool = False
) -> AdapterSpec:
    """Do ``validate_adapter`` on a folder whose file list has been checked already."""
    if files.has_manifest:
        check_base(read_manifest(files), card)
    config = parse_config(read_bytes(files.config), max_rank=max_rank)
    tensors = read_header(files.tensors).tensors
    pairs = _pairs(tensors, card)
    _check_targets(config, pairs.keys(), card)
    ranks = config.ranks(pairs.keys())
    for module, (a, b) in pairs.items():
        _check_shapes(module, a, b, ranks[module], card)
    scales = config.scales(ranks)
    _check_values(files.tensors, pairs, allow_zero=allow_zero)
    return AdapterSpec(
        rank=max(ranks.values()),
        modules={m: ModuleLora(ranks[m], scales[m]) for m in sorted(pairs)},
        num_bytes=sum(info.num_bytes for info in tensors.values()),
        dtype=max((info.dtype for info in tensors.values()), key=lambda d: (_WIDTH[d], d)),
        config=config,
    )


def read_manifest(files: AdapterFolder) -> Manifest:
    """Read the folder's manifest.

    Raises:
        CorruptArtifact: it is not a manifest.
    """
    return Manifest.from_json(read_bytes(files.manifest))


def check_base(manifest: Manifest, card: BaseCard) -> None:
    """Compare the base that a manifest names with ``card``.

    Raises:
        IncompatibleAdapter: the fingerprints differ.
    """
    trained = manifest.base
    if trained.fingerprint != card.fingerprint:
        raise IncompatibleAdapter(
            f"adapter was trained on base {show(trained.name)} ({trained.fingerprint[:19]}…); this "
            f"base is '{card.name}' ({card.fingerprint[:19]}…). Weights, configuration or tokenizer "
            "differ: use the same base, or train the adapter on this one."
        )


def _pairs(
    tensors: Mapping[str, TensorInfo], card: BaseCard
) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Sort tensors into one (A, B) per module of the base; anything else is refused."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _LORA_KEY.fullmatch(name)
        if match is None:
            raise IncompatibleAdapter(_why_not_lora(name))
        module = match["module"]
        if module not in card.modules:
            raise IncompatibleAdapter(_why_not_module(module, card))
        sides.setdefault(module, {})[match["side"]] = info
    for module, found in sides.items():
        if len(found) != 2:
            missing = lora_key(module, "B" if "A" in found else "A")
            raise CorruptArtifact(f"{TENSORS_FILE} lacks tensor {missing}; A and B go together")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _why_not_lora(name: str) -> str:
    if "lora_magnitude_vector" in name:
        reason = "it belongs to DoRA; only plain LoRA is served"
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


def _check_targets(config: AdapterConfig, found: Set[str], card: BaseCard) -> None:
    """Compare the modules that the configuration means with those that have tensors."""
    if not isinstance(config.target_modules, str):
        for head in sorted(config.targets(card.head_modules)):
            raise IncompatibleAdapter(_why_not_module(head, card))
    wanted = config.targets(card.modules.keys())
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise CorruptArtifact(
            f"{TENSORS_FILE} lacks {len(missing)} of the {len(wanted)} modules that "
            f"adapter_config.json targets, such as {missing[0]}"
        )
    if extra:
        raise CorruptArtifact(
            f"{TENSORS_FILE} adapts {len(extra)} modules that adapter_config.json does not target, "
            f"such as {extra[0]}"
        )


def _check_shapes(module: str, a: TensorInfo, b: TensorInfo, rank: int, card: BaseCard) -> None:
    out_features, in_features = card.modules[module]
    for info, wanted in ((a, (rank, in_features)), (b, (out_features, rank))):
        if info.shape == wanted:
            continue
        side = "A" if info is a else "B"
        wide = in_features if side == "A" else out_features
        problem = f"tensor {info.name} has shape {list(info.shape)}, and {list(wanted)} is needed"
        if len(info.shape) == 2 and info.shape[1 if side == "A" else 0] == wide:
            raise CorruptArtifact(f"{problem}: adapter_config.json gives {module} rank {rank}")
        raise IncompatibleAdapter(
            f"{problem}: in base '{card.name}' {module} maps {in_features} to {out_features} features"
        )


def _check_values(
    path: Path, pairs: Mapping[str, tuple[TensorInfo, TensorInfo]], *, allow_zero: bool
) -> None:
    has_effect = False
    arrays = read_tensors(path, (info for pair in pairs.values() for info in pair))
    for pair in pairs.values():
        non_zero = True
        for info in pair:
            largest = largest_magnitude(array := next(arrays))
            if largest >= infinity(array.dtype):
                raise CorruptArtifact(
                    f"tensor {info.name} holds NaN or infinite values; training diverged, or the "
                    "file is damaged. Train again with a smaller learning rate."
                )
            non_zero = non_zero and largest > 0
        has_effect = has_effect or non_zero
    if not has_effect and not allow_zero:
        raise IncompatibleAdapter(
            "adapter has no effect: in every module A or B is all zeros, as before training. "
            "Push a trained adapter, or allow it with --allow-zero."
        )
