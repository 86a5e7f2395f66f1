"""What a run will take, said before it starts: memory by arithmetic, time by a few real steps.

*Memory* is added up from what must be there at the same moment::

    weights     of the base, in the format it trains in
    adapter     what is trained, float32
    optimizer   its moments
    step        activations, gradients and temporaries of the longest batch of the plan, at their peak; or
                gradients and the optimizer's temporaries, where these are more
    process     Python and the libraries (on a CPU; a GPU's own context is not counted)

The first three follow from shapes. The fourth is traced: the model is built a second time on torch's
``meta`` device, where tensors have shapes and no memory, takes one step there, and every allocation is
counted from its birth to its death. So it holds for any architecture and method, our own kernels and
gradient checkpointing included, and needs neither weights nor room for them.

*Time* cannot be known from shapes: ``rehearse`` takes three real steps, of which the first warms up.
"""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorary.bases.free_memory import free_bytes
from lorary.registry.manifest import SERVED_KINDS
from lorary.trainer import grouped_attention
from lorary.trainer.batches import plan_rows
from lorary.trainer.head import head_reads
from lorary.trainer.meter import memory_bytes, peak_memory_bytes
from lorary.trainer.optimizers import OPTIMIZERS
from lorary.trainer.token_store import row_lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from lorary.trainer.encoding import Row
    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.train import Prepared

_REHEARSED_STEPS = 3
# bitsandbytes leaves the moments of smaller tensors in float32.
_MIN_8BIT_VALUES = 4096
# Bytes of a quantized weight: nf4 has a byte per 64 weights, and 4 per 256 of those (2305.14314 §3).
_QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes a run needs at its peak, by what needs them."""

    weights: int
    adapter: int
    optimizer: int
    step: int
    process: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapter + self.optimizer + self.step + self.process


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a few real steps took, and what follows for the whole run.

    Attributes:
        fit_seconds: of all steps and validations; loading, evaluation and writing come on top.
        tokens_per_s: unpadded tokens, trained on.
        peak_memory_bytes: of this process (or GPU) up to now.
        expected_memory_bytes: what the arithmetic says for the batches rehearsed; beside the peak, it
            tells how far to trust it. None for a task kind that it does not cover.
    """

    fit_seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    expected_memory_bytes: int | None


def estimate_memory(run: Prepared, *, num_steps: int | None = None) -> Memory:
    """Add up the memory of a run whose model is a causal language model; loads nothing.

    Args:
        run: prepared, with no ``auto`` left.
        num_steps: look at the batches of that many steps only; default: all.
    """
    recipe = run.recipe
    device = recipe.training.device
    model = _shadow(run)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = _longest_batch(run, num_steps or recipe.training.max_steps)
    return Memory(
        weights=_weight_bytes(model, recipe.method.base_quantization),
        adapter=sum(p.nbytes for p in trained),
        optimizer=_optimizer_bytes(trained, recipe),
        step=max(_step_bytes(model, batch), _update_bytes(trained, recipe)),
        process=0 if device.startswith("cuda") else memory_bytes(device),
    )


def available_bytes(device: str) -> int:
    """Return what is free on a device just now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return free_bytes()


def rehearse(run: Prepared, reporter: Reporter) -> Rehearsal:
    """Load the base and take a few real steps and a validation; nothing is kept.

    Raises:
        What ``train`` raises up to the end of the fit.
    """
    from lorary.trainer.train import fit_adapter

    training = run.recipe.training
    num_steps = min(_REHEARSED_STEPS, training.max_steps)
    is_covered = run.recipe.task.kind in SERVED_KINDS
    expected = estimate_memory(run, num_steps=num_steps).total if is_covered else None
    short = replace(training, max_steps=num_steps, eval_every=num_steps, trackers=())
    few = replace(
        run,
        recipe=replace(run.recipe, training=short),
        validation_rows=run.validation_rows[: training.batch_size],
    )
    with tempfile.TemporaryDirectory(prefix="lorary-rehearsal-") as folder:
        _, fitted = fit_adapter(few, Path(folder) / "rehearsal", None, reporter)
    # The first step also plans kernels and takes memory, unless there is no other.
    steps = [entry for entry in fitted.history if "loss" in entry][1 if num_steps > 1 else 0 :]
    rate = sum(entry["tokens"] for entry in steps) / sum(entry["seconds"] for entry in steps)
    lengths = row_lengths(run.train_rows)
    num_tokens = sum(lengths[i] for batch in _plan(run, training.max_steps) for i in batch)
    validation_s = sum(entry.get("eval_runtime", 0.0) for entry in fitted.history)
    num_batches = -(-len(run.validation_rows) // training.batch_size)
    num_validations = -(-training.max_steps // training.steps_between_evals)
    return Rehearsal(
        fit_seconds=num_tokens / rate + validation_s * num_batches * num_validations,
        tokens_per_s=rate,
        peak_memory_bytes=peak_memory_bytes(training.device),
        expected_memory_bytes=expected,
    )


def _shadow(run: Prepared) -> Any:
    """Return the model that will train, on the device that has no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorary.trainer.grouped_attention import attention_of
    from lorary.trainer.methods.attach import attach
    from lorary.trainer.methods.method import Setting
    from lorary.trainer.train import dtype_of

    config = AutoConfig.from_pretrained(run.base.path, local_files_only=True)
    recipe = run.recipe
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype_of(recipe),
            attn_implementation=attention_of(config, recipe.training.device),
        )
        method = attach(
            model,
            recipe.method,
            gradient_checkpointing=recipe.training.gradient_checkpointing,
            setting=Setting(max_steps=recipe.training.max_steps),
            is_started=False,
        )
        return method.model.train()


