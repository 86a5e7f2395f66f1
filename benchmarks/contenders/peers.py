"""Make a peer's contender from its name in the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.catalog import CONTENDERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from benchmarks.plan import Plan
    from benchmarks.workload import Contender
    from lorary.bases import Base


def make_peer(
    name: str, plan: Plan, base: Base, folders: Mapping[str, Path], scratch: Path
) -> Contender:
    """Return a contender that has what it needs converted, and whose process is not started yet.

    Raises:
        KeyError: no peer is called so.
        RuntimeError: the base or an adapter could not be converted for it.
    """
    max_batch = max(plan.concurrency)
    if name == "llama.cpp":
        from benchmarks.contenders.llama_server import LlamaServer

        return LlamaServer(
            base,
            folders,
            scratch,
            dtype=plan.dtype,
            max_batch=max_batch,
            max_tokens=plan.prompt_tokens + plan.longest_answer,
        )
    if name in ("vllm", "vllm-base"):
        from benchmarks.contenders.vllm_server import VllmServer

        return VllmServer(
            base, folders, scratch, dtype=plan.dtype, max_batch=max_batch, lora=name == "vllm"
        )
    weights = {"openvino-fp16": "fp16", "openvino-int8": "int8"}[name]
    from benchmarks.contenders.openvino_genai import OpenvinoGenai

    return OpenvinoGenai(
        base, folders, scratch, weights=weights, dtype=plan.dtype, max_batch=max_batch
    )


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the peers among these contenders, for the record."""
    peers = [CONTENDERS[name] for name in names if name in CONTENDERS]
    return {peer.name: peer.version for peer in peers}


def missing(names: Iterable[str]) -> list[str]:
    """Return the peers that these contenders need and that are not installed."""
    peers = {CONTENDERS[name].name: CONTENDERS[name] for name in names if name in CONTENDERS}
    return [name for name, peer in peers.items() if not peer.is_installed]
