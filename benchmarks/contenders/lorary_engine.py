"""Lorary's engine in this process: registry, residency, scheduler and steps, without the network."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING

from benchmarks.workload import Call, Contender, Trace
from lorary.bases.load import load_model, load_tokenizer
from lorary.registry.invocation import active_from
from lorary.server import interpreter
from lorary.server.adapters.residency import BaseLease
from lorary.server.engine.assemble import EngineLimits, assemble
from lorary.server.engine.request import Lease, Output, Request, Sampling
from lorary.server.maths_threads import let_helpers_go

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorary.bases import Base
    from lorary.registry import Registry
    from lorary.server.adapters.residency import ResidencyObserver

_TIMEOUT_S = 600.0


class LoraryEngine(Contender):
    """``assemble()`` as the server calls it, driven by one thread."""

    def __init__(
        self,
        base: Base,
        registry: Registry,
        *,
        dtype: torch.dtype,
        limits: EngineLimits,
        int8: bool = False,
        residency_observer: ResidencyObserver | None = None,
    ) -> None:
        self.name = "lorary-int8" if int8 else "lorary"
        interpreter.share_fairly()
        self._registry = registry
        self._arrived: queue.SimpleQueue[tuple[float, list[Output]]] = queue.SimpleQueue()
        self._assembled = assemble(
            model=load_model(base, dtype=dtype, device="cpu"),
            tokenizer=load_tokenizer(base),
            card=base.card,
            registry=registry,
            limits=limits,
            dtype=dtype,
            int8=int8,
            deliver=lambda outputs: self._arrived.put((time.perf_counter(), outputs)),
            residency_observer=residency_observer,
        )
        interpreter.forget_what_stays()
        self._assembled.engine.start()
        self._num_sent = 0

    def prepare(self, adapters: Sequence[str]) -> None:
        """Load adapters and wait for them."""
        for name in adapters:
            self._assembled.residency.load(self._registry.resolve(name))

    def touch(self, adapter: str) -> None:
        """Load an adapter and make it the most recently used."""
        resolved = self._registry.resolve(adapter)
        self._assembled.residency.load(resolved)
        self._assembled.residency.acquire(resolved).release()

    @property
    def resident(self) -> frozenset[str]:
        """Names of the adapters that are on the device."""
        return frozenset(
            adapter.name
            for adapter in self._assembled.residency.snapshot()
            if adapter.state == "resident"
        )

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Keep ``concurrency`` requests in flight: the next is sent when one has ended."""
        # Other contenders compute on this thread; a server has nobody who does.
        let_helpers_go()
        sampling = Sampling(max_tokens=new_tokens, ignore_eos=True)
        traces: dict[str, Trace] = {}
        waiting = iter(calls)
        for _, call in zip(range(concurrency), waiting, strict=False):
            self._send(call, sampling, traces)
        num_open = len(traces)
        while num_open:
            at_s, outputs = self._arrived.get(timeout=_TIMEOUT_S)
            for output in outputs:
                if output.error is not None:
                    raise output.error
                trace = traces[output.request_id]
                trace.token_ids += output.token_ids
                trace.token_s += [at_s] * len(output.token_ids)
                if output.finish is not None:
                    trace.num_cached = output.finish.cached_tokens
                    trace.num_above = output.finish.cached_below_tokens
                    num_open -= 1
                    for call in waiting:
                        self._send(call, sampling, traces)
                        num_open += 1
                        break
        return list(traces.values())

    def close(self) -> None:
        """Stop the engine and its loaders."""
        self._assembled.engine.shutdown()
        self._assembled.residency.close()

    def _send(self, call: Call, sampling: Sampling, traces: dict[str, Trace]) -> str:
        sent_s = time.perf_counter()
        self._num_sent += 1
        request_id = str(self._num_sent)
        traces[request_id] = Trace(sent_s)
        self._assembled.engine.submit(
            Request(
                request_id=request_id,
                prompt_ids=call.prompt_ids,
                sampling=sampling,
                lease=self._lease(call.adapter),
                arrived_s=time.monotonic(),
                active_from=self._active_from(call),
            )
        )
        return request_id

    def _active_from(self, call: Call) -> int:
        if call.adapter is None:
            return 0
        method = self._registry.manifest(self._registry.resolve(call.adapter)).method
        start = active_from(call.prompt_ids, method.invocation_tokens)
        assert start is not None, f"a prompt without the invocation of {call.adapter}"
        return start

    def _lease(self, adapter: str | None) -> Lease:
        if adapter is None:
            return BaseLease()
        return self._assembled.residency.acquire(self._registry.resolve(adapter))
