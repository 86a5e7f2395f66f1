"""From a configuration to the parts behind the edge: registry, base, adapters, engine."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lorary.errors import ConfigError
from lorary.server.answers import ServerFacts
from lorary.server.validate import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lorary.bases import Base
    from lorary.bases.load import Quantization
    from lorary.registry import Registry
    from lorary.server.config import ServerConfig
    from lorary.server.engine.assemble import Assembled
    from lorary.server.ports import (
        Deliver,
        EngineLike,
        Observer,
        PromptsLike,
        RegistryLike,
        ResidencyLike,
    )

log = logging.getLogger("lorary.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What a ``Server`` puts its edge around.

    Attributes:
        decode: text of token ids, for ``Tokenize``.
        close: stops engine and residency; may block for the length of a step.
    """

    engine: EngineLike
    residency: ResidencyLike
    registry: RegistryLike
    prompts: PromptsLike
    decode: Callable[[list[int]], str]
    facts: ServerFacts
    limits: Limits
    close: Callable[[], None]


def build_backend(config: ServerConfig, *, deliver: Deliver, observer: Observer) -> Backend:
    """Open the registry, load the base, and put an engine around it; takes as long as the load.

    Raises:
        ConfigError: the base cannot be served as configured.
        StorageError: the registry's folder is missing or cannot be read.
        BaseNotFound: there is no such base.
        MissingDependency: an asset package or a library is missing.
    """
    from lorary.registry import Registry

    registry = Registry.open(config.registry, watch=True)

    # Later than what fails quickly: torch takes seconds to import.
    import torch

    from lorary.bases import PromptBuilder, find_base
    from lorary.bases.load import default_dtype, load_model, load_tokenizer

    device = _device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    quantization = _quantization(config.quantize, device)
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    base = find_base(config.base, progress=log.info)
    log.info("loading '%s' (%s, %s) on %s", base.name, quantization, dtype, device)
    tokenizer = load_tokenizer(base)
    int8 = quantization == "int8" and _has_native_int8(device)
    model = load_model(
        base, quantization="none" if int8 else quantization, dtype=dtype, device=device
    )
    limits = Limits(
        max_context=_context(config.max_context, model.config),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
    )
    built = build_engine(
        config,
        base,
        registry,
        model,
        tokenizer,
        limits,
        dtype,
        int8=int8,
        deliver=deliver,
        observer=observer,
    )

    def close() -> None:
        built.engine.shutdown()
        built.residency.close()

    return Backend(
        engine=built.engine,
        residency=built.residency,
        registry=cast("RegistryLike", registry),
        prompts=PromptBuilder(tokenizer),
        decode=lambda ids: str(tokenizer.decode(ids)),
        facts=ServerFacts(
            version=importlib.metadata.version("lorary"),
            base=base.name,
            base_fingerprint=base.card.fingerprint,
            quantization=quantization,
            device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            dtype=str(dtype).removeprefix("torch."),
            max_context=limits.max_context,
            max_batch=config.max_batch,
            max_rank=config.max_rank,
            adapter_memory_bytes=config.adapter_memory,
        ),
        limits=limits,
        close=close,
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
    int8: bool,
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
            max_waiting=config.max_waiting,
            max_rank=config.max_rank,
            adapter_memory_bytes=config.adapter_memory,
            prefix_cache=config.prefix_cache,
            draft_rows=config.draft_rows,
            pin_threads=config.pin_threads,
        ),
        dtype=dtype,
        int8=int8,
        deliver=deliver,
        engine_observer=observer,
        residency_observer=observer,
    )


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


def _quantization(asked: str, device: str) -> Quantization:
    if asked != "auto":
        return cast("Quantization", asked)
    return "nf4" if device.startswith("cuda") else "none"


def _has_native_int8(device: str) -> bool:
    """Whether our own kernels round the base to 8 bits; else bitsandbytes does, many times slower."""
    from lorary.server.native import library as native

    if not device.startswith("cpu"):
        return False
    kernels = native.load()
    return isinstance(kernels, native.NativeKernels) and kernels.has_int8


def _context(asked: int, model_config: Any) -> int:
    """Return the context served: what was asked for, cut to what the base was trained on."""
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is None or asked <= longest:
        return asked
    log.warning("--max-context %d is cut to the base's %d", asked, longest)
    return int(longest)