def _weight_bytes(model: Any, quantization: str) -> int:
    """Bytes of the frozen base; tied weights count once."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    total: int = sum(p.nbytes for p in frozen.values())
    if quantization == "none":
        return total
    head = model.get_output_embeddings()
    linears: list[nn.Linear] = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and not module.weight.requires_grad
    ]
    for weight in {id(m.weight): m.weight for m in linears}.values():
        total += round(weight.numel() * _QUANTIZED_BYTES[quantization]) - weight.nbytes
    return total


def _optimizer_bytes(trained: Sequence[Tensor], recipe: Recipe) -> int:
    optimizer = OPTIMIZERS[recipe.training.optimizer]
    whole = OPTIMIZERS["adamw"].state_bytes
    return round(
        sum(
            p.numel() * (optimizer.state_bytes if p.numel() >= _MIN_8BIT_VALUES else whole)
            for p in trained
        )
    )


def _update_bytes(trained: Sequence[Tensor], recipe: Recipe) -> int:
    """Bytes at the peak of the optimizer's own step: the gradients, and roots of all second moments.

    torch's AdamW takes the roots of all parameters at once on a GPU, of one at a time on a CPU; the others
    work in place. That is nothing beside activations, unless whole weights are trained.
    """
    gradients = sum(p.nbytes for p in trained)
    has_roots = recipe.training.optimizer == "adamw" and recipe.training.device.startswith("cuda")
    return 2 * gradients if has_roots else gradients


def _longest_batch(run: Prepared, num_steps: int) -> list[Row]:
    """Return the batch of the plan with the most positions, padding included."""
    lengths = row_lengths(run.train_rows)
    plan = _plan(run, num_steps)
    longest = max(plan, key=lambda batch: len(batch) * max(lengths[i] for i in batch))
    return [run.train_rows[i] for i in longest]


def _plan(run: Prepared, num_steps: int) -> list[list[int]]:
    training = run.recipe.training
    return plan_rows(
        run.train_rows,
        batch_size=training.batch_size,
        num_batches=num_steps * training.gradient_accumulation,
        seed=training.seed,
    )


def _step_bytes(model: Any, batch: Sequence[Row]) -> int:
    """Take one step on the meta device, and return the most it would have allocated."""
    num_rows, length = len(batch), max(len(row.input_ids) for row in batch)
    num_learned = sum(sum(row.is_learned()[1:]) for row in batch)
    is_packed = any(row.starts for row in batch)
    bounds = [_bounds(row, length) for row in batch] if is_packed else None
    allocations = Allocations()
    with torch.device("meta"), grouped_attention.known_bounds(bounds), allocations:
        ids = torch.zeros(num_rows, length, dtype=torch.int64)
        picked = torch.zeros(num_learned, dtype=torch.int64)
        # A model makes it from values, which are not here; one for each row only where they are packed.
        mask = torch.zeros(num_rows if is_packed else 1, 1, length, length, dtype=model.dtype)
        with head_reads(model, lambda hidden: hidden[picked, picked].unsqueeze(0)):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits.squeeze(0).float(), picked, reduction="sum")
        del logits
        loss.backward()  # type: ignore[no-untyped-call]
    return allocations.peak


def _bounds(row: Row, length: int) -> list[tuple[int, int]]:
    """Return where the samples of a row begin and end, its padding being one more."""
    return list(pairwise(sorted({0, *row.starts, len(row.input_ids), length})))


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made within the context, until each is let go of.

    Attributes:
        peak: the most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; inputs are not new, outputs may be."""
        given = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if _is_tensor(t)]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and not any(storage is one for one in given):
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self._live -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
