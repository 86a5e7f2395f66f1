"""MiSS (arXiv 2409.15371): inputs are added up in ``r`` groups, and each group has a row of outputs.

Semantics: ``ΔW[o, i] = M[i mod r, o]``: a LoRA with ``B = Mᵀ`` and an A of zeros and ones. The ``mini``
variant stores the beginning of M's rows, which repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.methods.method import Method, Module, Shape, Wide


class Miss(Method):
    """See ``Method``."""

    peft_type: str = "MISS"
    own_keys: frozenset[str] = frozenset({"init_weights", "mini_r", "miss_dropout"})
    shared: tuple[str, ...] = ()

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse the variant that multiplies the base's weight."""
        kind = config.get("init_weights", True)
        if kind == "bat":
            raise IncompatibleAdapter(
                "adapter_config.json has init_weights 'bat': this MiSS multiplies the base's own weight, "
                "so its change has full rank and is no LoRA. Train with init_weights true, or merge it"
            )
        if kind not in (True, False, "mini"):
            raise IncompatibleAdapter(
                f"adapter_config.json has init_weights {str(kind)[:40]!r}; this is no MiSS that is known"
            )
        mini_r = config.get("mini_r", 1)
        if type(mini_r) is not int or mini_r < 1:
            raise CorruptArtifact("adapter_config.json has no positive whole mini_r")
        return {"lora_alpha": config.get("r")}

    def shapes(self, module: Module, config: Mapping[str, Any]) -> dict[str, Shape]:
        """One block."""
        is_mini = config.get("init_weights") == "mini"
        return {
            "miss_block": (module.rank, config.get("mini_r", 1) if is_mini else module.out_features)
        }

    def product(
        self, module: Module, parts: Mapping[str, Wide], config: Mapping[str, Any]
    ) -> tuple[Wide, Wide]:
        """A says to which group an input belongs."""
        block = parts["miss_block"]
        repeats, rest = divmod(module.out_features, block.shape[1])
        if rest:
            raise CorruptArtifact(
                f"module {module.name} has {module.out_features} outputs, which mini_r "
                f"{block.shape[1]} does not divide"
            )
        a = np.zeros((module.rank, module.in_features))
        inputs = np.arange(module.in_features)
        a[inputs % module.rank, inputs] = 1.0
        return np.tile(block, (1, repeats)).T, a
