"""Find versions by what their manifests say.

=====================  ==================================================================
``task=classification``  a text field is that, upper or lower case; ``*`` stands for anything
``accuracy>0.9``       a figure: one of the adapter's metrics, or rank, version, size, examples
``movie``              a word anywhere in name, description, base, data source, labels
=====================  ==================================================================

A version must fit all of them. One that lacks a figure does not fit a comparison of it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lorary.errors import InvalidRequest
from lorary.registry.manifest import Manifest
from lorary.registry.requirements import METRIC, NUMBER, OPERATORS
from lorary.registry.results import VersionInfo
from lorary.registry.store import Registry

TEXTS: Final[dict[str, Callable[[VersionInfo, Manifest], Sequence[str]]]] = {
    "name": lambda info, _: [info.name],
    "base": lambda info, _: [info.base_name, info.base_fingerprint],
    "task": lambda info, manifest: [info.task_kind, *manifest.tasks],
    "method": lambda _, manifest: [manifest.method.name],
    "alias": lambda info, _: info.aliases,
    "label": lambda _, manifest: manifest.task.labels,
    "data": lambda _, manifest: [str(manifest.data.get(k, "")) for k in ("source", "fingerprint")],
    "module": lambda _, manifest: manifest.method.target_modules,
}  # fmt: skip
FIGURES: Final[dict[str, Callable[[VersionInfo, Manifest], float | None]]] = {
    "rank": lambda info, _: info.rank,
    "version": lambda info, _: info.version,
    "size": lambda info, _: info.size_bytes,
    "examples": lambda _, manifest: manifest.metrics.num_examples if manifest.metrics else None,
}
_COMPARISON: Final = re.compile(
    rf"(?P<key>{METRIC})\s*(?P<op>>=|<=|==|>|<)\s*(?P<value>[+-]?{NUMBER})"
)
_FIELD: Final = re.compile(r"(?P<key>[a-z]+)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search gave.

    Attributes:
        versions: those that fit, sorted.
        figures: by ``name@version``: the figures that were compared or sorted by.
        unknown: figures that were asked for and that no version has.
        known: the metrics that versions have.
    """

    versions: tuple[VersionInfo, ...]
    figures: dict[str, dict[str, float]]
    unknown: tuple[str, ...]
    known: tuple[str, ...]


def search(
    registry: Registry, terms: Sequence[str], *, sort: str = "", is_latest: bool = False
) -> Found:
    """Return the versions that fit all terms.

    Args:
        registry: where to look.
        terms: fields, comparisons and words.
        sort: a figure, largest first; by default the first one compared, and else name and number.
        is_latest: look at every adapter's newest version only.

    Raises:
        InvalidRequest: a term names a field that no version has.
    """
    tests, keys = _tests(terms)
    if sort and sort != "name":
        keys = [sort, *keys]
    described = list(registry.described())
    if is_latest:
        described = list({info.name: (info, manifest) for info, manifest in described}.values())
    found: list[tuple[VersionInfo, dict[str, float]]] = []
    known: set[str] = set()
    seen: set[str] = set()
    for info, manifest in described:
        if manifest.metrics is not None:
            known |= manifest.metrics.adapter.keys()
        figures = {k: v for k in keys if (v := _figure(k, info, manifest)) is not None}
        seen |= figures.keys()
        if all(test(info, manifest) for test in tests):
            found.append((info, figures))
    if keys and sort != "name":
        found.sort(key=lambda item: -item[1].get(keys[0], float("-inf")))
    return Found(
        versions=tuple(info for info, _ in found),
        figures={f"{info.name}@{info.version}": figures for info, figures in found},
        unknown=tuple(dict.fromkeys(key for key in keys if key not in seen)) if described else (),
        known=tuple(sorted(known)),
    )


def _tests(
    terms: Sequence[str],
) -> tuple[list[Callable[[VersionInfo, Manifest], bool]], list[str]]:
    tests: list[Callable[[VersionInfo, Manifest], bool]] = []
    keys: list[str] = []
    for term in terms:
        comparison, field = _COMPARISON.fullmatch(term.strip()), _FIELD.fullmatch(term)
        if comparison is not None:
            tests.append(_compares(comparison["key"], comparison["op"], float(comparison["value"])))
            keys.append(comparison["key"])
        elif field is not None:
            if field["key"] not in TEXTS:
                raise InvalidRequest(
                    f"search knows no field '{field['key']}'; there are {', '.join(TEXTS)}, and figures "
                    "are compared with >=, >, <=, < or =="
                )
            tests.append(_fits(field["key"], field["value"]))
        else:
            tests.append(_mentions(term))
    return tests, keys


def _compares(key: str, op: str, bound: float) -> Callable[[VersionInfo, Manifest], bool]:
    def test(info: VersionInfo, manifest: Manifest) -> bool:
        value = _figure(key, info, manifest)
        return value is not None and OPERATORS[op](value, bound)

    return test


def _fits(key: str, pattern: str) -> Callable[[VersionInfo, Manifest], bool]:
    wanted = pattern.casefold()

    def test(info: VersionInfo, manifest: Manifest) -> bool:
        return any(fnmatch.fnmatchcase(v.casefold(), wanted) for v in TEXTS[key](info, manifest))

    return test


def _mentions(word: str) -> Callable[[VersionInfo, Manifest], bool]:
    wanted = word.casefold()

    def test(info: VersionInfo, manifest: Manifest) -> bool:
        texts = [
            info.name,
            manifest.description,
            info.base_name,
            *TEXTS["data"](info, manifest),
            *manifest.task.labels,
        ]
        return any(wanted in text.casefold() for text in texts)

    return test


def _figure(key: str, info: VersionInfo, manifest: Manifest) -> float | None:
    if key in FIGURES:
        return FIGURES[key](info, manifest)
    return manifest.metrics.adapter.get(key) if manifest.metrics is not None else None
