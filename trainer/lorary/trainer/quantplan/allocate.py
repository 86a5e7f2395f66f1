"""Which layers to keep whole within a budget of bits per weight.

Every layer kept whole costs bits and saves divergence; the divergences of single layers add up to second
order, as long as layers' errors do not act together. So it is a knapsack, filled by saving per bit: what
that order leaves out is less than one layer's worth.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorary.bases.plan import QuantizationPlan, Rule
from lorary.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.bases.load import Quantization

WHOLE_BITS = 16.0
# Layers that read one input: our own 8-bit kernels make one product of each group, and want them alike.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def parse_budget(text: str) -> float:
    """Read ``5.0bits`` (or ``5.0``): mean bits of a linear layer's weight.

    Raises:
        InvalidRequest: it is no such thing.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:b|bit|bits)?\s*", text)
    if match is None or not 0 < float(match[1]) <= WHOLE_BITS:
        raise InvalidRequest(
            f"--budget '{text}' is no number of bits per weight up to {WHOLE_BITS:g}, such as 5.0bits",
            field="budget",
        )
    return float(match[1])


def bits_per_weight(quantization: Quantization, columns: int) -> float:
    """Return the bits of one weight with its share of scales.

    nf4: 4 bits, an 8-bit scale per 64, a 32-bit scale of scales per 256 of those (Dettmers et al. 2023,
    QLoRA, §3). int8: 8 bits and a 32-bit scale per row of ``columns``.
    """
    if quantization == "none":
        return WHOLE_BITS
    return 8 + 32 / columns if quantization == "int8" else 4 + 8 / 64 + 32 / (64 * 256)


def mean_bits(formats: Mapping[str, Quantization], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Return the bits per weight over all these layers; shapes are (out, in)."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    used = sum(sizes[n] * bits_per_weight(formats[n], shapes[n][1]) for n in shapes)
    return used / sum(sizes.values())


def allocate(
    saved: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    quantization: Quantization,
    budget: float,
) -> dict[str, Quantization]:
    """Return the format of every layer: ``quantization``, or ``none`` where that saves most per bit.

    Args:
        saved: nats per token that keeping a layer whole saves.
        shapes: (out, in) of every layer.
        quantization: of the others.
        budget: mean bits per weight.

    Raises:
        InvalidRequest: the budget is below what quantizing everything takes.
    """
    formats: dict[str, Quantization] = dict.fromkeys(shapes, quantization)
    least = mean_bits(formats, shapes)
    if budget < least:
        raise InvalidRequest(
            f"--budget is {budget:g} bits per weight, and {quantization} alone takes {least:.3f}; raise it",
            field="budget",
        )
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    left = (budget - least) * sum(sizes.values())
    extra = {
        name: sizes[name] * (WHOLE_BITS - bits_per_weight(quantization, shapes[name][1]))
        for name in shapes
    }
    groups = _groups(list(shapes)) if quantization == "int8" else [(name,) for name in shapes]
    cost = {group: sum(extra[name] for name in group) for group in groups}
    gain = {group: sum(saved[name] for name in group) for group in groups}
    for group in sorted(groups, key=lambda one: (-gain[one] / cost[one], one)):
        # A rounding error of the budget must not leave a layer out at 16 bits.
        if cost[group] <= left * (1 + 1e-9):
            left -= cost[group]
            formats |= dict.fromkeys(group, "none")
    return formats


def plan_of(formats: Mapping[str, Quantization], quantization: Quantization) -> QuantizationPlan:
    """Return the plan that resolves to these formats: a rule per layer that is kept whole."""
    whole = [name for name, kept in formats.items() if kept == "none"]
    if len(whole) == len(formats):
        return QuantizationPlan("none")
    return QuantizationPlan(quantization, tuple(Rule(name, "none") for name in whole))


def _groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group the layers that must be kept alike; the others are groups of one."""
    rest = dict.fromkeys(names)
    groups: list[tuple[str, ...]] = []
    for name in names:
        parent, _, last = name.rpartition(".")
        for fused in _FUSED:
            group = tuple(f"{parent}.{one}" if parent else one for one in fused)
            if last == fused[0] and all(one in rest for one in group):
                groups.append(group)
                for one in group:
                    del rest[one]
    return groups + [(name,) for name in rest]
