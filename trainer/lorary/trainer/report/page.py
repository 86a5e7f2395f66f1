"""The page of a report: what is on it, in which order, with every picture inside."""

from __future__ import annotations

import base64
import importlib.resources
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from lorary.registry.manifest import is_lower_better
from lorary.trainer.data import StreamedExamples
from lorary.trainer.figures_table import verdict
from lorary.trainer.report.examples import compare_examples
from lorary.trainer.report.ranks import ranks_by_kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.registry.manifest import Interval, Manifest, Metrics
    from lorary.trainer.answered import Answered
    from lorary.trainer.data import Splits
    from lorary.trainer.forgetting import ForgettingTable
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.report.inside import Inside
    from lorary.trainer.report.weights import ModuleChange

TEMPLATE = "page.html"
FORGETTING_TEMPLATE = "forgetting.html"
# Between them is the forgetting table, if there is one.
_MARKS = ("<!-- each adapter on each task -->", "<!-- end of each adapter on each task -->")
# What the files of each section's pictures begin with; they are drawn in the order in which they are shown.
_SECTIONS = {
    "curves": ("loss_curve", "schedule"),
    "labels": ("confusion", "reliability"),
    "attention": ("attention-",),
    "weights": ("weight_change", "effective_rank", "singular_values"),
}
_MAX_TEXT = 600
_UNKNOWN = ("words", "answer", "labels")


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: its file in the report's folder, what it shows, and its PNG."""

    file: str
    caption: str
    png: bytes

    @property
    def data_uri(self) -> str:
        """The picture as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def render(
    *,
    recipe: Recipe,
    manifest: Manifest,
    answered: Mapping[str, Answered],
    figures: Sequence[Figure],
    inside: Inside,
    uncut: Metrics | None,
    forgetting: ForgettingTable | None,
) -> str:
    """Return the page: one file of HTML that loads nothing and runs nothing.

    ``uncut`` is the adapter beside what was trained, as its base, where less than that is published.
    Texts of data and models are escaped; what they could still do, the page's own policy forbids.
    """
    metrics = manifest.metrics
    assert metrics is not None
    sections = {
        name: [figure for figure in figures if figure.file.startswith(starts)]
        for name, starts in _SECTIONS.items()
    }
    shown = recipe.evaluation.num_report_examples
    return _template(TEMPLATE).render(
        recipe=recipe,
        manifest=manifest,
        metrics=metrics,
        kinds=", ".join(dict.fromkeys(one.recipe.task.kind for one in answered.values())),
        headlines=[
            f"{name}: {_headline(one.metrics)}" if name else _headline(one.metrics)
            for name, one in answered.items()
        ],
        rows=_metric_rows(metrics),
        uncut={} if uncut is None else {row["name"]: row for row in _metric_rows(uncut)},
        forgetting=_between_marks(forgetting),
        sections=sections,
        examples=[_shown_examples(name, one, shown) for name, one in answered.items()],
        has_examples=shown > 0,
        shorten=_shorten,
        weight_facts=_weight_facts(inside.weights),
        ranks=_rank_rows(manifest, inside),
        has_overlaps=any(inside.overlaps),
        has_cut=any(one.published_rank is not None for one in inside.weights),
        data_facts=_plain_facts(manifest.data),
        parts=[part for name, one in answered.items() for part in _parts(one.splits, name)],
        lock={
            "base": f"{manifest.base.name}, {manifest.base.architecture}",
            "base fingerprint": manifest.base.fingerprint,
            "base quantization": manifest.base.quantization,
            "method": f"{manifest.method.name}, rank {manifest.method.rank}, "
            f"alpha {manifest.method.alpha:g}",
            "data fingerprint": str(manifest.data.get("fingerprint", "")),
            **_plain_facts(
                {key: value for key, value in manifest.training.items() if key != "recipe"}
            ),
            "written": manifest.created_at,
        },
        recipe_yaml=yaml.safe_dump(
            manifest.training["recipe"], sort_keys=False, allow_unicode=True
        ),
    )


def with_forgetting(page: str, table: ForgettingTable) -> str:
    """Return a page with this table where ``render`` left room for one."""
    before, _, rest = page.partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    return f"{before}{_between_marks(table)}{after}"


def _between_marks(table: ForgettingTable | None) -> str:
    shown = _template(FORGETTING_TEMPLATE).render(table=table) if table else ""
    return f"{_MARKS[0]}\n{shown}\n{_MARKS[1]}"


def _template(name: str) -> jinja2.Template:
    source = (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _shown_examples(task: str, answered: Answered, num_shown: int) -> dict[str, Any]:
    """Return the first pairs of each group of one task, and how many there are."""
    outcomes = compare_examples(
        answered.splits.test, answered.before, answered.after, answered.metrics.primary
    )
    return {
        "task": task,
        "metric": outcomes.metric,
        "groups": {name: pairs[:num_shown] for name, pairs in outcomes.groups.items()},
        "counts": {name: len(pairs) for name, pairs in outcomes.groups.items()},
    }


def _headline(metrics: Metrics) -> str:
    """Say in a sentence what the run came to."""
    name = metrics.primary
    after = metrics.adapter[name]
    if name not in metrics.base:
        return f"{name} {after:.4g} on {metrics.num_examples} held-out examples"
    said = {
        "better": "better than its base",
        "worse": "worse than its base",
        "unsure": "no sure difference from its base",
        "": "",
    }[verdict(metrics, name)]
    found = metrics.uncertainty.get(name)
    sure = ""
    if found is not None and found.difference is not None:
        sure = (
            f", difference {found.difference.low:+.4g} to {found.difference.high:+.4g} "
            f"({metrics.confidence:.0%})"
        )
    text = (
        f"{name} {metrics.base[name]:.4g} → {after:.4g} on {metrics.num_examples} held-out examples"
    )
    return f"{text}{sure}{': ' if said else ''}{said}"


def _metric_rows(metrics: Metrics) -> list[dict[str, str]]:
    """Return the cells of the table of figures, one row per metric, the primary one first."""
    names = sorted(metrics.adapter, key=lambda name: name != metrics.primary)
    rows = []
    for name in names:
        sure = metrics.uncertainty.get(name)
        has_base = name in metrics.base
        change = f"{metrics.adapter[name] - metrics.base[name]:+.4g}" if has_base else "-"
        rows.append(
            {
                "name": f"{name} ↓" if is_lower_better(name) else name,
                "base": f"{metrics.base[name]:.4g}" if has_base else "-",
                "base_interval": _interval(sure.base if sure else None),
                "adapter": f"{metrics.adapter[name]:.4g}",
                "adapter_interval": _interval(sure.adapter if sure else None),
                "difference": change,
                "difference_interval": _interval(sure.difference if sure else None, "+"),
                "verdict": verdict(metrics, name),
            }
        )
    return rows


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    return f"{interval.low:{sign}.4g} to {interval.high:{sign}.4g}"


def _weight_facts(weights: Sequence[ModuleChange]) -> dict[str, str]:
    if not weights:
        return {}
    largest = max(weights, key=lambda one: one.ratio)
    facts = {
        "modules changed": str(len(weights)),
        "‖ΔW‖ / ‖W‖, median": f"{statistics.median(one.ratio for one in weights):.3g}",
        "largest": f"{largest.ratio:.3g} at {largest.name}",
    }
    ranks = [one.effective_rank for one in weights if one.singular_values]
    if ranks:
        facts["effective rank, median"] = f"{statistics.median(ranks):.3g}"
        most = max(len(one.singular_values) for one in weights)
        facts["directions of a module, at most"] = str(most)
    return facts


def _rank_rows(manifest: Manifest, inside: Inside) -> list[dict[str, str]]:
    """Return the cells of the table of ranks: each kind of module, of this run and of those beside it."""
    name = f"{manifest.method.name}, rank {manifest.method.rank}"
    runs: list[tuple[str, Sequence[ModuleChange], Mapping[str, float]]] = [
        (name, inside.weights, {}),
        *(
            (f"beside: {other.name}", other.weights, overlaps)
            for other, overlaps in zip(inside.beside, inside.overlaps, strict=True)
        ),
    ]
    return [
        {
            "kind": kind,
            "run": run,
            "modules": str(found.num_modules),
            "ratio": f"{found.ratio:.2g}",
            "rank_90": f"{found.rank_90:g}",
            "stable_rank": f"{found.stable_rank:.1f}",
            "effective_rank": f"{found.effective_rank:.1f}",
            "directions": f"{found.num_directions:g}",
            "kept": f"{found.kept_share:.1%}",
            "overlap": "" if found.overlap is None else f"{found.overlap:.3f}",
        }
        for kind, run, found in ranks_by_kind(runs)
    ]


def _parts(splits: Splits, task: str) -> list[dict[str, str]]:
    """Return counts, lengths and labels of each part of the data.

    Of what does not fit in memory only the count: anything else would read it all once more.
    """
    rows = []
    for name in ("train", "validation", "test"):
        examples = getattr(splits, name)
        if not len(examples):
            continue
        known = {"name": f"{task}: {name}" if task else name, "count": f"{len(examples):,}"}
        if isinstance(examples, StreamedExamples):
            rows.append(known | dict.fromkeys(_UNKNOWN, ""))
            continue
        words = sorted(len(example.text.split()) for example in examples)
        answers = sorted(len(example.target.split()) for example in examples)
        counts: dict[str, int] = {}
        for example in examples:
            counts[example.target] = counts.get(example.target, 0) + 1
        top = sorted(counts.items(), key=lambda pair: -pair[1])
        # Of free text nearly every answer is its own; of a classification a few stand for all.
        labels = ", ".join(f"{label} {count}" for label, count in top[:8]) if len(top) <= 20 else ""
        rows.append(
            {
                **known,
                "words": _spread(words),
                "answer": _spread(answers),
                "labels": labels,
            }
        )
    return rows


def _spread(ordered: Sequence[int]) -> str:
    """Return least, middle, 95th percentile and most."""
    at = [0.0, 0.5, 0.95, 1.0]
    return " / ".join(str(ordered[min(int(q * len(ordered)), len(ordered) - 1)]) for q in at)


def _plain_facts(raw: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return one line per fact; groups are flattened, long lists counted."""
    found: dict[str, str] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            found |= _plain_facts(value, f"{name} · ")
        elif isinstance(value, list) and len(value) > 8:
            found[name] = f"{len(value)} entries, in manifest.json"
        elif value not in (None, "", []):
            found[name] = str(value)
    return found


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
