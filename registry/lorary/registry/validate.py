"""Decide whether a folder is an adapter of a base; whatever is not proven right is refused.

1. Files: only known names, no links, no pickles, sizes within limits (``folder``).
2. Manifest, if there is one: trained on exactly this base.
3. ``adapter_config.json``: LoRA or DoRA, every key understood or switched off (``adapter_config``).
4. Header: checked by our own parser (``safetensors_file``).
5. Keys: exactly one A and one B for every module that the configuration targets in *this* base, and
   DoRA's magnitude vector where it says so.
6. Shapes: those of the base; ranks: those of the configuration.
7. Values: finite, at least one module has an effect, and none is far larger than its weight (``values``).

A refusal is ``CorruptArtifact`` when the files contradict themselves or are not what they claim, and
``IncompatibleAdapter`` when they are sound, but not for this base or this server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.adapter_config import AdapterConfig, examine_config, parse_config
from lorary.registry.base import BaseCard
from lorary.registry.findings import Report, attempt, refuse
from lorary.registry.folder import TENSORS_FILE, AdapterFolder, read_bytes, scan_folder
from lorary.registry.layouts import AdapterSpec, Layout, Layouts, ModuleLora, named_invocation
from lorary.registry.manifest import Accepted, Manifest, Task
from lorary.registry.safetensors_file import (
    RawHeader,
    TensorInfo,
    parse_header,
    read_header,
    read_raw_header,
)
from lorary.registry.strict_json import show
from lorary.registry.task_heads import (
    TASK_TYPES,
    check_heads,
    is_served,
    live_card,
    names_of_heads,
    why_not_served,
)
from lorary.registry.tensor_layout import LORA_KEY, check_targets, is_shaped, sort_by_module
from lorary.registry.values import Squares, check_finite, check_values

MAX_RANK: Final = 512
_WIDTH: Final = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a validation goes.

    Attributes:
        max_rank: largest rank of any module.
        accepted: what may pass though it is unusual; ``None``: what the folder's manifest says that
            the registry let pass when it was pushed. Whoever takes strangers' folders gives it.
        allow_dora: accept DoRA, which registries keep and servers serve, and which no plain LoRA is.
        residual_base: the base is the one that PiSSA and its kin left behind.
        task: what the adapter is for, where registries keep its kind and servers do not serve it.
        squares: how matrices are read to check their numbers; ``None``: by numpy.
        layouts: what was found right before; ``None`` looks at everything anew. Not for reports of all that
            is wrong.
    """

    max_rank: int = MAX_RANK
    accepted: Accepted | None = field(default_factory=Accepted)
    allow_dora: bool = False
    residual_base: bool = False
    task: Task | None = None
    squares: Squares | None = None
    layouts: Layouts | None = None


def validate_adapter(
    folder: Path,
    card: BaseCard,
    *,
    max_rank: int = MAX_RANK,
    allow_zero: bool = False,
    squares: Squares | None = None,
    layouts: Layouts | None = None,
) -> AdapterSpec:
    """Check everything about the adapter in ``folder``; returning means that it may be served.

    What the registry was told to let pass when the version was pushed (``Manifest.accepted``) passes.

    Args:
        folder: a PEFT folder, with or without ``manifest.json``.
        card: the base that is to carry it.
        max_rank: largest rank of any module.
        allow_zero: accept an adapter that changes nothing.
        squares: as in ``Limits``.
        layouts: likewise; they are for one base and one ``max_rank``.

    Raises:
        CorruptArtifact: files that are not what they claim, NaN, contradictions.
        IncompatibleAdapter: another base, an unserved kind or option, a rank over the limit.
        StorageError: the folder is missing or cannot be read.
    """
    accepted = Accepted(allow_zero=True) if allow_zero else None
    files = scan_folder(folder, allow_hardlinks=True)
    limits = Limits(
        max_rank=max_rank, accepted=accepted, allow_dora=True, squares=squares, layouts=layouts
    )
    return validate_files(files, card, limits)


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
    manifest = attempt(report, lambda: read_manifest(files)) if files.has_manifest else None
    if manifest is not None:
        attempt(report, lambda: check_base(manifest, card))
        accepted = accepted or manifest.accepted
        if limits.task is None and not is_served(manifest.task):
            report(IncompatibleAdapter(why_not_served(manifest.task)))
    accepted = accepted or Accepted()
    config = read_bytes(files.config)
    if limits.layouts is None:
        layout = _examine_layout(
            config, lambda: read_raw_header(files.tensors), manifest, card, report, limits
        )
    else:
        header = read_raw_header(files.tensors)
        layout = limits.layouts.find(
            config,
            header,
            manifest,
            lambda: _examine_layout(config, lambda: header, manifest, card, refuse, limits),
        )
    if layout is None:
        return None
    check_values(
        files.tensors,
        layout.modules,
        {module: lora.scale for module, lora in layout.spec.modules.items()},
        card,
        report,
        allow_zero=accepted.allow_zero,
        max_ratio=accepted.max_ratio,
        squares=limits.squares,
    )
    check_finite(files.tensors, layout.heads, report)
    return layout.spec


