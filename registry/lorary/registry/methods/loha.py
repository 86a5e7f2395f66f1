"""LoHa (arXiv 2108.06098): the element-wise product of two products.

Semantics: ``ΔW = s (W1a W1b) ∘ (W2a W2b)``. The rows of the Khatri–Rao products
``B[o, (i, j)] = s W1a[o, i] W2a[o, j]`` and ``A[(i, j), n] = W1b[i, n] W2b[j, n]`` give it back: a LoRA
of rank r².
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorary.registry.methods.method import Method, Module, Shape, Wide, one_sided


class Loha(Method):
    """See ``Method``."""

    peft_type: str = "LOHA"
    own_keys: frozenset[str] = frozenset(
        {"alpha", "init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"}
    )
    shared: tuple[str, ...] = ()

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Alpha has another name."""
        return {"lora_alpha": config.get("alpha")}

    def shapes(self, module: Module, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Four factors."""
        left, right = (module.out_features, module.rank), (module.rank, module.in_features)
        return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}

    def lora_rank(self, rank: int) -> int:
        """Every pair of the two ranks becomes one."""
        return rank**2

    def product(
        self, module: Module, parts: Mapping[str, Wide], config: Mapping[str, Any]
    ) -> tuple[Wide, Wide]:
        """The change itself where that is smaller than the two Khatri–Rao products."""
        if module.rank**2 > min(module.out_features, module.in_features):
            first = parts["hada_w1_a"] @ parts["hada_w1_b"]
            return one_sided(module.scale * first * (parts["hada_w2_a"] @ parts["hada_w2_b"]))
        b = parts["hada_w1_a"][:, :, None] * parts["hada_w2_a"][:, None, :]
        a = parts["hada_w1_b"][:, None, :] * parts["hada_w2_b"][None, :, :]
        pairs = module.rank**2
        return module.scale * b.reshape(-1, pairs), a.reshape(pairs, -1)
