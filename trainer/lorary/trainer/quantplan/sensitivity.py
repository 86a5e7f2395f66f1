"""What quantizing one layer costs: the divergence of the model's answers, to second order.

Let δ be what rounding does to a layer's weights. For small δ the mean divergence of the next-token
distributions is ``KL(p ‖ p_δ) ≈ ½ δᵀ F δ`` with the Fisher information F (Martens 2020, "New insights and
perspectives on the natural gradient method", §6), and ``δᵀ F δ = E[(g·δ)²]`` over gradients g of the log
likelihood of tokens *drawn from the model itself* (Theis et al. 2018, "Faster gaze prediction with dense
networks and Fisher pruning", use it so for pruning). Unlike a sum over squared entries of g and δ (as in
SqueezeLLM, Kim et al. 2024, §4.1) this keeps how entries act together. One backward pass over the text
gives all layers; measuring each by quantizing it alone takes a forward pass per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorary.bases.load import Quantization


def rounded(weight: Tensor, quantization: Quantization) -> Tensor:
    """Return the weight as its quantized form reads, in float32 [out, in].

    ``nf4`` is bitsandbytes' (blocks of 64, double quantization), ``int8`` is symmetric per row.
    """
    if quantization == "none":
        return weight.float()
    if quantization == "int8":
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        steps: Tensor = (weight.float() / scale).round().clamp(-127, 127)
        return steps * scale
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    read: Tensor = bnb.dequantize_4bit(packed, state)
    return read.float()


def measure_sensitivity(
    model: Any,
    names: Sequence[str],
    quantization: Quantization,
    blocks: Tensor,
    *,
    seed: int = 0,
    advance: Callable[[int, str], None] | None = None,
) -> dict[str, float]:
    """Return for each layer the nats per token that quantizing it alone costs.

    Args:
        model: a causal language model, whole; it is left as it was.
        names: full names of linear layers.
        quantization: what they would be kept in.
        blocks: token ids, int64 [N, T].
        seed: of the tokens drawn from the model.
        advance: told after each block.
    """
    weights = {name: model.get_submodule(name).weight for name in names}
    is_transposed = {name: type(model.get_submodule(name)).__name__ == "Conv1D" for name in names}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    totals = dict.fromkeys(names, 0.0)
    for parameter in before:
        parameter.requires_grad_(False)
    handles = []
    for name, weight in weights.items():
        plain = weight.detach().T if is_transposed[name] else weight.detach()
        # Half the memory; a change of a change of 0.4 % is nothing here.
        delta = (rounded(plain, quantization) - plain.float()).to(torch.bfloat16)
        delta = delta.T if is_transposed[name] else delta

        def collect(parameter: Tensor, name: str = name, delta: Tensor = delta) -> None:
            assert parameter.grad is not None
            totals[name] += float((parameter.grad.float() * delta.float()).sum()) ** 2
            parameter.grad = None  # one layer's gradient at a time

        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(collect))
    generator = torch.Generator().manual_seed(seed)
    try:
        for block in blocks:
            _backward(model, block[None].to(model.device), generator)
            if advance is not None:
                advance(1, "")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
    num_tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return {name: 0.5 * total / num_tokens for name, total in totals.items()}


def _backward(model: Any, ids: Tensor, generator: torch.Generator) -> None:
    """Send back the gradient of the log likelihood of tokens drawn from the model, one after each prefix."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1)
    drawn = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator)
    # Tokens' gradients have mean zero and are independent given the text, so the square of their sum
    # is, in expectation, the sum of their squares.
    logprobs.gather(1, drawn.to(logprobs.device)).sum().backward()


@torch.inference_mode()
def compare_models(
    whole: Any, other: Any, blocks: Tensor, batch_size: int = 8
) -> tuple[float, float]:
    """Measure a model on text beside the whole one.

    Returns:
        Perplexity of ``other`` (exp of the mean loss per token), and the mean divergence of its next-token
        distributions from those of ``whole``, in nats.
    """
    loss = divergence = 0.0
    for start in range(0, len(blocks), batch_size):
        ids = blocks[start : start + batch_size].to(other.device)
        got = other(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss -= float(got.gather(2, ids[:, 1:, None]).sum())
        if other is not whole:
            want = whole(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            divergence += float((want.exp() * (want - got)).sum())
    num_tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return float(torch.tensor(loss / num_tokens).exp()), divergence / num_tokens
