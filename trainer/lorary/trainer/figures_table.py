"""The table of held-out figures that ``lorary train`` and ``lorary eval`` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.registry.cli_support import table
from lorary.registry.manifest import is_lower_better

if TYPE_CHECKING:
    from rich.table import Table

    from lorary.registry.manifest import Interval, Metrics


COLOURS = {"better": "green", "worse": "red", "unsure": "yellow", "": "default"}
"""Of each ``verdict``."""


def figures_table(metrics: Metrics, title: str) -> Table:
    """Return one row per metric: base, adapter, and their difference with its interval."""
    has_base = bool(metrics.base)
    columns = ["metric", *(["base"] if has_base else []), "adapter"]
    if metrics.uncertainty:
        columns.append(f"{'difference' if has_base else 'interval'}, {metrics.confidence:.0%}")
    rows = table(*columns, title=title)
    for name, value in metrics.adapter.items():
        cells = [f"{name} ↓" if is_lower_better(name) else name]
        if has_base:
            cells.append(f"{metrics.base[name]:.3f}" if name in metrics.base else "-")
        cells.append(f"{value:.3f}")
        if metrics.uncertainty:
            cells.append(_interval_cell(metrics, name))
        rows.add_row(*cells)
    return rows


def verdict(metrics: Metrics, name: str) -> str:
    """Return ``better``, ``worse`` or ``unsure``: where the interval of the difference lies.

    Empty where there is no such interval.
    """
    found = metrics.uncertainty.get(name)
    if found is None or found.difference is None:
        return ""
    low, high = found.difference.low, found.difference.high
    if low <= 0 <= high:
        return "unsure"
    return "better" if (low > 0) != is_lower_better(name) else "worse"


def _interval_cell(metrics: Metrics, name: str) -> str:
    found = metrics.uncertainty.get(name)
    if found is None:
        return "-"
    if found.difference is None:
        return _shown(found.adapter)
    colour = COLOURS[verdict(metrics, name)]
    change = metrics.adapter[name] - metrics.base[name]
    return f"[{colour}]{change:+.3f}[/] ({_shown(found.difference, '+.3f')})"


def _shown(interval: Interval, form: str = ".3f") -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"
