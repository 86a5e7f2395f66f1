"""Build what a serving benchmark compares, in the right order, and take it down again."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.agreement import check_agreement, disagreements
from benchmarks.contenders.lorary_engine import LoraryEngine
from benchmarks.contenders.peers import make_peer
from benchmarks.contenders.peft_mixed import PeftMixed
from benchmarks.harness.machine import ROOT
from benchmarks.peers.catalog import CONTENDERS
from benchmarks.plan import AGREEMENT_TOKENS
from benchmarks.synthetic import make_adapters, push_adapters
from benchmarks.workload import Call, Prompts
from lorary.bases import find_base
from lorary.bases.load import load_tokenizer
from lorary.registry import Registry
from lorary.server.engine.assemble import EngineLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from benchmarks.plan import Plan
    from benchmarks.workload import Contender
    from lorary.bases import Base

ADAPTER_MEMORY = 1 << 30
MAX_CONTEXT = 1024
# English of a fixed wording; 128 tokens from anywhere in it are a prompt.
TEXT = ROOT / "LICENSE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Everything that a benchmark uses."""

    base: Base
    prompts: Prompts
    pad_id: int
    folders: dict[str, Path]
    contenders: list[Contender]

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters."""
        return list(self.folders)


@contextmanager
def build(plan: Plan, scratch: Path, console: Console) -> Iterator[Stage]:
    """Make adapters, push them to a registry of their own, and start the contenders."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    with ExitStack() as stack, console.status("finding the base") as status:
        base = find_base(plan.base, progress=status.update)
        tokenizer = load_tokenizer(base)
        # One at least, for the agreement check.
        count = max(1, *plan.adapters)
        folders = make_adapters(
            base,
            scratch / "adapters",
            count,
            said=lambda done: status.update(f"making adapters: {done} of {count}"),
        )
        registry = Registry.open(scratch / "registry", create=True)
        push_adapters(
            registry,
            base,
            folders,
            said=lambda done: status.update(f"pushing adapters: {done} of {count}"),
        )
        contenders: list[Contender] = []
        for name in plan.contenders:
            status.update(f"starting {name}")
            contender = _start(name, plan, base, folders, registry, scratch, dtype)
            stack.callback(contender.close)
            contenders.append(contender)
        status.stop()
        yield Stage(
            base=base,
            prompts=Prompts(tokenizer, TEXT),
            pad_id=int(tokenizer.pad_token_id),
            folders=folders,
            contenders=contenders,
        )


def check(
    plan: Plan, stage: Stage, keep: Callable[[dict[str, Any]], None], console: Console
) -> None:
    """Compare the contenders' answers before their speed.

    Raises:
        SystemExit: one of ours answers wrongly. Of a peer it is only said.
    """
    rng = random.Random(0)
    count = plan.agreement_calls
    # Every adapter in turn, then the bare base, all in one batch.
    names: list[str | None] = [*stage.adapters[: count - 1], None]
    prompts = stage.prompts.take(count, plan.prompt_tokens, rng)
    calls = [
        Call(prompt_ids=prompt, adapter=names[i % len(names)]) for i, prompt in enumerate(prompts)
    ]
    used = [name for name in names if name is not None]
    with console.status("agreement") as status:
        status.update("agreement: loading PEFT in float32")
        oracle = PeftMixed(stage.base, stage.folders, pad_id=stage.pad_id, dtype=torch.float32)
        found = next((c for c in stage.contenders if isinstance(c, PeftMixed)), None)
        peer = found or PeftMixed(
            stage.base, stage.folders, pad_id=stage.pad_id, dtype=getattr(torch, plan.dtype)
        )
        others = [c for c in stage.contenders if c is not found]
        for model in (oracle, peer):
            model.prepare(used)
        results = check_agreement(
            others,
            oracle,
            peer,
            calls,
            new_tokens=AGREEMENT_TOKENS,
            said=lambda line: status.update(f"agreement: {line}"),
        )
    for result in results:
        keep({"kind": "agreement", **result.record()})
        share = (
            "" if result.telling_tokens is None else f", telling tokens {result.telling_tokens:.0%}"
        )
        free = f"{result.free_running:.0%} before the first difference"
        console.print(
            f"{result.contender} against {result.against}: "
            f"{free if result.num_answers else 'as a control'}{share}",
            highlight=False,
            soft_wrap=True,
        )
    wrong = disagreements(results)
    for name, line in wrong.items():
        if name in CONTENDERS:
            console.print(f"[yellow]{line}[/]", highlight=False, soft_wrap=True)
    ours = [line for name, line in wrong.items() if name not in CONTENDERS]
    if ours:
        raise SystemExit("\n".join(ours))


def _start(
    name: str,
    plan: Plan,
    base: Base,
    folders: dict[str, Path],
    registry: Registry,
    scratch: Path,
    dtype: torch.dtype,
) -> Contender:
    if name == PeftMixed.name:
        pad_id = int(load_tokenizer(base).pad_token_id)
        return PeftMixed(base, folders, pad_id=pad_id, dtype=dtype)
    if name in ("lorary", "lorary-int8"):
        limits = EngineLimits(
            max_batch=max(plan.concurrency),
            max_context=MAX_CONTEXT,
            adapter_memory_bytes=ADAPTER_MEMORY,
            # Every repeat asks the same of everybody; only this contender could remember. And greedy
            # answers without an end go round in circles, which drafts would make too much of.
            prefix_cache=False,
            draft_rows=0,
        )
        return LoraryEngine(base, registry, dtype=dtype, limits=limits, int8=name == "lorary-int8")
    if name in CONTENDERS:
        return make_peer(name, plan, base, folders, scratch)
    from benchmarks.contenders.lorary_grpc import LoraryServer

    options = {
        "base": plan.base,
        "registry": registry.url,
        "dtype": plan.dtype,
        "quantize": "none",
        "threads": plan.threads,
        "max-batch": max(plan.concurrency),
        "max-context": MAX_CONTEXT,
        "adapter-memory": ADAPTER_MEMORY,
        "draft-rows": 0,
        "log-level": "warning",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return LoraryServer([*arguments, "--no-prefix-cache"], scratch)
