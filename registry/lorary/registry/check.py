"""Look at an adapter folder in full: everything that is wrong with it, and who can load it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.errors import CorruptArtifact, IncompatibleAdapter, LoraryError
from lorary.registry.base import BaseCard
from lorary.registry.canonical import write_canonical
from lorary.registry.findings import attempt
from lorary.registry.folder import AdapterFolder, examine_folder, read_bytes
from lorary.registry.layouts import AdapterSpec
from lorary.registry.manifest import Accepted, Conversion
from lorary.registry.methods.convert import convert, method_of
from lorary.registry.safetensors_file import read_header
from lorary.registry.servability import SERVERS, Server, Traits, Verdict, judge
from lorary.registry.strict_json import parse_json
from lorary.registry.task_heads import kept_task
from lorary.registry.tensor_layout import PREFIX
from lorary.registry.validate import Limits, check_base, examine_files, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that a push would refuse: the error's class, and what it says."""

    error: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What there is to say about an adapter.

    Attributes:
        problems: all that a push would refuse, none if it would be taken.
        as_given: what servers do with the files as they are.
        canonical: what they do with the form that the registry would keep; empty with problems.
        conversion: how that form is made; ``None`` with problems.
    """

    problems: tuple[Problem, ...]
    as_given: tuple[Verdict, ...]
    canonical: tuple[Verdict, ...]
    conversion: Conversion | None


def check_folder(
    folder: Path,
    card: BaseCard,
    *,
    servers: Sequence[Server] = SERVERS,
    accepted: Accepted | None = None,
    residual_base: bool = False,
    dest: Path | None = None,
) -> CheckReport:
    """Check an adapter as a push would, but to the end.

    Args:
        folder: a PEFT folder, with or without ``manifest.json``.
        card: the base that is to carry it.
        servers: whose verdicts are wanted.
        accepted: what may pass though it is unusual.
        residual_base: the base is the one that PiSSA or its kin left behind.
        dest: an empty folder that gets the canonical form, if there is one.

    Raises:
        StorageError: the folder is missing or cannot be read.
    """
    found: list[LoraryError] = []
    files = examine_folder(Path(folder), found.append)
    manifest = None
    if files is not None and files.has_manifest:
        manifest = attempt(lambda _: None, lambda: read_manifest(files))
    limits = Limits(
        accepted=accepted or Accepted(),
        allow_dora=True,
        residual_base=residual_base,
        task=kept_task(manifest),
    )
    conversion, canonical = None, None
    with ExitStack() as stack:
        if files is not None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorary-check-")))
            plain, conversion, spec = _examine(files, card, found, limits, work)
            if spec is not None and not found:
                canonical = dest or work / "canonical"
                canonical.mkdir(exist_ok=True)
                error = write_canonical(plain, spec, card, canonical)
                conversion = Conversion(
                    source=conversion.source, max_error=max(conversion.max_error, error)
                )
        given = None if files is None else attempt(lambda _: None, lambda: _traits(files, card))
        kept = None
        if canonical is not None:
            path = AdapterFolder(path=canonical, has_manifest=False, kept=(), left_out=())
            kept = _traits(path, card)
    count = len(found)
    return CheckReport(
        problems=tuple(Problem(error=type(p).__name__, text=str(p)) for p in found),
        as_given=() if given is None else tuple(judge(s, given, card, count) for s in servers),
        canonical=() if kept is None else tuple(judge(s, kept, card, 0) for s in servers),
        conversion=conversion if kept is not None else None,
    )


def worst_error(report: CheckReport) -> type[LoraryError]:
    """Return the class whose exit code stands for all problems: damage before incompatibility."""
    is_corrupt = any(p.error == CorruptArtifact.__name__ for p in report.problems)
    return CorruptArtifact if is_corrupt else IncompatibleAdapter


def _examine(
    files: AdapterFolder, card: BaseCard, found: list[LoraryError], limits: Limits, work: Path
) -> tuple[AdapterFolder, Conversion, AdapterSpec | None]:
    """Report what is wrong with ``files``, or with the LoRA that they become."""
    conversion = Conversion(source="LORA", max_error=0.0)
    before = len(found)
    method = attempt(found.append, lambda: method_of(files))
    if len(found) > before:
        return files, conversion, None
    if method is None:
        return files, conversion, examine_files(files, card, found.append, limits)
    if files.has_manifest:
        manifest = attempt(found.append, lambda: read_manifest(files))
        if manifest is not None:
            attempt(found.append, lambda: check_base(manifest, card))
    folder = work / "plain"
    folder.mkdir()
    converted = attempt(found.append, lambda: convert(method, files, card, folder))
    if converted is None:
        return files, conversion, None
    plain = AdapterFolder(path=folder, has_manifest=False, kept=(), left_out=())
    return plain, converted, examine_files(plain, card, found.append, limits)


def _traits(files: AdapterFolder, card: BaseCard) -> Traits:
    config: dict[str, Any] = parse_json(read_bytes(files.config), "adapter_config.json")
    tensors = read_header(files.tensors).tensors
    lora_a = {n: info for n, info in tensors.items() if n.endswith(".lora_A.weight")}
    targets = config.get("target_modules")
    missing = 0
    if isinstance(targets, list) and config.get("layers_to_transform") is None:
        modules = {n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in lora_a}
        wanted = {m for m in card.modules if m.rpartition(".")[2] in targets or m in targets}
        excluded = config.get("exclude_modules") or ()
        missing = 0 if excluded or not lora_a else len(wanted - modules)
    return Traits(
        config=config,
        names=tuple(tensors),
        ranks=tuple(info.shape[0] for info in lora_a.values()),
        dtypes=frozenset(info.dtype for info in tensors.values()),
        missing=missing,
    )
