"""The parts of ``lifecycle``, over two engines of one base: one holds every adapter, one a few.

- ``arrivals``: ``NUM_HOT`` adapters answer without a pause, one stream each; meanwhile every cold adapter
  is asked for once, ``gap_s`` apart. On the *small* engine each is loaded and makes another leave; on the
  *large* one the same calls at the same times find theirs resident. Compared: the time between tokens of
  the hot streams alone. The cold ones' files are read once before, so that the system has them in memory:
  65 MB/s are more than the disks of small machines give, and what a disk costs is ``first token``'s question.
- ``first token``: one call at a time on an idle engine, its adapter *warm* (resident), in *host* memory
  only, or on *disk* only, with the system's copies of its files dropped before; the same prompt each time.
- ``zipf``: ``fitting`` × 4 adapters, drawn by Zipf's law with exponent 1, ``concurrency`` at once; the small
  engine begins with the most popular ones resident and loads the others from the disk, the large one has all.
- ``known``: in a process of its own (``lifecycle_known``).
"""

from __future__ import annotations

import json
import queue
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.contenders.lorary_engine import LoraryEngine
from benchmarks.harness.machine import ROOT
from benchmarks.library import Member, adapter_bytes, fill, forget_files, recall_files
from benchmarks.lifecycle_known import TEMPLATE
from benchmarks.measure import figures, percentiles
from benchmarks.mix_run import Comings
from benchmarks.plan import SEED
from benchmarks.setup import MAX_CONTEXT, TEXT
from benchmarks.workload import Call, Prompts, Trace, choose
from lorary.bases.load import load_tokenizer
from lorary.registry import Registry
from lorary.server.engine.assemble import EngineLimits
from lorary.server.engine.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorary.bases import Base

NUM_HOT = 8
HOT_TOKENS, COLD_TOKENS = 64, 8
SHORT_PROMPT, LONG_PROMPT = 32, 128
OVERCOMMIT = 4
WARM, HOST, DISK = "warm", "host", "disk"
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Engines:
    """Everything the parts use.

    Attributes:
        small: memory for ``fitting`` adapters.
        large: memory for all, and copies in host memory.
        comings: counts the small engine's loads.
    """

    small: LifecycleEngine
    large: LifecycleEngine
    registry: Registry
    prompts: Prompts
    adapters: tuple[str, ...]
    fitting: int
    comings: Comings

    def close(self) -> None:
        """Stop both engines."""
        self.small.close()
        self.large.close()


class LifecycleEngine(LoraryEngine):
    """The engine with calls that arrive by the clock, and adapters that are taken away by hand."""

    def hot_and_cold(
        self, hot: Sequence[Call], cold: Sequence[Call], *, gap_s: float
    ) -> tuple[list[Trace], list[Trace]]:
        """Keep one call of each of ``hot`` in flight while ``cold`` arrive; return both's answers."""
        sampling = {
            "hot": Sampling(max_tokens=HOT_TOKENS, ignore_eos=True),
            "cold": Sampling(max_tokens=COLD_TOKENS, ignore_eos=True),
        }
        traces: dict[str, Trace] = {}
        kind: dict[str, tuple[str, Call]] = {}

        def send(which: str, call: Call) -> None:
            kind[self._send(call, sampling[which], traces)] = (which, call)

        started_s = time.perf_counter()
        for call in hot:
            send("hot", call)
        num_sent = num_ended = 0
        while num_ended < len(cold):
            while num_sent < len(cold) and time.perf_counter() >= started_s + gap_s * (
                num_sent + 1
            ):
                send("cold", cold[num_sent])
                num_sent += 1
            due_s = started_s + gap_s * (num_sent + 1) - time.perf_counter()
            for request_id in self._take(traces, due_s if num_sent < len(cold) else _TIMEOUT_S):
                which, call = kind[request_id]
                num_ended += which == "cold"
                if which == "hot":
                    send("hot", call)
        self._finish(traces, [r for r, (which, _) in kind.items() if which == "hot"])
        by_kind: dict[str, list[Trace]] = {"hot": [], "cold": []}
        for request_id, trace in traces.items():
            by_kind[kind[request_id][0]].append(trace)
        return by_kind["hot"], by_kind["cold"]

    def make(self, adapter: str, where: str) -> None:
        """Put one adapter into a tier and out of those below it."""
        residency, resolved = self._assembled.residency, self._registry.resolve(adapter)
        if where == DISK:
            residency.unload(resolved.digest)
            forget_files(self._registry.fetch(resolved))
            return
        residency.load(resolved)
        if where == HOST and not residency.demote(resolved.digest):
            raise RuntimeError(f"'{adapter}' could not be made to leave the device")

    def leave_only(self, adapters: Sequence[str]) -> None:
        """Have exactly these on the device."""
        for adapter in self._assembled.residency.snapshot():
            if adapter.name not in adapters:
                self._assembled.residency.unload(adapter.digest)
        for name in adapters:
            self.touch(name)

    def _take(self, traces: dict[str, Trace], timeout_s: float) -> list[str]:
        """Take in what one step delivered, if it comes in time; return the answers that ended."""
        try:
            at_s, outputs = self._arrived.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return []
        ended = []
        for output in outputs:
            if output.error is not None:
                raise output.error
            traces[output.request_id].token_ids += output.token_ids
            traces[output.request_id].token_s += [at_s] * len(output.token_ids)
            if output.finish is not None:
                ended.append(output.request_id)
        return ended

    def _finish(self, traces: dict[str, Trace], requests: Sequence[str]) -> None:
        """Let what is in flight come to its end."""
        while any(len(traces[r].token_ids) < HOT_TOKENS for r in requests):
            self._take(traces, _TIMEOUT_S)


