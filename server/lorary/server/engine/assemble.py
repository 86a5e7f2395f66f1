"""Put an engine together: model, layers, pool, cache, scheduler, loop."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lorary.bases.golden import GoldenWeights
from lorary.errors import ConfigError, NotMergeable
from lorary.registry.layouts import Layouts
from lorary.server.adapters.columns import column_scales
from lorary.server.adapters.layers import LoraModel
from lorary.server.adapters.loader import ReadBuffer, TensorBytes, load_adapter
from lorary.server.adapters.merged import MergedWeights, fold, merged_bytes
from lorary.server.adapters.merging import Merging
from lorary.server.adapters.probe_runs import ProbeRuns
from lorary.server.adapters.residency import BaseLease, Residency
from lorary.server.adapters.transfer import Transfers
from lorary.server.adapters.verification import Verifier
from lorary.server.engine.batch import build_batch
from lorary.server.engine.blocks import blocks_for
from lorary.server.engine.constraints import Compiler
from lorary.server.engine.engine import Engine
from lorary.server.engine.fair_queue import PATIENCE_S
from lorary.server.engine.kv_cache import KVCache, KVShape
from lorary.server.engine.memory import available_bytes, is_short, plan_blocks
from lorary.server.engine.request import Request, Sampling
from lorary.server.engine.runner import Runner
from lorary.server.engine.scheduler import Scheduled, Scheduler
from lorary.server.engine.sequence import Sequence
from lorary.server.engine.static_step import StaticSteps
from lorary.server.interpreter import name_thread
from lorary.server.maths_threads import use_threads
from lorary.server.native import library as native
from lorary.server.native.decoder import FusedModel, describe, kept_dtype
from lorary.server.startup import Startup

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from lorary.registry import BaseCard, Registry, Resolved
    from lorary.server.adapters.loader import LoadedAdapter
    from lorary.server.adapters.merging import MergeObserver
    from lorary.server.adapters.residency import ResidencyObserver
    from lorary.server.adapters.rounding import Storage
    from lorary.server.adapters.verification import VerificationObserver
    from lorary.server.engine.engine import EngineObserver
    from lorary.server.engine.request import Output
    from lorary.server.native.families import ModelForm

logger = logging.getLogger(__name__)

CPU_BESIDE = 128
"""Prompt tokens beside answers on a CPU (docs/benchmarks.md, prompts beside answers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine may use.

    Attributes:
        max_batch: sequences in one step.
        max_context: most tokens of prompt and answer together.
        prefill_budget: most prompt tokens in one step.
        prefill_beside: most of them in a step in which answers go on; 0: as many; None: ``CPU_BESIDE`` on a
            CPU, and as many elsewhere.
        max_waiting: most requests in the queue.
        max_adapters: most adapters that running sequences may have between them; 0 sets no cap.
        patience_s: seconds after which who was passed over is owed a place.
        max_rank: largest rank of an adapter.
        adapter_memory_bytes: bytes for adapters on the device.
        host_adapter_memory_bytes: bytes for copies of adapters in host memory; 0 keeps none.
        failed_load_ttl_s: seconds for which a load that failed is not tried again.
        adapter_dtype: what adapters are kept in there; "auto" is what they are multiplied in.
        kv_memory_bytes: bytes for keys and values; 0 takes what ``max_batch`` sequences of
            ``max_context`` tokens need, but no more than ``memory_fraction``.
        memory_fraction: share of the memory left by base and adapters that keys and values may take.
        prefix_cache: do not read again what an earlier prompt with the same adapter began with.
        shared_layers: how many layers, from the first on, the base and all adapters that leave them alone
            share in the prefix cache; 0 shares none.
        draft_rows: rows of a step up to which tokens are guessed from the text so far (prompt lookup);
            0 guesses nothing.
        pin_threads: give every CPU thread of the engine a core of its own.
        verify: replay the golden probes of what is loaded: "off", "warn" or "enforce".
        cuda_graphs: run decode steps in fixed shapes, captured as CUDA graphs at start.
        quantization: what the base is kept in, formats of a plan joined by ``+``.
        merge_memory_bytes: for the merged copy of one adapter's layers; 0 merges nothing.
        merge_share: part of the generated tokens from which on an adapter is merged unasked; 0 never is.
    """

    max_batch: int = 32
    max_context: int = 2048
    prefill_budget: int = 512
    prefill_beside: int | None = None
    max_waiting: int = 1024
    max_adapters: int = 0
    patience_s: float = PATIENCE_S
    max_rank: int = 128
    adapter_memory_bytes: int = 1 << 30
    host_adapter_memory_bytes: int = 0
    failed_load_ttl_s: float = 5.0
    adapter_dtype: Storage = "auto"
    kv_memory_bytes: int = 0
    memory_fraction: float = 0.8
    prefix_cache: bool = True
    shared_layers: int = 0
    draft_rows: int = 8
    pin_threads: bool = True
    cuda_graphs: bool = False
    verify: Literal["off", "warn", "enforce"] = "off"
    quantization: str = "none"
    merge_memory_bytes: int = 0
    merge_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Assembled:
    """An engine, not yet started, and its adapters.

    ``fused`` is None when this base's layers run operator by operator, ``merging`` when nothing is merged.
    """

    engine: Engine
    residency: Residency
    lora: LoraModel
    fused: FusedModel | None
    grammars: Compiler
    merging: Merging | None


def assemble(
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    card: BaseCard,
    registry: Registry,
    limits: EngineLimits,
    dtype: torch.dtype,
    deliver: Callable[[list[Output]], None],
    int8: bool | Collection[str] = False,
    startup: Startup | None = None,
    engine_observer: EngineObserver | None = None,
    residency_observer: ResidencyObserver | None = None,
    verification_observer: VerificationObserver | None = None,
    merge_observer: MergeObserver | None = None,
    base_folder: Path | None = None,
) -> Assembled:
    """Build an engine around a loaded model; the model is changed in place.

    With ``int8`` the weights of an unquantized model, or of its layers of these names, are rounded to 8
    bits for the native kernels. ``startup`` shows the phases. ``base_folder`` is where the model was loaded
    from: adapters are folded into what is read there.

    Raises:
        ConfigError: the model cannot be served: no fast tokenizer, a cache that is not keys and
            values, attention that does not go through transformers' interface, no memory, layers that cannot
            be shared, CUDA graphs without a GPU.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; streaming text needs one. "
            "Convert it, or choose another base."
        )
    device = next(model.parameters()).device
    model.eval()
    startup = startup or Startup()
    with startup.phase("packing weights") as progress:
        lora = LoraModel(
            model,
            memory_bytes=limits.adapter_memory_bytes,
            dtype=dtype,
            int8=int8,
            storage=limits.adapter_dtype,
            progress=progress,
        )
    shape = KVShape.from_config(model.config, limits.max_context, limits.shared_layers)
    kernels = lora.kernels
    form: ModelForm | str = "there are no native kernels"
    if kernels is not None:
        form = describe(model, lora.groups, kernels, dtype)
    if limits.shared_layers:
        _check_can_share(model, form, prefix_cache=limits.prefix_cache)
    kv_dtype = dtype if isinstance(form, str) else kept_dtype(dtype)
    num_blocks = _plan_blocks(model, lora, shape, limits, kv_dtype, device)
    cache = KVCache(
        shape,
        num_slots=limits.max_batch,
        num_blocks=num_blocks,
        dtype=kv_dtype,
        device=device,
        has_scratch=limits.cuda_graphs,
        has_triton=lora.has_triton,
    )
    fused = None
    if kernels is not None and not isinstance(form, str):
        fused = FusedModel(form, cache, kernels, dtype)
    elif device.type == "cpu":
        logger.info(
            "%s runs operator by operator, slower than a base whose layers run natively: %s",
            type(model).__name__,
            form,
        )
    runner = Runner(model, fused)
    with startup.phase("warming up"):
        _warm_up(runner, cache, lora.long_from)
    if limits.cuda_graphs:
        with startup.phase("capturing decode steps") as progress:
            runner.static = StaticSteps(
                model, cache, max_rows=limits.max_batch, max_rank=limits.max_rank
            )
            runner.static.prepare(progress)
    probes = ProbeRuns(
        manifest=registry.manifest,
        kinds=_kinds(limits, dtype, lora),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        max_context=limits.max_context,
        deliver=deliver,
    )
    verifier: Verifier | None = None
    if limits.verify != "off":
        verifier = Verifier(mode=limits.verify, runs=probes, observer=verification_observer)
    modules = frozenset(name for group in lora.groups for name in group.spec.modules)
    layouts = Layouts()

    def read(resolved: Resolved, buffer: ReadBuffer | None = None) -> LoadedAdapter:
        file = TensorBytes(lora.kernels, buffer)
        return load_adapter(
            registry.fetch(resolved, reader=file.hash),
            card,
            modules=modules,
            max_rank=limits.max_rank,
            file=file,
            layouts=layouts,
        )

    merging: Merging | None = None
    if limits.merge_memory_bytes and base_folder is not None:
        merging = Merging(
            build=_Merger(read, lora, fused, base_folder, limits.merge_memory_bytes),
            runs=probes,
            wake=lambda: engine.wake(),
            share=limits.merge_share,
            is_short=functools.partial(is_short, device),
            observer=merge_observer,
        )
    engine = Engine(
        runner=runner,
        cache=cache,
        scheduler=Scheduler(
            max_batch=limits.max_batch,
            prefill_budget=limits.prefill_budget,
            prefill_beside=_beside(limits, device),
            max_waiting=limits.max_waiting,
            max_adapters=limits.max_adapters,
            patience_s=limits.patience_s,
        ),
        tokenizer=tokenizer,
        eos_ids=end_tokens(model, tokenizer),
        long_from=lora.long_from,
        deliver=probes.deliver,
        prefix_cache=limits.prefix_cache,
        draft_rows=limits.draft_rows,
        merging=merging,
        observer=engine_observer,
        on_thread_start=_thread_setup(device, pin=limits.pin_threads),
    )
    probes.attach(functools.partial(engine.submit, is_own=True))
    residency = Residency(
        pool=lora.pool,
        load=functools.partial(read, buffer=ReadBuffer()),
        scale_columns=functools.partial(column_scales, lora.groups),
        on_change=engine.wake,
        observer=residency_observer,
        verifier=verifier,
        host_memory_bytes=limits.host_adapter_memory_bytes,
        failed_load_ttl_s=limits.failed_load_ttl_s,
    )
    grammars = Compiler(
        tokenizer,
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        eos_ids=end_tokens(model, tokenizer),
    )
    return Assembled(engine, residency, lora, fused, grammars, merging)