def _examine_layout(
    raw_config: bytes,
    raw_header: Callable[[], RawHeader],
    manifest: Manifest | None,
    card: BaseCard,
    report: Report,
    limits: Limits,
) -> Layout | None:
    """Report what is wrong with all but the numbers; what is returned has the modules that are right."""
    task = limits.task or Task()
    config = examine_config(
        raw_config,
        report,
        max_rank=limits.max_rank,
        allow_dora=limits.allow_dora,
        residual_base=limits.residual_base,
        task_type=TASK_TYPES[task.kind],
    )
    header = attempt(report, lambda: parse_header(raw_header(), TENSORS_FILE))
    if header is None:
        return None
    heads: Mapping[str, TensorInfo] = {}
    if not is_served(task):
        card = live_card(card, task, header.tensors)
        declared = () if config is None else config.modules_to_save
        heads = check_heads(header.tensors, declared, task, card, report)
    modules = sort_by_module(
        {name: info for name, info in header.tensors.items() if name not in heads},
        card,
        report,
        dora=config is not None and config.use_dora,
    )
    if config is None:
        return None
    attempt(report, lambda: _check_vocabulary(config, card))
    if manifest is not None:
        attempt(report, lambda: _check_invocation(config, manifest))
    attempt(report, lambda: check_targets(config, modules.keys(), card, report))
    ranks = attempt(report, lambda: config.ranks(modules.keys()))
    scales = None if ranks is None else attempt(report, lambda: config.scales(ranks))
    if ranks is None or scales is None or not modules:
        return None
    right = {
        m: found for m, found in modules.items() if is_shaped(m, found, ranks[m], card, report)
    }
    widest = max((info.dtype for info in header.tensors.values()), key=lambda d: (_WIDTH[d], d))
    spec = AdapterSpec(
        rank=max(ranks.values()),
        modules={m: ModuleLora(ranks[m], scales[m]) for m in sorted(modules)},
        num_bytes=sum(info.num_bytes for info in header.tensors.values()),
        dtype=widest,
        config=config,
        tensors=header.tensors,
        magnitudes=config.use_dora,
        heads=names_of_heads(heads, config.modules_to_save),
    )
    return Layout(spec=spec, modules=right, heads=tuple(heads.values()))


def _check_invocation(config: AdapterConfig, manifest: Manifest) -> None:
    """Refuse a registry's manifest that names another invocation: by it servers look through prompts."""
    named = named_invocation(manifest)
    if named is not None and named != config.invocation_tokens:
        raise CorruptArtifact(
            f"the adapter is on from the tokens {list(config.invocation_tokens)}, and its manifest names "
            f"{list(named)}: it would be on where it must be off. Push it again, without that manifest"
        )


def _check_vocabulary(config: AdapterConfig, card: BaseCard) -> None:
    """Refuse an invocation that no prompt of this base can hold: the adapter would never be on."""
    if max(config.invocation_tokens, default=-1) >= card.vocab_size:
        raise IncompatibleAdapter(
            f"adapter_config.json has the invocation token {max(config.invocation_tokens)}; base "
            f"'{card.name}' has {card.vocab_size} tokens, so the adapter would never be active. Train it on "
            "this base"
        )


def check_form(files: AdapterFolder) -> None:
    """Check a registry's version without its base: canonical form, names, and shapes among themselves.

    No value is read. Whether the base has these modules in these shapes, who has the base must say.

    Raises:
        CorruptArtifact: the files are not what they claim, contradict themselves, or are not canonical.
        IncompatibleAdapter: something is switched on that is never served.
    """
    manifest = read_manifest(files) if files.has_manifest else None
    task = Task() if manifest is None else manifest.task
    config = parse_config(
        read_bytes(files.config),
        max_rank=MAX_RANK,
        allow_dora=True,
        task_type=TASK_TYPES[task.kind],
    )
    if not config.is_canonical:
        raise CorruptArtifact(
            "adapter_config.json is not in canonical form, in which every version is stored: "
            "lora_alpha equals r, and modules have plain names. Somebody else wrote this version."
        )
    if manifest is not None:
        _check_invocation(config, manifest)
    tensors = dict(read_header(files.tensors).tensors)
    if not is_served(task):
        for name in check_heads(tensors, config.modules_to_save, task, None, refuse):
            del tensors[name]
    own: dict[str, tuple[int, int]] = {}
    for name, info in tensors.items():
        match = LORA_KEY.fullmatch(name)
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
    modules = sort_by_module(tensors, card, refuse, dora=config.use_dora)
    check_targets(config, modules.keys(), card, refuse)
    ranks = config.ranks(modules.keys())
    for module, found in modules.items():
        is_shaped(module, found, ranks[module], card, refuse)


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
