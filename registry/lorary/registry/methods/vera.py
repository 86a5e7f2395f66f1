"""VeRA (arXiv 2310.11454): frozen random A and B for all layers, a vector on each side for every layer.

Semantics: ``ΔW = diag(b) B[:out] diag(d) A[:, :in]``: a LoRA of the same rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorary.errors import IncompatibleAdapter
from lorary.registry.methods.method import Module, Shape, Wide

_A, _B = "base_model.vera_A", "base_model.vera_B"


class Vera:
    """See ``Method``."""

    peft_type: str = "VERA"
    own_keys: frozenset[str] = frozenset(
        {"d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"}
    )
    shared: tuple[str, ...] = (_A, _B)

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse an adapter that leaves its random matrices to a torch of the right version."""
        if config.get("save_projection", True) is not True:
            raise IncompatibleAdapter(
                "adapter_config.json has save_projection false: VeRA's random matrices are not in the "
                "file, and which ones they were depends on the version of torch. Save it with "
                "save_projection=True"
            )
        return {"lora_alpha": config.get("r")}

    def shapes(self, module: Module, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Two vectors."""
        return {"vera_lambda_b": (module.out_features,), "vera_lambda_d": (module.rank,)}

    def lora_rank(self, rank: int) -> int:
        """The rank stays what it is."""
        return rank

    def shared_problem(self, name: str, shape: Shape, modules: list[Module]) -> str:
        """The matrices are as large as the largest module; smaller ones use their beginning."""
        rank = modules[0].rank
        wide = max(m.in_features if name == _A else m.out_features for m in modules)
        is_right = len(shape) == 2 and (
            shape[0] == rank and shape[1] >= wide
            if name == _A
            else shape[1] == rank and shape[0] >= wide
        )
        wanted = f"[{rank}, {wide} or more]" if name == _A else f"[{wide} or more, {rank}]"
        return "" if is_right else f"{wanted} is needed"

    def product(
        self, module: Module, parts: Mapping[str, Wide], config: Mapping[str, Any]
    ) -> tuple[Wide, Wide]:
        """Both vectors go into B, so that A stays the matrix that was drawn."""
        b = parts[_B][: module.out_features] * parts["vera_lambda_d"]
        return parts["vera_lambda_b"][:, None] * b, parts[_A][:, : module.in_features]
