"""The report of a search: one HTML file with everything in it, readable without a network or scripts."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from lorary.trainer.search import plots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.trainer.recipe import Recipe
    from lorary.trainer.search.study import TrialResult

_STYLE = """
:root{color-scheme:light dark;--ink:#1b2733;--soft:#66758a;--line:#d6dde6;--page:#fff;--mark:#1667c7;
--best:#0a8f5b;--pruned:#b8a07a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#93a1b3;--line:#36424f;--page:#12181f;
--mark:#5aa2f2;--best:#39c78d;--pruned:#8f7d5d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:920px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}p.note{color:var(--soft)}
svg{width:100%;height:auto;font-family:inherit}
svg .axis{stroke:var(--soft);stroke-width:1}svg .grid{stroke:var(--line);stroke-width:1}
svg .label{fill:var(--ink);font-size:13px}svg .tick{fill:var(--soft);font-size:12px}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}
svg .dot{fill:var(--mark)}svg .dot.pruned{fill:none;stroke:var(--pruned);stroke-width:1.5}
svg .dot.best{fill:var(--best)}svg .bar{fill:var(--mark)}
svg .line{fill:none;stroke:var(--mark);stroke-width:1.2;opacity:.55}
svg .line.pruned{stroke:var(--pruned);stroke-dasharray:4 3}
svg .line.best{stroke:var(--best);stroke-width:2.4;opacity:1}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line)}
td.number{text-align:right;font-variant-numeric:tabular-nums}tr.best td{font-weight:600}
"""


def write_search_report(
    path: Path,
    recipe: Recipe,
    trials: Sequence[TrialResult],
    best: TrialResult,
    importances: Mapping[str, float],
) -> None:
    """Write ``report.html``."""
    states = [trial.state for trial in trials]
    title = f"Search of {recipe.name}"
    facts = (
        f"{len(trials)} trials ({states.count('complete')} to the end, {states.count('pruned')} pruned, "
        f"{states.count('failed')} failed), {recipe.search.sampler} sampler, {recipe.search.pruner} "
        f"pruner. Judged by the loss on the validation examples; the test examples had no part in it."
    )
    few = "Too few trials were trained to their end to say."
    sections = [
        ("History", plots.history(trials), "Filled: to the end. Open: pruned. Line: best so far."),
        (
            "Importance",
            plots.importance(importances) if importances else f"<p>{few}</p>",
            "Share of each key in what sets the better trials apart (PED-ANOVA).",
        ),
        (
            "Parallel coordinates",
            plots.parallel(trials, recipe.search.dimensions, best),
            "One line per trial; the bluer, the lower its loss. The thick one is the best.",
        ),
        (
            "Learning curves",
            plots.curves(trials, best),
            "What the pruner saw: dashed trials were stopped. Green is the best.",
        ),
        ("Trials", _table(trials, best), ""),
    ]
    body = "".join(
        f"<h2>{name}</h2>{content}" + (f'<p class="note">{note}</p>' if note else "")
        for name, content, note in sections
    )
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>"
    )
    text = f"{head}<body><h1>{escape(title)}</h1><p>{escape(facts)}</p>{body}</body></html>\n"
    path.write_text(text, encoding="utf-8")


def _table(trials: Sequence[TrialResult], best: TrialResult) -> str:
    """Return all trials, the best first."""
    keys = list(best.point)
    heads = ["trial", "loss", "state", *keys, "validations", "seconds"]
    rows = []
    for trial in sorted(trials, key=lambda one: (one.state != "complete", _rank(one), one.number)):
        loss = f"{trial.loss:.5f}" if trial.loss is not None else "-"
        values = [_cell(trial.point.get(key, "")) for key in keys]
        cells = [
            f'<td class="number">{trial.number}</td><td class="number">{loss}</td>',
            f'<td title="{escape(trial.note)}">{trial.state}</td>',
            *(f"<td>{escape(value)}</td>" for value in values),
            f'<td class="number">{len(trial.losses)}</td>',
            f'<td class="number">{trial.seconds:.1f}</td>',
        ]
        mark = ' class="best"' if trial.number == best.number else ""
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    header = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _rank(trial: TrialResult) -> float:
    return math.inf if trial.loss is None else trial.loss


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)
