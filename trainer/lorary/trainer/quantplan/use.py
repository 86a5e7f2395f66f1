"""Train over a base that is quantized by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.bases.plan import read_plan
from lorary.errors import ConfigError, InvalidRecipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.bases import Base
    from lorary.bases.load import Quantization
    from lorary.trainer.recipe import MethodRecipe


def formats_of(method: MethodRecipe, base: Base) -> Quantization | dict[str, Quantization]:
    """Return how the base is loaded to be trained on: one format, or one for each linear layer.

    Raises:
        InvalidRecipe: the plan cannot be read, does not fit the base, or is for another quantization.
    """
    if not method.quantization_plan:
        return method.base_quantization
    try:
        plan = read_plan(Path(method.quantization_plan))
        formats = plan.resolve(base)
    except ConfigError as error:
        raise InvalidRecipe(f"method.quantization_plan: {error}") from error
    quantized = sorted(set(formats.values()) - {"none"})
    if quantized != [method.base_quantization]:
        raise InvalidRecipe(
            f"method.quantization_plan '{method.quantization_plan}' quantizes to "
            f"{' and '.join(quantized) or 'nothing'}, and method.quantization is "
            f"{method.base_quantization}; make them the same."
        )
    return formats


def plan_facts(formats: Quantization | Mapping[str, Quantization]) -> dict[str, Any]:
    """Return what a manifest says about a plan, which lies in a file beside the recipe; empty without one."""
    if isinstance(formats, str):
        return {}
    (quantized,) = set(formats.values()) - {"none"}
    whole = [name for name, kept in formats.items() if kept == "none"]
    return {"quantization_plan": {"format": quantized, "whole": whole}}
