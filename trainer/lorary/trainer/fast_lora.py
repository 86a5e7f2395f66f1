"""One autograd node for a linear layer with LoRA, instead of PEFT's eight.

PEFT casts activations to the adapter's float32, multiplies there, scales, casts back and adds: on a
bfloat16 CPU that doubles a layer's time (4.1 to 2.9 s a step; docs/log.md). Here A and B stay float32
parameters, but a bfloat16 copy of them (a few kilobytes) multiplies, the scale is folded into B's
copy, and the sum is accumulated in place. What is saved, loaded and published is PEFT's, unchanged.

Where A is frozen (LoRA-FA) x is not kept for the backward pass: only x Aᵀ is, which is as narrow as the
rank.

Semantics: ``y = x Wᵀ + bias + s (x Aᵀ) Bᵀ``, with x [..., in], W [out, in], A [r, in], B [out, r].
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function


class LoraUpdate(Function):
    """``y + s (x Aᵀ) Bᵀ``; y is overwritten.

    Shapes: y [N, out], x [N, in], A [r, in], B [out, r]. y and x share a dtype; A and B may be wider,
    and their gradients have their dtype.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Compute, and keep what the gradients need."""
        a_low, b_low = a.to(x.dtype), (b * scale).to(x.dtype)
        h = x @ a_low.t()
        y.addmm_(h, b_low.t())
        ctx.mark_dirty(y)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, a_low, b_low)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument of ``forward``."""
        (grad,) = grads
        x, h, a_low, b_low = ctx.saved_tensors
        grad_h = grad @ b_low
        grad_x = grad_h @ a_low if ctx.needs_input_grad[1] else None
        # (hᵀ g)ᵀ and not gᵀ h: the former reads both operands in rows.
        grad_a = None if x is None else (grad_h.t() @ x).to(ctx.dtypes[0])
        grad_b = (h.t() @ grad).t().to(ctx.dtypes[1]).mul_(ctx.scale)
        return grad, grad_x, grad_a, grad_b, None


class LoraLinear(Function):
    """``x Wᵀ + s (x Aᵀ) Bᵀ`` with a frozen plain W: one accumulated gradient of x, no copies.

    Shapes: x [N, in], W [out, in], A [r, in], B [out, r]; x and W share a dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Compute, and keep what the gradients need."""
        a_low, b_low = a.to(x.dtype), (b * scale).to(x.dtype)
        y, h = x @ w.t(), x @ a_low.t()
        y.addmm_(h, b_low.t())
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, w, h, a_low, b_low)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument of ``forward``."""
        (grad,) = grads
        x, w, h, a_low, b_low = ctx.saved_tensors
        grad_h = grad @ b_low
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ w
            grad_x.addmm_(grad_h, a_low)
        grad_a = None if x is None else (grad_h.t() @ x).to(ctx.dtypes[0])
        grad_b = (h.t() @ grad).t().to(ctx.dtypes[1]).mul_(ctx.scale)
        return grad_x, None, grad_a, grad_b, None


# Function.apply has no types.
_apply_update: Any = LoraUpdate.apply
_apply_linear: Any = LoraLinear.apply


def speed_up(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the fast forward, in place.

    Layers with DoRA, LoRA biases or anything but one adapter keep PEFT's own forward, and so does
    any layer while dropout is active, the adapter is disabled or merged.

    Returns:
        How many layers were changed.
    """
    changed = 0
    for module in model.modules():
        if _is_plain(module):
            module.forward = types.MethodType(_forward, module)
            changed += 1
    return changed


def _is_plain(layer: Any) -> bool:
    """Whether a module is a linear LoRA layer without DoRA and LoRA biases."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), nn.Linear):
        return False
    return not layer.use_dora.get("default") and not layer.lora_bias.get("default")


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a PEFT LoRA layer; ``self`` is the layer."""
    dropout = self.lora_dropout["default"]
    is_dropping = isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training
    if self.disable_adapters or self.merged or args or kwargs or is_dropping:
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    scale, base, rows = self.scaling["default"], self.base_layer, x.reshape(-1, x.shape[-1])
    if type(base) is nn.Linear and base.bias is None and base.weight.dtype == x.dtype:
        y = _apply_linear(rows, base.weight, a, b, scale)
    else:
        # A quantized layer brings its own autograd; its output may be a view that must not be
        # written, hence the copy.
        y = _apply_update(base(rows).clone(), rows, a, b, scale)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]
