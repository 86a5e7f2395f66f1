"""AdaLoRA (arXiv 2303.10512): a product of three factors, of which some ranks were taken away.

Semantics: ``ΔW = alpha / (init_r + 1e-5) · B diag(E) A``, as PEFT computes it, in whatever rank is left: the
divisor stays the rank at the start, and ``alpha_pattern`` and rsLoRA mean nothing. What E holds at zero
is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.config_fields import whole
from lorary.registry.methods.method import Method, Module, Shape, Wide
from lorary.registry.strict_json import show

_SUFFIX = ".lora_E"


class AdaLora(Method):
    """See ``Method``."""

    peft_type: str = "ADALORA"
    own_keys: frozenset[str] = frozenset(
        {
            *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r"),
            *("tfinal", "tinit", "total_step"),
        }
    )
    shared: tuple[str, ...] = ()

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The rank is ``init_r``, or as many as a layer's list in ``rank_pattern`` has kept."""
        pattern = config.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            raise CorruptArtifact("adapter_config.json has a rank_pattern that is no object")
        ranks = {}
        for name, flags in pattern.items():
            if not isinstance(flags, list) or any(type(flag) is not bool for flag in flags):
                raise CorruptArtifact(
                    f"adapter_config.json has rank_pattern[{show(name)}], which is no list of true and "
                    "false, as AdaLoRA has them"
                )
            if not any(flags):
                raise IncompatibleAdapter(
                    f"AdaLoRA has taken all ranks of {show(name)} away, and tensors of size 0 are not "
                    "accepted. Save it with rank_pattern null, so that they are kept as zeros"
                )
            ranks[name.removesuffix(_SUFFIX)] = sum(flags)
        return {
            "r": whole(config, "init_r"),
            "rank_pattern": ranks,
            "alpha_pattern": {},
            "use_rslora": False,
        }

    def shapes(self, module: Module, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Three factors; the middle one is a column."""
        return {
            "lora_A": (module.rank, module.in_features),
            "lora_B": (module.out_features, module.rank),
            "lora_E": (module.rank, 1),
        }

    def product(
        self, module: Module, parts: Mapping[str, Wide], config: Mapping[str, Any]
    ) -> tuple[Wide, Wide]:
        """E and the scale go into B."""
        divisor = float(np.float32(config["init_r"]) + np.float32(1e-5))
        values = parts["lora_E"][:, 0] * (config["lora_alpha"] / divisor)
        kept = values != 0
        kept[0] |= not kept.any()
        return parts["lora_B"][:, kept] * values[kept], parts["lora_A"][kept]
