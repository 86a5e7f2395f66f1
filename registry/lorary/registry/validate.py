"""Decide whether a folder is an adapter of a base; whatever is not proven right is refused.

1. Files: only known names, no links, no pickles, sizes within limits (``folder``).
2. Manifest, if there is one: trained on exactly this base.
3. ``adapter_config.json``: plain LoRA, every key understood or switched off (``adapter_config``).
4. Header: checked by our own parser (``safetensors_file``).
5. Keys: exactly one A and one B for every module that the configuration targets in *this* base.
6. Shapes: those of the base; ranks: those of the configuration.
7. Values: finite, at least one module has an effect, and none is far larger than its weight (``values``).

A refusal is ``CorruptArtifact`` when the files contradict themselves or are not what they claim, and
``IncompatibleAdapter`` when they are sound, but not for this base or this server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, cast

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.adapter_config import AdapterConfig, examine_config, parse_config
from lorary.registry.base import BaseCard
from lorary.registry.findings import Report, attempt, refuse
from lorary.registry.folder import TENSORS_FILE, AdapterFolder, read_bytes, scan_folder
from lorary.registry.manifest import Accepted, Manifest
from lorary.registry.safetensors_file import TensorInfo, read_header
from lorary.registry.strict_json import show
from lorary.registry.values import ModuleTensors, check_values

MAX_RANK: Final = 512
PREFIX: Final = "base_model.model."
_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|(?P<magnitude>magnitude_vector))"
)
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
        magnitudes: whether every module has DoRA's magnitude vector.
    """

    rank: int
    modules: Mapping[str, ModuleLora]
    num_bytes: int
    dtype: str
    config: AdapterConfig
    magnitudes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a validation goes.

    Attributes:
        max_rank: largest rank of any module.
        accepted: what may pass though it is unusual; ``None``: what the folder's manifest says that
            the registry let pass when it was pushed. Whoever takes strangers' folders gives it.
        allow_dora: accept DoRA, which registries keep and servers do not serve.
        residual_base: the base is the one that PiSSA and its kin left behind.
    """

    max_rank: int = MAX_RANK
    accepted: Accepted | None = field(default_factory=Accepted)
    allow_dora: bool = False
    residual_base: bool = False


def lora_key(module: str, side: str) -> str:
    """Return the tensor name of a module's A or B."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def magnitude_key(module: str) -> str:
    """Return the tensor name of a module's DoRA magnitudes."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def validate_adapter(
    folder: Path, card: BaseCard, *, max_rank: int = MAX_RANK, allow_zero: bool = False
) -> AdapterSpec:
    """Check everything about the adapter in ``folder``; returning means that it may be served.

    What the registry was told to let pass when the version was pushed (``Manifest.accepted``) passes.

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
    accepted = Accepted(allow_zero=True) if allow_zero else None
    files = scan_folder(folder, allow_hardlinks=True)
    return validate_files(files, card, Limits(max_rank=max_rank, accepted=accepted))


def validate_files(
    files: AdapterFolder, card: BaseCard, limits: Limits | None = None
) -> AdapterSpec:
    """Do ``validate_adapter`` on a folder whose file list has been checked already."""
    spec = examine_files(files, card, refuse, limits)
    return cast("AdapterSpec", spec)  # `refuse` raises where there would be none


def examine_files(
    files: AdapterFolder, card: BaseCard, report: Report, limits: Limits | None = None
) -> AdapterSpec | None:
    """Report everything that is wrong with an adapter.

    Args:
        files: a folder whose file list has been checked.
        card: the base that is to carry it.
        report: told of every problem; one that stops the reading of a file hides those behind it.
        limits: how far to go.

    Returns:
        What the adapter is; ``None`` if that cannot be said.

    Raises:
        StorageError: a file cannot be read.
    """
    limits = limits or Limits()
    accepted = limits.accepted
    if files.has_manifest:
        manifest = attempt(report, lambda: read_manifest(files))
        if manifest is not None:
            attempt(report, lambda: check_base(manifest, card))
            accepted = accepted or manifest.accepted
    accepted = accepted or Accepted()
    config = examine_config(
        read_bytes(files.config),
        report,
        max_rank=limits.max_rank,
        allow_dora=limits.allow_dora,
        residual_base=limits.residual_base,
    )
    header = attempt(report, lambda: read_header(files.tensors))
    if header is None:
        return None
    modules = _modules(header.tensors, card, report, dora=config is not None and config.use_dora)
    if config is None:
        return None
    attempt(report, lambda: _check_targets(config, modules.keys(), card, report))
    ranks = attempt(report, lambda: config.ranks(modules.keys()))
    scales = None if ranks is None else attempt(report, lambda: config.scales(ranks))
    if ranks is None or scales is None or not modules:
        return None
    right = {
        m: found for m, found in modules.items() if _is_shaped(m, found, ranks[m], card, report)
    }
    check_values(
        files.tensors,
        right,
        scales,
        card,
        report,
        allow_zero=accepted.allow_zero,
        max_ratio=accepted.max_ratio,
    )
    widest = max((info.dtype for info in header.tensors.values()), key=lambda d: (_WIDTH[d], d))
    return AdapterSpec(
        rank=max(ranks.values()),
        modules={m: ModuleLora(ranks[m], scales[m]) for m in sorted(modules)},
        num_bytes=sum(info.num_bytes for info in header.tensors.values()),
        dtype=widest,
        config=config,
        magnitudes=config.use_dora,
    )


def check_form(files: AdapterFolder) -> None:
    """Check a registry's version without its base: canonical form, names, and shapes among themselves.

    No value is read. Whether the base has these modules in these shapes, who has the base must say.

    Raises:
        CorruptArtifact: the files are not what they claim, contradict themselves, or are not canonical.
        IncompatibleAdapter: something is switched on that is never served.
    """
    config = parse_config(read_bytes(files.config), max_rank=MAX_RANK, allow_dora=True)
    if not config.is_canonical:
        raise CorruptArtifact(
            "adapter_config.json is not in canonical form, in which every version is stored: "
            "lora_alpha equals r, and modules have plain names. Somebody else wrote this version."
        )
    tensors = read_header(files.tensors).tensors
    own: dict[str, tuple[int, int]] = {}
    for name, info in tensors.items():
        match = _LORA_KEY.fullmatch(name)
        if match is not None and match["side"]:
            rows, columns = own.get(match["module"], (0, 0))
            is_a = match["side"] == "A"
            own[match["module"]] = (rows, info.shape[-1]) if is_a else (info.shape[0], columns)
    card = BaseCard(
        name="of this adapter",
        fingerprint="",
        architecture="unknown",
        hidden_size=0,
        num_layers=0,
        vocab_size=0,
        modules=own,
        head_modules=(),
    )
    modules = _modules(tensors, card, refuse, dora=config.use_dora)
    _check_targets(config, modules.keys(), card, refuse)
    ranks = config.ranks(modules.keys())
    for module, found in modules.items():
        _is_shaped(module, found, ranks[module], card, refuse)


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


def _modules(
    tensors: Mapping[str, TensorInfo], card: BaseCard, report: Report, *, dora: bool
) -> dict[str, ModuleTensors]:
    """Sort tensors by the base's modules: one A and one B each; anything else is reported."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _LORA_KEY.fullmatch(name)
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


def _check_targets(config: AdapterConfig, found: Set[str], card: BaseCard, report: Report) -> None:
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


def _is_shaped(
    module: str, found: ModuleTensors, rank: int, card: BaseCard, report: Report
) -> bool:
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
