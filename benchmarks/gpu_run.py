"""The order of events of ``gpu``, and its tables."""

from __future__ import annotations

import gc
import statistics
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.gpu_shapes import SHAPES
from benchmarks.gpu_tables import section, table_of
from benchmarks.harness.machine import head, result_path, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.gpu_shapes import Shape

NAME = "gpu"
RANKS = (8, 16, 64, 128)
"""Of the adapters whose kernels are measured."""
LIBRARIES = ("triton", "bitsandbytes")
"""What runs on the device beside torch; None in the records where it is not installed."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured, and at which size.

    Attributes:
        shape: name of the base's shape.
        device: a torch device.
        dtype: name of the dtype of all but what is quantized.
        rows: sequences at once.
        adapters: distinct ones, of ``rank``, on every linear layer.
        rank: of each.
        prompt_tokens: of every sequence.
        steps: decode steps per figure.
        train_rows: rows of a training step.
        train_length: tokens of each.
    """

    shape: str
    device: str
    dtype: str
    rows: tuple[int, ...]
    adapters: int
    rank: int
    prompt_tokens: int
    steps: int
    train_rows: int
    train_length: int

    @property
    def sizes(self) -> Shape:
        """The base's sizes."""
        return SHAPES[self.shape]

    @property
    def torch_dtype(self) -> Any:
        """The dtype itself."""
        import torch

        return getattr(torch, self.dtype)


def copy(setup: Setup) -> Iterator[dict[str, Any]]:
    """Measure what the device's memory does."""
    from benchmarks.harness.gpu_kernels import copy_rate

    num_bytes = (4 << 30) if setup.device.startswith("cuda") else (1 << 22)
    yield {"kind": "copy", "bytes_per_s": copy_rate(setup.device, num_bytes), "bytes": num_bytes}


def kernels(setup: Setup) -> Iterator[dict[str, Any]]:
    """Measure the adapters' kernels one by one, for every group of layers."""
    from benchmarks.harness.gpu_kernels import PATTERNS, GroupCase

    for group, (width, outs) in setup.sizes.groups.items():
        for rank in RANKS:
            for pattern in PATTERNS:
                case = GroupCase(
                    width,
                    outs,
                    rank=rank,
                    adapters=setup.adapters,
                    rows=max(setup.rows),
                    pattern=pattern,
                    dtype=setup.torch_dtype,
                    device=setup.device,
                )
                yield {
                    "kind": "kernel",
                    "group": group,
                    "rank": rank,
                    "pattern": pattern,
                    "rows": max(setup.rows),
                    "adapter_bytes": case.num_bytes,
                    "relative_difference": case.check(),
                    **case.measure(),
                }


def decode(setup: Setup, base: str) -> Iterator[dict[str, Any]]:
    """Measure decode steps of the engine without adapters and with them."""
    from benchmarks.harness.gpu_base import random_base, weight_bytes
    from benchmarks.harness.gpu_engine import WARM_UP, GpuSteps

    sizes, dtype = setup.sizes, setup.torch_dtype
    model = random_base(sizes, dtype=dtype, device=setup.device, nf4=base == "nf4")
    read = weight_bytes(model)
    is_cuda = setup.device.startswith("cuda")
    steps = GpuSteps(
        model,
        sizes,
        dtype=dtype,
        max_rows=max(setup.rows),
        adapters=setup.adapters,
        rank=setup.rank,
        context=setup.prompt_tokens + 4 * (setup.steps + WARM_UP),
        cuda_graphs=is_cuda,
    )
    modes = (False, True) if steps.has_graphs else (False,)
    cases = [(r, k, g) for g in modes for r in setup.rows for k in (0, min(r, setup.adapters))]
    try:
        for rows, adapters, graphs in cases:
            steps.use_graphs(on=graphs)
            seconds = steps.decode(
                rows, adapters=adapters, prompt_tokens=setup.prompt_tokens, steps=setup.steps
            )
            profile = steps.profile()
            steps.end_rows()
            positions = rows * (setup.prompt_tokens + WARM_UP + setup.steps / 2)
            median = statistics.median(seconds)
            yield {
                "kind": "decode",
                "base": base,
                "graphs": graphs,
                "rows": rows,
                "adapters": adapters,
                "rank": setup.rank,
                "step_ms": round(1e3 * median, 4),
                "slowest_ms": round(1e3 * max(seconds), 4),
                "tokens_per_s": round(rows / median, 1),
                "base_bytes": read + sizes.kv_bytes(positions, dtype.itemsize),
                "adapter_bytes": adapters * setup.rank * sizes.adapter_row * dtype.itemsize,
                **profile,
            }
        if is_cuda and not steps.has_graphs:
            raise RuntimeError("decode steps were not captured; the server's log says why")
    finally:
        steps.close()


def peft(setup: Setup) -> Iterator[dict[str, Any]]:
    """Measure PEFT's mixed batch on the same base and as many adapters."""
    from benchmarks.harness.gpu_base import random_base
    from benchmarks.harness.gpu_peers import peft_mixed

    model = random_base(setup.sizes, dtype=setup.torch_dtype, device=setup.device)
    found = peft_mixed(
        model,
        rows=setup.adapters,
        adapters=setup.adapters,
        rank=setup.rank,
        prompt_tokens=setup.prompt_tokens,
        short=2,
        long=10,
    )
    yield {
        "kind": "peer",
        "peer": "peft",
        "rows": setup.adapters,
        "adapters": setup.adapters,
        **found,
    }


