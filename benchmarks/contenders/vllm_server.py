"""vLLM's server on the CPU, with LoRA on, or off for calls of the bare base."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.peer import Peer
from benchmarks.contenders.streaming import HOST, ask_all, free_port, is_healthy
from benchmarks.harness.process_group import ProcessGroup
from benchmarks.harness.threads import all_cores, pinned_cores, plain_environment
from benchmarks.peers.catalog import VLLM
from benchmarks.peers.vllm import preloads
from benchmarks.workload import Call, Trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.bases import Base

# Three processes import torch in turn, and without LoRA it compiles; a busy machine takes minutes.
_START_TIMEOUT_S = 1800.0
_BASE = "base"
_CACHE_GIB = 2
_MAX_CONTEXT = 1024
_MAX_BATCHED_TOKENS = 4096
# What --max-lora-rank may be.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmServer(Peer):
    """``vllm serve``, started anew for every set of adapters, with room for just these.

    Args:
        base: read from its own folder.
        folders: PEFT folders of the adapters by name.
        scratch: where its log goes.
        dtype: of weights and arithmetic.
        max_batch: sequences in a step.
        lora: whether it can serve adapters; off is faster, and answers for the bare base only.
    """

    def __init__(
        self,
        base: Base,
        folders: Mapping[str, Path],
        scratch: Path,
        *,
        dtype: str,
        max_batch: int,
        lora: bool,
    ) -> None:
        super().__init__("vllm" if lora else "vllm-base")
        self._base = base
        self._folders = folders
        self._log = scratch / self.name / "server.log"
        self._dtype = dtype
        self._max_batch = max_batch
        self._lora = lora
        self._port = 0

    def can_answer(self, num_adapters: int) -> bool:
        """Return whether calls for that many adapters can be asked of it."""
        return self._lora or num_adapters == 0

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Stream every answer from the completions endpoint."""
        try:
            return ask_all(
                self._port,
                "/v1/completions",
                calls,
                concurrency=concurrency,
                body=lambda call: request(call, new_tokens),
                take=tokens_of,
            )
        except (OSError, HTTPException) as error:
            raise self._running.failure(f"broke off: {error!r}") from error

    def _start(self, adapters: tuple[str, ...]) -> ProcessGroup:
        self._port = free_port()
        with all_cores():
            server = ProcessGroup(
                self.name,
                self._command(adapters),
                self._log,
                environment={
                    **plain_environment(),
                    "LD_PRELOAD": ":".join(map(str, preloads())),
                    "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
                    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, pinned_cores())),
                    "VLLM_NO_USAGE_STATS": "1",
                },
            )
        server.wait_until(lambda: is_healthy(self._port), timeout_s=_START_TIMEOUT_S)
        return server

    def _command(self, adapters: tuple[str, ...]) -> list[str | Path]:
        options = {
            "model": self._base.path,
            "served-model-name": _BASE,
            "host": HOST,
            "port": self._port,
            "dtype": self._dtype,
            "max-model-len": _MAX_CONTEXT,
            "max-num-seqs": self._max_batch,
            "max-num-batched-tokens": _MAX_BATCHED_TOKENS,
        }
        flags = ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if self._lora:
            # One slot at least: LoRA that is on and unused is what K = 0 measures.
            options["max-loras"] = max(1, min(len(adapters), self._max_batch))
            options["max-cpu-loras"] = max(1, len(adapters))
            options["max-lora-rank"] = max_rank([self._folders[name] for name in adapters])
            flags.append("--enable-lora")
        if adapters:
            flags += ["--lora-modules", *(f"{name}={self._folders[name]}" for name in adapters)]
        parts = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        return [VLLM.python, "-m", "vllm.entrypoints.openai.api_server", *parts, *flags]


def max_rank(folders: Sequence[Path]) -> int:
    """Return the least rank vLLM can be set to that holds all of these adapters."""
    ranks = [json.loads((f / "adapter_config.json").read_text())["r"] for f in folders]
    return next(rank for rank in _RANKS if rank >= max(ranks, default=0))


def request(call: Call, new_tokens: int) -> dict[str, Any]:
    """Return the body of a call: an adapter is a model of its own."""
    return {
        "model": call.adapter or _BASE,
        "prompt": list(call.prompt_ids),
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def tokens_of(event: dict[str, Any], _trace: Trace) -> list[int]:
    """Return the tokens that an event brings."""
    return [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
