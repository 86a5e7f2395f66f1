"""What changed between two versions: a code review for weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.registry.blobs import Progress
from lorary.registry.folder import CONFIG_FILE, TENSORS_FILE, read_bytes
from lorary.registry.manifest import Manifest, Metrics, Task
from lorary.registry.refs import AdapterRef, parse_ref, parse_selector
from lorary.registry.results import Resolved
from lorary.registry.store import Registry
from lorary.registry.strict_json import parse_json
from lorary.registry.weight_diff import ModuleChange, compare_weights, total_change


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """One value that differs; ``None`` where it is not there."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """One metric of the adapter: before, after, and the difference where both are there."""

    metric: str
    before: float | None
    after: float | None
    delta: float | None
    is_primary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionDiff:
    """Everything that differs between two versions.

    Attributes:
        before: the older one.
        after: the newer one.
        summary: the whole in a line.
        config: differing keys of the adapter's configuration.
        base: differing facts about the base.
        task: differing facts about the task, the template among them.
        data: differing facts about the data; its fingerprint says whether it is the same.
        training: differing facts about the training.
        metrics: all metrics of either.
        num_examples: held-out examples, before and after.
        change: the norm of all weights' differences over that of the weights before.
        modules: the most changed first.
    """

    before: Resolved
    after: Resolved
    summary: str
    config: tuple[Changed, ...]
    base: tuple[Changed, ...]
    task: tuple[Changed, ...]
    data: tuple[Changed, ...]
    training: tuple[Changed, ...]
    metrics: tuple[MetricChange, ...]
    num_examples: tuple[int | None, int | None]
    change: float | None
    modules: tuple[ModuleChange, ...]


def diff_versions(
    registry: Registry, before: str, after: str, progress: Progress | None = None
) -> VersionDiff:
    """Compare two versions, of one adapter or of two.

    Args:
        registry: where they are.
        before: a ref.
        after: a ref, or only its part from ``@`` on: ``@7``.
        progress: told of bytes fetched.

    Raises:
        InvalidRef: a text is not a ref.
        AdapterNotFound: no such version.
        CorruptArtifact: a version is damaged.
    """
    first_ref = parse_ref(before)
    second_ref: AdapterRef = (
        parse_selector(first_ref.name, after) if after.startswith("@") else parse_ref(after)
    )
    sides = tuple(registry.resolve(ref) for ref in (first_ref, second_ref))
    one, two = (registry.manifest(side) for side in sides)
    folders = tuple(registry.fetch(side, progress) for side in sides)
    modules = compare_weights(*(folder / TENSORS_FILE for folder in folders))
    configs = tuple(_config(folder) for folder in folders)
    change = total_change(modules)
    metrics = _metrics(one.metrics, two.metrics)
    parts = {
        "config": _changed(*configs),
        "base": _changed(_base(one), _base(two)),
        "task": _changed(_task(one), _task(two)),
        "data": _changed(one.data, two.data),
        "training": _changed(one.training, two.training),
    }
    return VersionDiff(
        before=sides[0],
        after=sides[1],
        summary=_summary(sides, modules, change, metrics, parts, one, two),
        metrics=metrics,
        num_examples=(
            one.metrics.num_examples if one.metrics else None,
            two.metrics.num_examples if two.metrics else None,
        ),
        change=change,
        modules=modules,
        **parts,
    )


def _config(folder: Path) -> dict[str, Any]:
    return parse_json(read_bytes(folder / CONFIG_FILE), CONFIG_FILE)


def _base(manifest: Manifest) -> dict[str, Any]:
    base = manifest.base
    return {
        "name": base.name,
        "fingerprint": base.fingerprint,
        "revision": base.revision,
        "quantization": base.quantization,
    }


def _task(manifest: Manifest) -> dict[str, Any]:
    """Return the facts about the task, and where there are several about each of them."""
    each = {name: _task_facts(task) for name, task in manifest.tasks.items()}
    return _task_facts(manifest.task) | ({"tasks": each} if each else {})


def _task_facts(task: Task) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "template": task.template,
        "labels": list(task.labels),
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
    }


def _changed(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[Changed, ...]:
    """Return what differs, by dotted keys."""
    first, second = _flat(one), _flat(two)
    return tuple(
        Changed(key=key, before=first.get(key), after=second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def _metrics(one: Metrics | None, two: Metrics | None) -> tuple[MetricChange, ...]:
    first, second = (metrics.adapter if metrics else {} for metrics in (one, two))
    primary = (two or one).primary if (two or one) else ""  # type: ignore[union-attr]
    found = []
    for name in sorted(first.keys() | second.keys(), key=lambda n: (n != primary, n)):
        before, after = first.get(name), second.get(name)
        delta = None if before is None or after is None else after - before
        found.append(
            MetricChange(
                metric=name, before=before, after=after, delta=delta, is_primary=name == primary
            )
        )
    return tuple(found)


def _summary(
    sides: tuple[Resolved, ...],
    modules: tuple[ModuleChange, ...],
    change: float | None,
    metrics: tuple[MetricChange, ...],
    parts: Mapping[str, tuple[Changed, ...]],
    one: Manifest,
    two: Manifest,
) -> str:
    moved = [m for m in modules if m.kind != "same"]
    said = [f"{len(moved)} of {len(modules)} modules changed"] if moved else ["the same weights"]
    if moved and change is not None:
        said.append(f"‖ΔBA‖ is {change:.3g} of ‖BA‖")
    for metric in metrics[:1]:
        if metric.delta is not None:
            said.append(
                f"{metric.metric} {metric.before:.4g} → {metric.after:.4g} ({metric.delta:+.4g})"
            )
        else:
            side = "before" if metric.after is None else "after"
            said.append(f"{metric.metric} is known {side} only")
    said.append(_about_data(one, two))
    named = [key for key in ("config", "base", "task") if parts[key]]
    said.append(f"another {', '.join(named)}" if named else "config, base and task are the same")
    names = [f"{side.name}@{side.version}" for side in sides]
    return f"{names[0]} → {names[1]}: {'; '.join(said)}"


def _about_data(one: Manifest, two: Manifest) -> str:
    prints = [json.dumps(m.data.get("fingerprint")) for m in (one, two)]
    if "null" in prints:
        return "data unknown"
    return "the same data" if prints[0] == prints[1] else "other data"