def batching(setup: Setup) -> Iterator[dict[str, Any]]:
    """Measure transformers' own continuous batching on the same base, without adapters, at most rows."""
    from benchmarks.harness.gpu_base import random_base
    from benchmarks.harness.gpu_peers import continuous_batching

    model = random_base(setup.sizes, dtype=setup.torch_dtype, device=setup.device)
    for rows in setup.rows[-2:]:
        found = continuous_batching(
            model,
            rows=rows,
            prompt_tokens=setup.prompt_tokens,
            short=max(2, setup.steps // 8),
            long=setup.steps,
        )
        yield {"kind": "peer", "peer": "transformers", "rows": rows, "adapters": 0, **found}


def training(setup: Setup) -> Iterator[dict[str, Any]]:
    """Measure QLoRA's steps, keeping activations and computing them again."""
    from benchmarks.harness.gpu_base import random_base
    from benchmarks.harness.gpu_training import train_steps

    for checkpointing in (True, False):
        model = random_base(setup.sizes, dtype=setup.torch_dtype, device=setup.device, nf4=True)
        found = train_steps(
            model,
            vocab=setup.sizes.vocab,
            dtype=setup.dtype,
            device=setup.device,
            rank=setup.rank,
            batch_size=setup.train_rows,
            length=setup.train_length,
            steps=4,
            gradient_checkpointing=checkpointing,
        )
        yield {
            "kind": "training",
            "method": "qlora",
            "rows": setup.train_rows,
            "length": setup.train_length,
            "rank": setup.rank,
            "gradient_checkpointing": checkpointing,
            **found,
        }
        del model
        _forget(setup.device)


PARTS: dict[str, Callable[[Setup], Iterator[dict[str, Any]]]] = {
    "copy": copy,
    "kernels": kernels,
    "decode-bf16": lambda setup: decode(setup, "bf16"),
    "decode-nf4": lambda setup: decode(setup, "nf4"),
    "peft": peft,
    "batching": batching,
    "training": training,
}


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure this part; may be repeated. Of {', '.join(PARTS)}."),
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
    shape: Annotated[str, typer.Option(help=f"Of the base: {', '.join(SHAPES)}.")] = "llama-3-8b",
    dtype: Annotated[str, typer.Option(help="Of all but what is quantized.")] = "bfloat16",
    rows: Annotated[str, typer.Option(help="Sequences at once.")] = "1,8,32,64",
    adapters: Annotated[int, typer.Option(min=1, help="Distinct adapters.")] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    steps: Annotated[int, typer.Option(min=8, help="Decode steps per figure.")] = 64,
    train_rows: Annotated[int, typer.Option(min=1, help="Rows of a training step.")] = 4,
    train_length: Annotated[int, typer.Option(min=4, help="Tokens of a training row.")] = 1024,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure on a GPU."""
    if table:
        options.show(NAME, out, section)
        return
    chosen = only or list(PARTS)
    options.known(chosen, PARTS)
    options.known([shape], SHAPES)
    setup = Setup(
        shape=shape,
        device=device,
        dtype=dtype,
        rows=tuple(int(part) for part in rows.split(",")),
        adapters=adapters,
        rank=rank,
        prompt_tokens=prompt_tokens,
        steps=steps,
        train_rows=train_rows,
        train_length=train_length,
    )
    made = measure(setup, chosen, out)
    console.print(f"records: {made}")
    records = report.read(made)
    Console().print(table_of(records), highlight=False, soft_wrap=True)
    if any(record["kind"] == "failed" for record in records):
        raise typer.Exit(1)


def measure(setup: Setup, parts: list[str], out: Path | None) -> Path:
    """Measure one part after the other, append each record at once, and return the file.

    A part that fails is a record of its own, with the reason, and the others are measured all the same.

    Raises:
        typer.BadParameter: the device is not there.
    """
    import torch

    described = _device(setup.device)
    path = out or result_path(NAME, described["name"])
    first = head(
        NAME,
        {
            "shape": setup.shape,
            "dtype": setup.dtype,
            "rank": setup.rank,
            "prompt_tokens": setup.prompt_tokens,
            "steps": setup.steps,
            "gpu": described,
        },
    )
    for part in parts:
        try:
            if setup.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(setup.device)
            for record in PARTS[part](setup):
                console.print({k: v for k, v in record.items() if k != "longest"})
                report.append(path, {**first, "part": part, **record})
        except Exception as error:  # noqa: BLE001 - whatever a library raises, the others are measured
            console.print(f"{part} failed: {error!r}")
            report.append(
                path,
                {
                    **first,
                    "part": part,
                    "kind": "failed",
                    "error": repr(error),
                    "trace": traceback.format_exc()[-4000:],
                },
            )
        _forget(setup.device)
    return path


def _forget(device: str) -> None:
    """Give the device's memory back before something else is built on it."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _device(device: str) -> dict[str, Any]:
    """Describe the device; raises where it is not there."""
    import torch

    found: dict[str, Any] = {"name": "cpu"}
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise typer.BadParameter(f"--device is {device}, and torch sees no GPU")
        properties = torch.cuda.get_device_properties(device)
        found = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {**found, **dict.fromkeys(LIBRARIES), **versions(LIBRARIES)}
