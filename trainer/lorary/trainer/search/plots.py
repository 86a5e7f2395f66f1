"""Pictures of a search as SVG text: nothing to install, nothing to fetch, a tooltip on every mark.

All functions return one ``<svg>`` element; colours come from the page's CSS variables, with a fallback.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from lorary.trainer.search.space import Dimension

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorary.trainer.search.study import TrialResult

WIDTH, HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 40


def history(trials: Sequence[TrialResult]) -> str:
    """Draw every trial's loss over its number, and the best so far as a staircase."""
    shown = [trial for trial in trials if trial.loss is not None]
    x = _linear(0, max((trial.number for trial in trials), default=1) or 1, _LEFT, WIDTH - _RIGHT)
    y, ticks = _loss_axis([trial.loss for trial in shown if trial.loss is not None])
    marks = [*_axes(ticks, y, "trial", "validation loss")]
    best, path = math.inf, ""
    for trial in shown:
        if trial.state == "complete" and trial.loss is not None and trial.loss < best:
            at = f"{x(trial.number):.1f}"
            path += f"L{at},{y(best):.1f}L" if path else "M"
            path += f"{at},{y(trial.loss):.1f}"
            best = trial.loss
    if path:
        path += f"L{WIDTH - _RIGHT},{y(best):.1f}"
        marks.append(f'<path d="{path}" class="line best"/>')
    for trial in shown:
        kind = "dot" if trial.state == "complete" else "dot pruned"
        at = f'cx="{x(trial.number):.1f}" cy="{y(trial.loss or 0.0):.1f}"'
        marks.append(f'<circle {at} r="4" class="{kind}">{_title(trial)}</circle>')
    return _svg("Loss of every trial and the best so far", marks)


def curves(trials: Sequence[TrialResult], best: TrialResult) -> str:
    """Draw every trial's validation losses: what the pruner saw."""
    seen = [loss for trial in trials for loss in trial.losses]
    most = max((len(trial.losses) for trial in trials), default=1)
    x = _linear(1, max(2, most), _LEFT, WIDTH - _RIGHT)
    y, ticks = _loss_axis(seen)
    marks = [*_axes(ticks, y, "validation", "validation loss")]
    for trial in sorted(trials, key=lambda one: one.number == best.number):
        points = list(enumerate(trial.losses, 1))
        if not points:
            continue
        kind = {"pruned": "pruned", "failed": "pruned"}.get(trial.state, "other")
        kind = "best" if trial.number == best.number else kind
        path = "M" + "L".join(f"{x(i):.1f},{y(loss):.1f}" for i, loss in points)
        marks.append(f'<path d="{path}" class="line {kind}">{_title(trial)}</path>')
        last = points[-1]
        at = f'cx="{x(last[0]):.1f}" cy="{y(last[1]):.1f}"'
        marks.append(f'<circle {at} r="2.5" class="dot {kind}">{_title(trial)}</circle>')
    return _svg("Validation losses of every trial", marks)


def importance(shares: Mapping[str, float]) -> str:
    """Draw each key's share as a bar, the largest first."""
    marks, row, left = [], 26, 210
    for i, (key, share) in enumerate(shares.items()):
        top = 10 + i * row
        width = share * (WIDTH - left - 70)
        marks += [
            f'<text x="{left - 8}" y="{top + 14}" class="label end">{escape(key)}</text>',
            f'<rect x="{left}" y="{top}" width="{max(1.0, width):.1f}" height="18" class="bar"/>',
            f'<text x="{left + width + 6:.1f}" y="{top + 14}" class="label">{share:.0%}</text>',
        ]
    return _svg("Importance of each key", marks, height=20 + row * len(shares))


