"""Measure a base, make a plan within a budget, and prove on other text what the plan is worth.

plan.yaml   what ``--quantize-plan`` and ``method.quantization_plan`` read
plan.json   sensitivity of every layer, measured points, what was measured on
plan.png    perplexity and divergence over bits per weight
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lorary.bases.load import linear_names, load_model
from lorary.errors import InvalidRequest, StorageError
from lorary.trainer.quantplan.allocate import WHOLE_BITS, allocate, mean_bits, plan_of
from lorary.trainer.quantplan.sensitivity import compare_models, measure_sensitivity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorary.bases import Base
    from lorary.bases.load import Quantization
    from lorary.bases.plan import QuantizationPlan
    from lorary.trainer.progress import Reporter
    from lorary.trainer.quantplan.text import Blocks

_STEPS = (0.15, 0.45)
"""Further points of the curve, as shares of the way from the budget to whole weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan as it was measured, loaded as a server would.

    Attributes:
        name: ``nf4``, ``budget``, ``whole`` …
        bits: mean of the linear layers' weights.
        num_bytes: of the linear layers' weights.
        num_whole: layers kept whole.
        perplexity: on the held-out text.
        divergence: mean nats per token from the whole base there.
    """

    name: str
    bits: float
    num_bytes: int
    num_whole: int
    perplexity: float
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and what speaks for it; ``points`` by ascending bits."""

    plan: QuantizationPlan
    quantization: Quantization
    budget: float
    sensitivity: dict[str, float]
    points: tuple[Point, ...]

    @property
    def chosen(self) -> Point:
        """The plan's own point."""
        return next(point for point in self.points if point.name == "budget")


def make_plan(
    base: Base,
    blocks: Blocks,
    *,
    budget: float,
    quantization: Quantization,
    device: str,
    seed: int = 0,
    reporter: Reporter,
) -> Planned:
    """Measure every layer, choose, and measure plans around the chosen one.

    Args:
        base: what ``find_base`` returned.
        blocks: text; sensitivities come from one part and figures from the other.
        budget: mean bits of a linear weight.
        quantization: of the layers that are not kept whole.
        device: a torch device.
        seed: of the tokens drawn from the model.
        reporter: where progress goes.

    Raises:
        InvalidRequest: the budget is too small, or there is nothing to quantize.
        MissingDependency, ConfigError, CorruptArtifact: as ``load_model``.
    """
    import torch

    if quantization == "none":
        raise InvalidRequest("nothing would be quantized; use nf4 or int8", field="format")
    dtype = torch.float32
    names = linear_names(base)
    whole = load_model(base, dtype=dtype, device=device)
    shapes = {name: _shape(whole.get_submodule(name)) for name in names}
    allocate(dict.fromkeys(names, 0.0), shapes, quantization, budget)  # refuses what cannot be
    with reporter.phase("measuring layers", len(blocks.calibration)) as advance:
        sensitivity = measure_sensitivity(
            whole, names, quantization, blocks.calibration, seed=seed, advance=advance
        )
    least = mean_bits(dict.fromkeys(names, quantization), shapes)
    budgets: dict[str, float] = {quantization: least, "budget": budget}
    budgets |= {
        f"{bits:.1f} bits": bits
        for bits in (budget + share * (WHOLE_BITS - budget) for share in _STEPS)
        if bits < WHOLE_BITS
    }
    points, plan = [], plan_of({}, quantization)
    with reporter.phase("measuring plans", len(budgets) + 1) as advance:
        for name, bits in budgets.items():
            formats = allocate(sensitivity, shapes, quantization, bits)
            points.append(measure_point(name, base, whole, formats, shapes, blocks, device))
            if name == "budget":
                plan = plan_of(formats, quantization)
            advance(1, f"{name}: perplexity {points[-1].perplexity:.3f}")
        formats = dict.fromkeys(names, "none")
        points.append(measure_point("whole", base, whole, formats, shapes, blocks, device))
        advance(1, "")
    return Planned(
        plan=plan,
        quantization=quantization,
        budget=budget,
        sensitivity=sensitivity,
        points=tuple(sorted(points, key=lambda point: (point.bits, point.name))),
    )


def measure_point(
    name: str,
    base: Base,
    whole: Any,
    formats: Mapping[str, Quantization],
    shapes: Mapping[str, tuple[int, int]],
    blocks: Blocks,
    device: str,
) -> Point:
    """Load the base with these formats and measure it beside the whole one, on the held-out text."""
    is_whole = set(formats.values()) == {"none"}
    model = whole
    if not is_whole:
        model = load_model(base, quantization=dict(formats), dtype=whole.dtype, device=device)
    perplexity, divergence = compare_models(whole, model, blocks.held_out)
    bits = mean_bits(formats, shapes)
    return Point(
        name=name,
        bits=round(bits, 4),
        num_bytes=round(bits / 8 * sum(rows * columns for rows, columns in shapes.values())),
        num_whole=sum(kept == "none" for kept in formats.values()),
        perplexity=perplexity,
        divergence=divergence,
    )


def write_plan(path: Path, planned: Planned, base: Base, about: Mapping[str, Any]) -> None:
    """Write the plan, and beside it the figures and their picture.

    Raises:
        StorageError: the folder cannot be written.
    """
    chosen = planned.chosen
    tree: dict[str, Any] = {"default": planned.plan.default}
    if planned.plan.rules:
        tree["rules"] = [asdict(rule) for rule in planned.plan.rules]
    head = (
        f"# Base {base.name}, {base.card.fingerprint}\n"
        f"# {chosen.bits:.3f} bits per linear weight ({chosen.num_bytes / 2**20:.1f} MiB), perplexity "
        f"{chosen.perplexity:.3f}; made by lorary quantize-plan --budget {planned.budget:g}bits\n"
    )
    facts = {
        "base": {"name": base.name, "fingerprint": base.card.fingerprint},
        "budget_bits": planned.budget,
        "format": planned.quantization,
        "measured_on": dict(about),
        "points": [asdict(point) for point in planned.points],
        "sensitivity_nats_per_token": planned.sensitivity,
        "kept_whole": [rule.modules for rule in planned.plan.rules],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        text = json.dumps(facts, indent=2) + "\n"
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        draw_curve(path.with_suffix(".png"), planned, base.name)
    except OSError as error:
        raise StorageError(f"'{path}' cannot be written: {error.strerror}.") from error


def draw_curve(path: Path, planned: Planned, title: str) -> None:
    """Draw perplexity and divergence over size, and mark the plan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    bits = [point.bits for point in planned.points]
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("perplexity", "divergence"),
        ("perplexity on held-out text", "nats per token from the whole base"),
        strict=True,
    ):
        values = [getattr(point, key) for point in planned.points]
        axes.plot(bits, values, "o-", linewidth=1.2)
        axes.plot(
            planned.chosen.bits, getattr(planned.chosen, key), "o", markersize=10, fillstyle="none"
        )
        axes.set(xlabel="bits per linear weight", ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}: {planned.quantization}, the most sensitive layers whole")
    figure.savefig(path, dpi=120)


def _shape(layer: Any) -> tuple[int, int]:
    """Return (out, in); GPT-2's layers hold their weights the other way around."""
    first, second = layer.weight.shape
    return (second, first) if type(layer).__name__ == "Conv1D" else (first, second)