def _check_can_share(model: Any, form: ModelForm | str, *, prefix_cache: bool) -> None:
    """Refuse ``shared_layers`` where it would do nothing; ``form`` is the model's, or why it has none.

    Raises:
        ConfigError: nothing is remembered, or the model's forward cannot begin in the middle.
    """
    if not prefix_cache:
        raise ConfigError(
            "--shared-layers shares what the prefix cache keeps, and that is off; leave --no-prefix-cache or "
            "--shared-layers out"
        )
    if isinstance(form, str):
        raise ConfigError(
            f"--shared-layers needs layers that run natively, for no other forward can begin in the middle, and "
            f"{type(model).__name__} runs operator by operator here: {form}. Leave it out, or serve a base of a "
            "family that runs natively, on a CPU, unquantized or int8 (docs/architecture.md)"
        )


class _Merger:
    """Builds the merged weights of a version; on the merging thread."""

    def __init__(
        self,
        load: Callable[[Resolved], LoadedAdapter],
        lora: LoraModel,
        fused: FusedModel | None,
        folder: Path,
        memory_bytes: int,
    ) -> None:
        self._load = load
        self._lora = lora
        self._fused = fused
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._transfers = Transfers(lora.pool.device)

    def __call__(self, resolved: Resolved) -> MergedWeights:
        adapter = self._load(resolved)
        needed = merged_bytes(self._lora.groups, adapter.tensors)
        if needed > self._memory_bytes:
            raise NotMergeable(
                f"'{resolved.name}@{resolved.version}' changes layers whose weights take {needed} bytes once "
                f"more, and this server gives merged ones {self._memory_bytes}. Raise --merge-memory, or use "
                "execution BATCHED."
            )
        with self._transfers.side(), GoldenWeights(self._folder) as golden:
            in_place = fold(self._lora.groups, adapter, golden, self._lora.kernels)
        return MergedWeights(in_place, self._fused)


