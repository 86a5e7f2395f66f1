"""The door's backend: registry and prompts here, the engine's ports on the other side of a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lorary.server.apart.far import (
    FarCompositions,
    FarEngine,
    FarGrammars,
    FarMerging,
    FarResidency,
)
from lorary.server.apart.process import EngineProcess
from lorary.server.build import Backend, open_registry

if TYPE_CHECKING:
    from lorary.server.config import ServerConfig
    from lorary.server.ports import Deliver, Observer, RegistryLike


def build_apart(config: ServerConfig, *, deliver: Deliver, observer: Observer) -> Backend:
    """Start the engine's process and wait until it is built; takes as long as the load.

    Raises:
        LoraryError: as ``build_backend``, whichever process it was raised in.
        EngineFailed: the process ended before it was ready.
    """
    registry = open_registry(config)
    process = EngineProcess(config, deliver=deliver, observer=observer)
    try:
        # While the other process builds. The base is looked for when it has: finding may convert it.
        from lorary.bases import PromptBuilder, find_base
        from lorary.bases.load import load_tokenizer

        ready = process.wait_ready()
        tokenizer = load_tokenizer(find_base(config.base))
    except BaseException:
        process.kill()
        raise
    return Backend(
        engine=FarEngine(process),
        residency=FarResidency(process),
        compositions=FarCompositions(process),
        registry=cast("RegistryLike", registry),
        prompts=PromptBuilder(tokenizer),
        grammars=FarGrammars(process),
        decode=lambda ids: str(tokenizer.decode(ids)),
        facts=ready.facts,
        limits=ready.limits,
        close=process.close,
        merging=FarMerging(process) if ready.can_merge else None,
        engine_pid=process.pid,
    )
