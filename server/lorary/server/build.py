"""From a configuration to the parts behind the edge: registry, base, adapters, engine."""

from __future__ import annotations

import importlib.metadata
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lorary.errors import ConfigError
from lorary.server.adapters.warm_start import StateFolder, WarmStart
from lorary.server.answers import ServerFacts
from lorary.server.startup import Startup
from lorary.server.validate import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

    from lorary.bases import Base
    from lorary.bases.load import Quantization
    from lorary.bases.plan import QuantizationPlan
    from lorary.registry import Registry
    from lorary.server.config import ServerConfig
    from lorary.server.engine.assemble import Assembled
    from lorary.server.ports import (
        CompilerLike,
        CompositionsLike,
        Deliver,
        EngineLike,
        MergingLike,
        Observer,
        PromptsLike,
        RegistryLike,
        ResidencyLike,
    )

log = logging.getLogger("lorary.server")

HOST_MEMORY = 4 << 30
"""Host memory for copies of adapters on CUDA: a few hundred of rank 16 for a base of 1 G weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What a ``Server`` puts its edge around.

    Attributes:
        decode: text of token ids, for ``Tokenize``.
        close: stops engine and residency; may block for the length of a step.
        compositions: what holds several versions at once.
        engine_pid: the engine's process, where that is not this one.
    """

    engine: EngineLike
    residency: ResidencyLike
    compositions: CompositionsLike
    registry: RegistryLike
    prompts: PromptsLike
    grammars: CompilerLike
    decode: Callable[[list[int]], str]
    facts: ServerFacts
    limits: Limits
    close: Callable[[], None]
    merging: MergingLike | None = None
    engine_pid: int | None = None


def open_registry(config: ServerConfig) -> Registry:
    """Open the registry that adapters come from.

    Raises:
        StorageError: its folder is missing or cannot be read.
        ConfigError: what is asked of signatures cannot be checked.
    """
    from lorary.registry import Registry
    from lorary.registry.trust import TrustPolicy, key_paths

    trust = TrustPolicy(mode=config.signatures, keys=key_paths(config.trusted_keys or ""))
    return Registry.open(config.registry, watch=True, cache_bytes=config.disk_cache, trust=trust)


def build_backend(
    config: ServerConfig, *, deliver: Deliver, observer: Observer, startup: Startup | None = None
) -> Backend:
    """Open the registry, load the base, and put an engine around it; takes as long as the load.

    With ``--engine-process`` the engine is in another process, which shows the phases; else ``startup`` does.

    Raises:
        ConfigError: the base cannot be served as configured.
        StorageError: the registry's folder is missing or cannot be read.
        BaseNotFound: there is no such base.
        MissingDependency: an asset package or a library is missing.
    """
    if config.engine_process:
        from lorary.server.apart.build import build_apart

        return build_apart(config, deliver=deliver, observer=observer)
    registry = open_registry(config)
    startup = startup or Startup()
    # Before the base is loaded: a folder that another server uses ends the start at once.
    state = None if config.state_dir is None else StateFolder(config.state_dir)

    from lorary.bases.plan import read_plan

    plan = None if config.quantize_plan is None else read_plan(config.quantize_plan)

    # Later than what fails quickly: torch takes seconds to import.
    with startup.phase("importing torch"):
        import torch

        from lorary.bases import PromptBuilder, find_base
        from lorary.bases.load import default_dtype, load_model, load_tokenizer
        from lorary.server.adapters.composed import Compositions

    device = _device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    with startup.phase("finding the base"):
        base = find_base(config.base, progress=log.info)
    native_int8 = False
    if device.startswith("cpu"):
        with startup.phase("compiling kernels"):
            native_int8 = _has_native_int8()
    chosen = choose(base, _quantization(config.quantize, device), plan, native_int8=native_int8)
    log.info("loading '%s' (%s, %s) on %s", base.name, chosen.label, dtype, device)
    with startup.phase("loading weights") as progress:
        tokenizer = load_tokenizer(base)
        model = load_model(
            base, quantization=chosen.by_bases, dtype=dtype, device=device, progress=progress
        )
    limits = Limits(
        max_context=_context(config.max_context, model.config),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        hidden_size=int(model.config.get_text_config().hidden_size),
        max_message=config.max_message,
    )
    built = build_engine(
        config,
        base,
        registry,
        model,
        tokenizer,
        limits,
        dtype,
        int8=chosen.natively,
        quantization=chosen.label,
        startup=startup,
        deliver=deliver,
        observer=observer,
    )

    warm = None if state is None else _warm_start(config, state, built, base, startup)

    def close() -> None:
        built.engine.shutdown()
        if warm is not None:
            warm.close()
        if built.merging is not None:
            built.merging.close()
        built.residency.close()
        built.grammars.close()

    return Backend(
        engine=built.engine,
        residency=built.residency,
        compositions=Compositions(built.residency),
        registry=cast("RegistryLike", registry),
        prompts=PromptBuilder(tokenizer),
        grammars=built.grammars,
        decode=lambda ids: str(tokenizer.decode(ids)),
        facts=ServerFacts(
            version=importlib.metadata.version("lorary"),
            base=base.name,
            base_fingerprint=base.card.fingerprint,
            quantization=chosen.label,
            device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            dtype=str(dtype).removeprefix("torch."),
            max_context=limits.max_context,
            max_batch=config.max_batch,
            max_rank=config.max_rank,
            adapter_memory_bytes=config.adapter_memory,
        ),
        limits=limits,
        close=close,
        merging=built.merging,
    )