def start(scratch: Path, base: Base, setup: dict[str, Any], said: Callable[[str], None]) -> Engines:
    """Make adapters, push them, and start both engines."""
    count = max(NUM_HOT + setup["cold"], OVERCOMMIT * setup["fitting"], setup["sampled"])
    names = tuple(f"adapter-{k:03d}" for k in range(count))
    registry = Registry.open(scratch / "registry", create=True)
    fill(
        registry,
        base,
        [Member(name, setup["rank"], seed) for seed, name in enumerate(names)],
        scratch / "folder",
        said=lambda done: said(f"making adapters: {done} of {count}"),
    )
    comings = Comings()
    size = adapter_bytes(base, setup["rank"])

    def engine(fitting: int, copies: int, observer: Comings | None) -> LifecycleEngine:
        return LifecycleEngine(
            base,
            registry,
            dtype=torch.bfloat16,
            limits=EngineLimits(
                max_batch=32,
                max_context=MAX_CONTEXT,
                adapter_memory_bytes=fitting * size,
                host_adapter_memory_bytes=copies * size,
                # As in the serving benchmark.
                prefix_cache=False,
                draft_rows=0,
            ),
            residency_observer=observer,
        )

    small = engine(setup["fitting"], 0, comings)
    large = engine(count, 2 * setup["sampled"], None)
    large.prepare(names)
    return Engines(
        small=small,
        large=large,
        registry=registry,
        prompts=Prompts(load_tokenizer(base), TEXT),
        adapters=names,
        fitting=setup["fitting"],
        comings=comings,
    )


def arrivals(engines: Engines, case: str, repeat: int, *, gap_s: float) -> dict[str, Any]:
    """Run the hot streams beside the cold ones; ``case`` is ``churn`` or ``still``."""
    engine = engines.small if case == "churn" else engines.large
    hot, cold = engines.adapters[:NUM_HOT], engines.adapters[NUM_HOT:]
    if case == "churn":
        engine.leave_only(hot)
        for name in cold:
            recall_files(engines.registry.locate(engines.registry.resolve(name)))
    rng = random.Random(f"{SEED}/arrivals/{repeat}")
    texts = engines.prompts.take(len(hot) + len(cold), SHORT_PROMPT, rng)
    calls = [Call(prompt_ids=p, adapter=a) for p, a in zip(texts, hot + cold, strict=True)]
    loads = engines.comings.loads
    answered, came = engine.hot_and_cold(calls[: len(hot)], calls[len(hot) :], gap_s=gap_s)
    gaps = [gap for t in answered for gap in np.diff(t.token_s)]
    return {
        "itl_ms": percentiles(gaps),
        "cold_first_token_ms": percentiles([t.token_s[0] - t.sent_s for t in came]),
        "hot_answers": len(answered),
        "loads": engines.comings.loads - loads,
    }


def first_token(engines: Engines, where: str, repeat: int, *, count: int) -> dict[str, Any]:
    """Time the first tokens of ``count`` adapters, one call at a time."""
    rng = random.Random(f"{SEED}/first/{repeat}")
    names = engines.adapters[:count]
    taken = []
    for name, prompt in zip(names, engines.prompts.take(count, LONG_PROMPT, rng), strict=True):
        engines.large.make(name, where)
        (trace,) = engines.large.run(
            [Call(prompt_ids=prompt, adapter=name)], concurrency=1, new_tokens=2
        )
        taken.append(trace.token_s[0] - trace.sent_s)
    engines.large.prepare(names)
    return {"first_token_ms": percentiles(taken)}


def zipf(
    engines: Engines, case: str, repeat: int, *, requests: int, concurrency: int, folder: Path
) -> dict[str, Any]:
    """Answer Zipf traffic; ``case`` is ``churn`` (4 × as many as fit) or ``still`` (all resident)."""
    engine = engines.small if case == "churn" else engines.large
    names = engines.adapters[: OVERCOMMIT * engines.fitting]
    rng = random.Random(f"{SEED}/zipf/{repeat}")
    texts = engines.prompts.take(requests, LONG_PROMPT, rng)
    chosen = choose(names, requests, "zipf", rng)
    if case == "churn":
        # The most popular last, so that they are the newest.
        engine.leave_only(names[engines.fitting - 1 :: -1])
        forget_files(folder)
    loads = engines.comings.loads
    traces = engine.run(
        [Call(prompt_ids=p, adapter=a) for p, a in zip(texts, chosen, strict=True)],
        concurrency=concurrency,
        new_tokens=HOT_TOKENS,
    )
    return {
        **figures(traces),
        "asked_adapters": len(set(chosen)),
        "loads": engines.comings.loads - loads,
    }


def known(base: Base, scratch: Path, count: int) -> dict[str, Any]:
    """Measure what knowing ``count`` adapters costs, in a process of its own."""
    folder = scratch / "known"
    # Of an attempt that others disturbed.
    shutil.rmtree(folder, ignore_errors=True)
    registry = Registry.open(folder, create=True)
    fill(registry, base, [Member(TEMPLATE, 1, 0, ("q_proj",))], scratch / "one")
    registry.set_alias(TEMPLATE, "prod", 1)
    command = [sys.executable, "-m", "benchmarks.lifecycle_known"]
    for action in ("make", "measure"):
        done = subprocess.run(
            [*command, action, str(folder), str(count)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured
