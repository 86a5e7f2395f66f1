"""Methods that PEFT's LoRA layer has switches for."""

from __future__ import annotations

from typing import Any

from lorary.trainer.methods.method import Attached


class RsLora(Attached):
    """Rank-stabilized LoRA (arXiv 2312.03732, theorem 3.2): ``s = alpha / sqrt(r)``."""

    def config(self, targets: str | list[str]) -> Any:
        """Switch it on."""
        return self.lora_config(targets, use_rslora=True)


class Dora(Attached):
    """DoRA (arXiv 2402.09353, equation 5): ``W' = m (W + s B A) / ‖W + s B A‖``, row by row.

    The magnitudes m are trained and kept; no plain LoRA computes the same.
    """

    is_fast = False

    def config(self, targets: str | list[str]) -> Any:
        """Switch it on."""
        return self.lora_config(targets, use_dora=True)
