"""The same random base decoded by PEFT's mixed batch and by transformers' continuous batching."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable


def decode_rate(
    run: Callable[[int], None], *, rows: int, short: int, long: int
) -> dict[str, float]:
    """Return tokens a second of all rows together, prompts not counted.

    ``run(n)`` answers with n tokens in every row. What two runs of different length differ in is
    decoding alone, however a library times itself.
    """
    run(long)
    seconds = {}
    for count in (short, long):
        started = time.perf_counter()
        run(count)
        seconds[count] = time.perf_counter() - started
    step_s = (seconds[long] - seconds[short]) / (long - short)
    return {"step_ms": round(1e3 * step_s, 4), "tokens_per_s": round(rows / step_s, 1)}


def peft_mixed(
    model: Any, *, rows: int, adapters: int, rank: int, prompt_tokens: int, short: int, long: int
) -> dict[str, float]:
    """Measure ``generate(adapter_names=[…])`` with adapters dealt out in turn."""
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    names = [f"random-{k}" for k in range(adapters)]
    device = model.device
    # PEFT makes adapters where torch's default device is, and moves them afterwards.
    with quiet_libraries(), torch.device(device):
        mixed = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            mixed.add_adapter(name, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    mixed.eval()
    vocab = model.get_input_embeddings().weight.shape[0]

    def run(count: int) -> None:
        ids = torch.randint(3, vocab, (rows, prompt_tokens), device=device)
        with torch.inference_mode():
            mixed.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=[names[row % adapters] for row in range(rows)],
                generation_config=GenerationConfig(
                    max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
                ),
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return decode_rate(run, rows=rows, short=short, long=long)


def continuous_batching(
    model: Any, *, rows: int, prompt_tokens: int, short: int, long: int
) -> dict[str, float]:
    """Measure transformers' ``generate_batch`` on the bare base, on a GPU by its own choice of everything.

    Raises:
        RuntimeError: it answered with fewer tokens than it was asked for.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    vocab = model.get_input_embeddings().weight.shape[0]
    # Left to itself it takes nine tenths of the free memory, which on a CPU is everybody's.
    small = ContinuousBatchingConfig(num_blocks=2 * rows, max_batch_tokens=rows * prompt_tokens)
    config = None if model.device.type == "cuda" else small

    def run(count: int) -> None:
        # Fresh prompts, or its prefix cache would answer for the ones of before.
        prompts = torch.randint(3, vocab, (rows, prompt_tokens)).tolist()
        answers = model.generate_batch(
            prompts,
            # Its sign for answers without an end.
            GenerationConfig(
                max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=config,
            persistent_manager=True,
            max_new_tokens=count,
        )
        made = [len(answer.generated_tokens) for answer in answers.values()]
        if made != [count] * rows:
            raise RuntimeError(f"asked for {rows} answers of {count} tokens, and got {made}")

    try:
        return decode_rate(run, rows=rows, short=short, long=long)
    finally:
        model.destroy_cached_continuous_batching_manager()
