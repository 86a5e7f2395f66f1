"""What the conversion needs to know about a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lorary.registry.adapter_config import AdapterConfig

Wide = npt.NDArray[np.float64]
Shape = tuple[int, ...]


class Module(NamedTuple):
    """A linear module that a method changes, and with which rank and scale."""

    name: str
    out_features: int
    in_features: int
    rank: int
    scale: float


class Method(Protocol):
    """A method whose change of a linear layer is a product of two thin matrices."""

    peft_type: str
    """What PEFT calls it."""

    own_keys: frozenset[str]
    """Keys of its configuration that LoRA's does not have, and that mean nothing to LoRA."""

    shared: tuple[str, ...]
    """Names of tensors that all modules share."""

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``r``, ``lora_alpha`` and whatever else LoRA calls otherwise.

        Raises:
            IncompatibleAdapter: a variant that is no product of thin matrices.
        """

    def shapes(self, module: Module, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Return the last names of a module's own tensors, and the shape that each must have."""

    def lora_rank(self, rank: int) -> int:
        """Return the rank of the LoRA that a rank of this method becomes; the same by default."""
        return rank

    def shared_problem(self, name: str, shape: Shape, modules: list[Module]) -> str:
        """Return what is wrong with the shape of a shared tensor; by default nothing is shared."""
        return ""

    def product(
        self, module: Module, parts: Mapping[str, Wide], config: Mapping[str, Any]
    ) -> tuple[Wide, Wide]:
        """Return B [out, k] and A [k, in] whose product is the change, scale included."""


def one_sided(change: Wide) -> tuple[Wide, Wide]:
    """Return a whole change [out, in] as a product whose smaller factor is the identity."""
    rows, columns = change.shape
    return (np.eye(rows), change) if rows <= columns else (change, np.eye(columns))


def plain_keys(config: AdapterConfig) -> dict[str, Any]:
    """Return the keys of a LoRA configuration that say which modules are meant, on which base."""
    targets, excluded = config.target_modules, config.exclude_modules
    return {
        "base_model_name_or_path": config.base_model_name_or_path,
        "exclude_modules": excluded if isinstance(excluded, str) else list(excluded),
        "fan_in_fan_out": config.fan_in_fan_out,
        "layers_pattern": list(config.layers_pattern),
        "layers_to_transform": config.layers_to_transform and list(config.layers_to_transform),
        "peft_type": "LORA",
        "revision": config.revision,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
    }