def _kinds(limits: EngineLimits, dtype: torch.dtype, lora: LoraModel) -> list[str]:
    """Return what this engine rounds to: the kinds of ``probes.divergence_limit``."""
    storage = lora.pool.storage
    kept = "8-bit adapters" if storage.itemsize == 1 else str(storage).removeprefix("torch.")
    return [*limits.quantization.split("+"), str(dtype).removeprefix("torch."), kept]


def _thread_setup(device: torch.device, *, pin: bool) -> Callable[[], None]:
    """Return what the engine thread does first: take this thread's number of threads, and cores.

    torch keeps that number per thread, so a new thread must be told (``use_threads``). Pinned, because a scheduler
    that puts two of the team's threads on one core makes every OpenMP barrier wait whole time
    slices; only where the team is as wide as the process may be, for else somebody else's plan
    holds.
    """
    count = torch.get_num_threads()
    cpus = sorted(os.sched_getaffinity(0))
    kernels = native.load() if device.type == "cpu" else None

    def set_up() -> None:
        name_thread("engine")
        use_threads(count)
        if pin and isinstance(kernels, native.NativeKernels) and 1 < count == len(cpus):
            pinned = kernels.pin_team(cpus)
            if pinned < count:
                logger.warning("%d of %d engine threads could not be pinned", count - pinned, count)

    return set_up


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the generation config's and the tokenizer's."""
    ids: set[int] = set()
    config = getattr(model, "generation_config", None)
    for value in (getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(v) for v in value)
    return frozenset(ids)


def _plan_blocks(
    model: Any,
    lora: LoraModel,
    shape: KVShape,
    limits: EngineLimits,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return how many blocks of keys and values there will be."""
    promised = limits.merge_memory_bytes
    if device.type == "cuda":
        promised += _step_bytes(model, lora, shape, limits, dtype, device)
    else:
        # The pool's memory is the system's until adapters are written into it.
        promised += lora.pool.memory_bytes
    return plan_blocks(
        shape,
        dtype,
        max_batch=limits.max_batch,
        kv_memory_bytes=limits.kv_memory_bytes,
        memory_fraction=limits.memory_fraction,
        available_bytes=available_bytes(device, promised=promised),
    )


