"""A real engine over the tiny base and a real local registry, driven without a network."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from lorary.registry import BaseCard, Registry
from lorary.registry.invocation import active_from
from lorary.server.adapters.composed import Compositions
from lorary.server.adapters.residency import BaseLease
from lorary.server.composition import composition_digest
from lorary.server.engine.assemble import EngineLimits, assemble
from lorary.server.engine.request import Finish, Output, Request, Sampling, StepStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lorary.errors import LoraryError
    from lorary.server.adapters.composed import ComposedLease
    from lorary.server.adapters.verification import VerificationObserver
    from lorary.server.engine.request import Execution, Pooling
    from lorary.server.ports import ResidencyLike


class Collector:
    """Receives what an engine delivers; waits for answers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.outputs: dict[tuple[str, int], list[Output]] = {}
        self.steps: list[StepStats] = []
        self.errors: list[BaseException] = []
        self.ended: dict[tuple[str, int], int] = {}
        """In which order answers ended."""

    def deliver(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                key = (output.request_id, output.index)
                self.outputs.setdefault(key, []).append(output)
                if output.finish is not None or output.error is not None:
                    self.ended[key] = len(self.ended)
            self._changed.notify_all()

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_error(self, error: BaseException) -> None:
        self.errors.append(error)

    def wait_started(self, request_id: str, index: int = 0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (request_id, index) in self.outputs, 60)

    def wait(
        self, request_id: str, index: int = 0
    ) -> tuple[list[int], Finish | None, LoraryError | None]:
        """Return the tokens of an answer and how it ended."""
        key = (request_id, index)

        def is_done() -> bool:
            last = self.outputs.get(key, [Output(request_id="", index=0)])[-1]
            return last.finish is not None or last.error is not None

        with self._changed:
            assert self._changed.wait_for(is_done, 60), f"{key} never ended"
            outputs = self.outputs[key]
        tokens = [token for output in outputs for token in output.token_ids]
        return tokens, outputs[-1].finish, outputs[-1].error

    def logprobs(self, request_id: str, index: int = 0) -> list[float]:
        """Return the log probability of every token of an answer that came without an error."""
        _, _, error = self.wait(request_id, index)
        assert error is None
        outputs = self.outputs[(request_id, index)]
        return [p.chosen[1] for output in outputs for p in output.logprobs]


class EngineWorld:
    """An engine, its adapters by name, and its outputs."""

    def __init__(
        self,
        base: Path,
        registry: Registry,
        *,
        start: bool = True,
        model: Any = None,
        int8: bool | frozenset[str] = False,
        dtype: torch.dtype = torch.float32,
        verification_observer: VerificationObserver | None = None,
        weights_from: Path | None = None,
        **limits: Any,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.collector = Collector()
        self.registry = registry
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        assembled = assemble(
            model=model,
            tokenizer=self.tokenizer,
            card=BaseCard.from_folder(base),
            registry=registry,
            limits=EngineLimits(**{"max_batch": 8, "max_context": 256, **limits}),
            dtype=dtype,
            int8=int8,
            deliver=self.collector.deliver,
            engine_observer=self.collector,
            verification_observer=verification_observer,
            base_folder=base if weights_from is None else weights_from,
        )
        self.engine, self.residency, self.lora = (
            assembled.engine,
            assembled.residency,
            assembled.lora,
        )
        self.fused = assembled.fused
        self.compositions = Compositions(cast("ResidencyLike", self.residency))
        self.grammars = assembled.grammars
        self.merging = assembled.merging
        if start:
            self.engine.start()
        self._count = 0

    def submit(
        self,
        prompt_ids: Sequence[int],
        adapter: str = "",
        *,
        index: int = 0,
        request_id: str = "",
        deadline_s: float | None = None,
        labels: tuple[tuple[int, ...], ...] = (),
        weights: Mapping[str, float] | None = None,
        execution: Execution = "batched",
        pooling: Pooling | None = None,
        salt: str = "",
        **sampling: Any,
    ) -> str:
        self._count += 1
        request_id = request_id or f"r{self._count}"
        constraint = sampling.get("constraint")
        grammar = None if constraint is None else self.grammars.submit(constraint).result()
        lease: Any = BaseLease()
        start = 0
        if adapter:
            resolved = self.registry.resolve(adapter)
            invocation = self.registry.manifest(resolved).method.invocation_tokens
            found = active_from(prompt_ids, invocation)
            assert found is not None, "the service refuses prompts without the invocation"
            start = found
            lease = self.residency.acquire(resolved)
            if self.merging is not None:
                lease = self.merging.hold(resolved, lease, execution)
        if weights:
            lease = self.compose(weights)
        self.engine.submit(
            Request(
                request_id=request_id,
                index=index,
                prompt_ids=list(prompt_ids),
                sampling=Sampling(**{"max_tokens": 12, **sampling}),
                lease=lease,
                labels=labels,
                pooling=pooling,
                grammar=grammar,
                deadline_s=deadline_s,
                active_from=start,
                execution=execution,
                salt=salt,
            )
        )
        return request_id

    def compose(self, weights: Mapping[str, float]) -> ComposedLease:
        """Hold the adapters of these names together."""
        found = {name: self.registry.resolve(name) for name in weights}
        by_digest = {found[name].digest: weight for name, weight in weights.items()}
        return self.compositions.acquire(
            composition_digest(by_digest.items()), {r.digest: r for r in found.values()}, by_digest
        )

    def close(self) -> None:
        self.engine.shutdown()
        if self.merging is not None:
            self.merging.close()
        self.residency.close()
        self.grammars.close()


def registry_of(
    root: Path, base: Path, adapters: Mapping[str, Path], *, aliases: Sequence[str] = ()
) -> Registry:
    """Make a registry in ``root/store`` with these PEFT folders, by name, each under these aliases."""
    registry = Registry.open(root / "store", create=True)
    card = BaseCard.from_folder(base)
    for name, folder in adapters.items():
        registry.push(folder, name, base=card, aliases=aliases)
    return registry


@pytest.fixture(scope="session")
def tiny_registry(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    return registry_of(tmp_path_factory.mktemp("registry"), tiny_base, tiny_adapters)


@contextmanager
def worlds(base: Path, registry: Registry) -> Iterator[Callable[..., EngineWorld]]:
    """Give what makes engines, over this base and registry or others, and close all of them."""
    made: list[EngineWorld] = []

    def make(base: Path = base, *, registry: Registry = registry, **options: Any) -> EngineWorld:
        made.append(EngineWorld(base, registry, **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def make_world(tiny_base: Path, tiny_registry: Registry) -> Iterator[Callable[..., EngineWorld]]:
    with worlds(tiny_base, tiny_registry) as make:
        yield make