def parallel(
    trials: Sequence[TrialResult], dimensions: Sequence[Dimension], best: TrialResult
) -> str:
    """Draw every trial as a line through its values, one axis for each key and one for the loss."""
    shown = [trial for trial in trials if trial.loss is not None]
    losses = [trial.loss for trial in shown if trial.loss is not None]
    low, high = min(losses), max(losses)
    axes = [(one.key, _place(one), _ends(one)) for one in dimensions]
    loss_place = _linear(low, high if high > low else low + 1, HEIGHT - 50, 36)
    axes.append(("validation loss", loss_place, (f"{low:.3g}", f"{high:.3g}")))
    x = _linear(0, max(1, len(axes) - 1), 90, WIDTH - 90)
    marks = []
    for trial in sorted(shown, key=lambda one: -(one.loss or 0.0)):
        values = [*(trial.point[one.key] for one in dimensions), trial.loss]
        at = [
            (x(i), place(value))
            for i, ((_, place, _), value) in enumerate(zip(axes, values, strict=True))
        ]
        path = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in at)
        share = ((trial.loss or 0.0) - low) / (high - low) if high > low else 0.0
        width = 3 if trial.number == best.number else 1.4
        # From the best's blue to a pale grey.
        colour = f"hsl(215 {90 - 75 * share:.0f}% {42 + 36 * share:.0f}%)"
        style = f'style="stroke:{colour};stroke-width:{width};fill:none"'
        marks.append(f'<path d="{path}" {style}>{_title(trial)}</path>')
    for i, (key, _, ends) in enumerate(axes):
        marks += [
            f'<line x1="{x(i):.1f}" x2="{x(i):.1f}" y1="36" y2="{HEIGHT - 50}" class="axis"/>',
            f'<text x="{x(i):.1f}" y="{HEIGHT - 14}" class="label middle">{escape(key)}</text>',
            f'<text x="{x(i):.1f}" y="{HEIGHT - 34}" class="tick middle">{escape(ends[0])}</text>',
            f'<text x="{x(i):.1f}" y="26" class="tick middle">{escape(ends[1])}</text>',
        ]
    return _svg("Parallel coordinates of every trial", marks)


def _place(one: Dimension) -> Callable[[Any], float]:
    """Return where a value lies on its vertical axis."""
    bottom, top = HEIGHT - 50, 36
    if one.choices:
        order = [repr(choice) for choice in one.choices]
        at = _linear(0, max(1, len(order) - 1), bottom, top)
        return lambda value: at(order.index(repr(value)))
    if one.log:
        at = _linear(math.log(one.low), math.log(one.high), bottom, top)
        return lambda value: at(math.log(value))
    return _linear(one.low, one.high, bottom, top)


def _ends(one: Dimension) -> tuple[str, str]:
    if one.choices:
        return _short(one.choices[0]), _short(one.choices[-1])
    return f"{one.low:g}", f"{one.high:g}"


def _short(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 18 else text[:17] + "…"


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the linear map of [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _loss_axis(losses: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """Return where a loss lies, and round tick values; far outliers lie at the upper edge."""
    ordered = sorted(losses) or [0.0, 1.0]
    low = ordered[0]
    # A diverging trial must not flatten all the others.
    high = min(ordered[-1], low + 3 * max(1e-9, ordered[len(ordered) // 2] - low) + 1e-9)
    high = high if high > low else low + max(1e-6, abs(low) * 0.1)
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    inner = _linear(low, high, HEIGHT - _BOTTOM - 8, _TOP + 8)
    return (lambda loss: inner(min(loss, high))), ticks


def _axes(
    ticks: Sequence[float], y: Callable[[float], float], x_label: str, y_label: str
) -> list[str]:
    marks = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        marks += [
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}" class="grid"/>',
            f'<text x="{_LEFT - 8}" y="{at}" dy="4" class="tick end">{tick:.4g}</text>',
        ]
    middle = (HEIGHT - _BOTTOM) / 2
    turned = f'transform="translate(14 {middle}) rotate(-90)"'
    return [
        *marks,
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" class="label middle">{x_label}</text>',
        f'<text {turned} class="label middle">{y_label}</text>',
    ]


def _title(trial: TrialResult) -> str:
    """Return what is shown when the pointer rests on a mark."""
    point = ", ".join(f"{key} = {_short(value)}" for key, value in trial.point.items())
    loss = f"{trial.loss:.5g}" if trial.loss is not None else "none"
    return f"<title>trial {trial.number} ({trial.state}): loss {loss}; {escape(point)}</title>"


def _svg(label: str, marks: Sequence[str], *, height: float = HEIGHT) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}"'
    return f"<svg {box}>{''.join(marks)}</svg>"