def _beside(limits: EngineLimits, device: torch.device) -> int:
    """Return the most prompt tokens in a step in which answers go on; 0: as many as in any."""
    if limits.prefill_beside is not None:
        return limits.prefill_beside
    return CPU_BESIDE if device.type == "cpu" else 0


def _step_bytes(
    model: Any,
    lora: LoraModel,
    shape: KVShape,
    limits: EngineLimits,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return the bytes of tensors that the largest step needs beside weights and cache, by making it."""
    length = min(limits.prefill_budget, shape.context - 1)
    cache = KVCache(
        shape,
        num_slots=1,
        num_blocks=blocks_for(length + 1),
        dtype=dtype,
        device=device,
        has_triton=lora.has_triton,
    )
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _trial(Runner(model), cache, lora.long_from, length)
    return torch.cuda.max_memory_allocated(device) - before


def _warm_up(runner: Runner, cache: KVCache, long_from: int) -> None:
    """Run a prompt and a decode step, so that what this base cannot do shows at start-up."""
    try:
        logits = _trial(runner, cache, long_from, 2)
    except NotImplementedError as error:
        raise ConfigError(f"this base needs {error}, which Lorary cannot serve yet") from error
    if not torch.isfinite(logits).all():
        raise ConfigError(
            "the base's logits are not finite in this dtype; try --dtype float32, or check the base"
        )


@torch.inference_mode()
def _trial(runner: Runner, cache: KVCache, long_from: int, length: int) -> torch.Tensor:
    """Read a prompt of ``length`` tokens and decode one; return that one's logits."""
    request = Request(
        request_id="trial",
        prompt_ids=[0] * length,
        sampling=Sampling(max_tokens=1),
        lease=BaseLease(),
    )
    blocks = list(range(blocks_for(length + 1)))
    sequence = Sequence(
        request=request, token_ids=[0] * length, slot=cache.take_slot(blocks), blocks=blocks
    )
    try:
        for scheduled in (Scheduled((), ((sequence, length),)), Scheduled((sequence,), ())):
            batch = build_batch(scheduled, cache, device=cache.k.device, long_from=long_from)
            batch.is_greedy = False
            found = runner.forward(batch)
            assert isinstance(found, torch.Tensor), "tokens of a step that is not greedy"
            logits = found
            sequence.num_computed += batch.advanced[0][1]
            sequence.token_ids.append(0)
    finally:
        cache.release_slot(sequence.slot)
    return logits
