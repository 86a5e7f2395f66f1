"""LoftQ (arXiv 2310.08659, algorithm 1): A and B start as the best answer of their rank to what nf4 lost.

The paper alternates T times between quantizing ``W − s B A`` and decomposing ``W − Q``. Here T is 1, with Q
the base in nf4 as everybody has it: at T > 1 the base would be quantized around this one adapter, and no
other could share it. PEFT's ``init_lora_weights="loftq"`` replaces the base by its own quantization of
it, which is neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.trainer.methods.method import ADAPTER, Attached, check_rank, lora_layers

if TYPE_CHECKING:
    from torch import Tensor


class Loftq(Attached):
    """See above."""

    def start(self) -> None:
        """Set ``s B A`` to the largest singular vectors of ``W − Q``, in every layer.

        Raises:
            InvalidRecipe: the rank is above the width of a layer, which has no more directions.
        """
        import torch

        from lorary.bases.load import load_model

        assert self.setting.base is not None, "LoftQ without its base"
        # On a CPU and in its own dtype the whole base stays mapped: one weight is read at a time.
        whole = load_model(self.setting.base, dtype=_dtype(self.model), device="cpu")
        with torch.no_grad():
            for name, layer in lora_layers(self.model).items():
                quantized = _dequantized(layer.get_base_layer())
                check_rank(name, layer.r[ADAPTER], quantized)
                lost = whole.get_submodule(name).weight.to(quantized) - quantized
                u, s, vh = torch.linalg.svd(lost, full_matrices=False)
                rank = layer.r[ADAPTER]
                root = (s[:rank] / layer.scaling[ADAPTER]).sqrt()
                layer.lora_B[ADAPTER].weight.copy_(u[:, :rank] * root)
                layer.lora_A[ADAPTER].weight.copy_(root[:, None] * vh[:rank])


def _dequantized(base_layer: Any) -> Tensor:
    """Return the float32 weight [out, in] that an nf4 layer computes with."""
    from bitsandbytes.functional import dequantize_4bit

    weight = base_layer.weight
    found: Tensor = dequantize_4bit(weight.data, weight.quant_state).float()
    return found.view(base_layer.out_features, base_layer.in_features)


def _dtype(model: Any) -> Any:
    """Return the dtype that the base had when it was quantized, which its embeddings still have."""
    return model.get_input_embeddings().weight.dtype
