"""A Llama with random weights, made on the device that it runs on, and a tokenizer for its ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_shapes import Shape


def random_base(shape: Shape, *, dtype: torch.dtype, device: str, nf4: bool = False) -> Any:
    """Return the model in eval mode; with ``nf4`` its linear layers but the head as bitsandbytes keeps them.

    Raises:
        ImportError: ``nf4`` without bitsandbytes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if nf4:
        _quantize(model, dtype)
    return model.eval()


def _quantize(model: Any, dtype: torch.dtype) -> None:
    """Round every linear layer but the head to nf4 with double quantization, one after the other."""
    import bitsandbytes as bnb

    for parent, name, layer in list(_linears(model)):
        rounded = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", module=rounded
        )
        rounded.weight = weight.to(layer.weight.device)
        setattr(parent, name, rounded)
    # What PEFT and the Trainer ask a model that transformers has quantized.
    model.is_loaded_in_4bit = True


def weight_bytes(model: Any) -> int:
    """Return the bytes of all that a decode step reads of the weights: linear layers and the head."""
    head = model.get_output_embeddings().weight
    total = int(head.numel() * head.itemsize)
    for _, _, layer in _linears(model):
        total += layer.weight.numel() * layer.weight.itemsize
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.itemsize
            if state.nested:
                total += state.state2.absmax.numel() * state.state2.absmax.itemsize
    return total


def _linears(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield every linear layer but the head, with its parent and its name there."""
    head = model.get_output_embeddings()
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not head:
                yield parent, name, child


def numbered_tokenizer(size: int) -> Any:
    """Return a fast byte-level tokenizer of ``size`` tokens, each a number; for engines that want one."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    # Ġ is how byte-level vocabularies write a space.
    backend = Tokenizer(models.BPE(vocab={f"Ġ{i}": i for i in range(size)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="Ġ2", pad_token="Ġ0")