def build_engine(
    config: ServerConfig,
    base: Base,
    registry: Registry,
    model: Any,
    tokenizer: Any,
    limits: Limits,
    dtype: torch.dtype,
    *,
    int8: bool | Collection[str],
    quantization: str,
    startup: Startup,
    deliver: Deliver,
    observer: Observer,
) -> Assembled:
    """Put the engine together; it is not started yet."""
    from lorary.server.engine.assemble import EngineLimits, assemble

    return assemble(
        model=model,
        tokenizer=tokenizer,
        card=base.card,
        registry=registry,
        limits=EngineLimits(
            max_batch=config.max_batch,
            max_context=limits.max_context,
            prefill_budget=config.prefill_budget,
            prefill_beside=config.prefill_beside,
            max_waiting=config.max_waiting,
            max_adapters=config.max_adapters_per_step,
            patience_s=config.patience,
            max_rank=config.max_rank,
            adapter_memory_bytes=config.adapter_memory,
            adapter_dtype=config.adapter_dtype,
            host_adapter_memory_bytes=_host_memory(config.host_adapter_memory, model.device.type),
            failed_load_ttl_s=config.failed_load_ttl,
            kv_memory_bytes=config.kv_memory,
            memory_fraction=config.memory_fraction,
            prefix_cache=config.prefix_cache,
            shared_layers=config.shared_layers,
            draft_rows=config.draft_rows,
            pin_threads=config.pin_threads,
            cuda_graphs=config.cuda_graphs,
            verify=config.verify,
            quantization=quantization,
            merge_memory_bytes=config.merge_memory,
            merge_share=config.merge_share,
        ),
        dtype=dtype,
        int8=int8,
        startup=startup,
        deliver=deliver,
        engine_observer=observer,
        residency_observer=observer,
        verification_observer=observer,
        merge_observer=observer,
        base_folder=base.path,
    )


def _warm_start(
    config: ServerConfig, state: StateFolder, built: Assembled, base: Base, startup: Startup
) -> WarmStart:
    """Begin to load what was there before, and wait for it where the configuration says so."""
    warm = WarmStart(state, built.residency, fingerprint=base.card.fingerprint)
    warm.start()
    if config.warm_before_ready:
        with startup.phase("loading the last run's adapters"):
            warm.wait()
    return warm


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except RuntimeError as error:
        raise ConfigError(f"--device is '{asked}'; it is cpu, cuda, cuda:N or auto.") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device is '{asked}'; this server runs on cpu and cuda.")
    return asked


def _host_memory(asked: int | None, device: str) -> int:
    """Return the bytes for copies in host memory.

    On a CPU "device" and host are the same memory, and a byte of pages needs no copy at all.
    """
    if asked is not None:
        return asked
    return HOST_MEMORY if device == "cuda" else 0


def _quantization(asked: str, device: str) -> Quantization:
    if asked != "auto":
        return cast("Quantization", asked)
    return "nf4" if device.startswith("cuda") else "none"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who quantizes what.

    Attributes:
        by_bases: what ``load_model`` is told: for the whole base, or for each layer.
        natively: the linear layers that our own kernels round to 8 bits; True is all of them.
        label: for people and receipts; the formats of a plan joined by ``+``, the commonest first.
    """

    by_bases: Quantization | dict[str, Quantization]
    natively: bool | frozenset[str]
    label: str


def choose(
    base: Base, whole: Quantization, plan: QuantizationPlan | None, *, native_int8: bool
) -> Chosen:
    """Split the work between our own 8-bit kernels, where there are any, and bitsandbytes.

    Raises:
        ConfigError: the plan does not fit this base, or not this device.
    """
    if plan is None:
        is_ours = whole == "int8" and native_int8
        return Chosen("none" if is_ours else whole, is_ours, whole)
    from lorary.server.adapters.layers import check_int8

    formats = plan.resolve(base)
    label = "+".join(name for name, _count in Counter(formats.values()).most_common())
    if not native_int8:
        if {"int8", "nf4"} <= set(formats.values()):
            raise ConfigError(
                "the quantization plan has layers in int8 and in nf4; on this device both are "
                "bitsandbytes', which quantizes a model to one format. Use one of them beside 'none'."
            )
        return Chosen(formats, False, label)
    int8 = frozenset(name for name, kept in formats.items() if kept == "int8")
    check_int8(formats, int8)
    by_bases: dict[str, Quantization] = {
        name: "none" if name in int8 else kept for name, kept in formats.items()
    }
    return Chosen(by_bases, int8, label)


def _has_native_int8() -> bool:
    """Whether our own kernels round the base to 8 bits; else bitsandbytes does, many times slower."""
    from lorary.server.native import library as native

    kernels = native.load()
    return isinstance(kernels, native.NativeKernels) and kernels.has_int8


def _context(asked: int, model_config: Any) -> int:
    """Return the context served: what was asked for, cut to what the base was trained on."""
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is None or asked <= longest:
        return asked
    log.warning("--max-context %d is cut to the base's %d", asked, longest)
    return int(longest)
