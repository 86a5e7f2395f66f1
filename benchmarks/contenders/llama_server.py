"""llama.cpp's server: adapters loaded at its start, one configuration of them in a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.peer import Peer
from benchmarks.contenders.streaming import HOST, ask_all, free_port, is_healthy
from benchmarks.harness.process_group import ProcessGroup
from benchmarks.harness.threads import all_cores, pinned_cores, plain_environment
from benchmarks.peers import llama_cpp
from benchmarks.peers.catalog import LLAMA_CPP
from benchmarks.workload import Call, Trace
from lorary.bases.once import build_once

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.bases import Base

_START_TIMEOUT_S = 120.0
_OUTTYPES = {"bfloat16": "bf16", "float32": "f32"}
_CONTEXT_STEP = 256
WITHHELD = -1
"""A token whose id the stream does not tell, because its bytes end within a character."""


class LlamaServer(Peer):
    """``llama-server``, started anew for every set of adapters: it loads none later."""

    def __init__(
        self,
        base: Base,
        folders: Mapping[str, Path],
        scratch: Path,
        *,
        dtype: str,
        max_batch: int,
        max_tokens: int,
    ) -> None:
        super().__init__("llama.cpp")
        self._scratch = scratch / self.name
        self._scratch.mkdir()
        outtype = _OUTTYPES[dtype]
        self._model = LLAMA_CPP.folder / "bases" / f"{base.path.name}-{outtype}" / "model.gguf"
        build_once(
            self._model.parent,
            lambda draft: _convert(
                "convert_hf_to_gguf.py",
                [[base.path, "--outtype", outtype, "--outfile", draft / self._model.name]],
            ),
        )
        self._files = {name: self._scratch / f"{name}.gguf" for name in folders}
        _convert(
            "convert_lora_to_gguf.py",
            [
                [folder, "--base", base.path, "--outtype", outtype, "--outfile", self._files[name]]
                for name, folder in folders.items()
            ],
        )
        self._max_batch = max_batch
        # Every slot has its own part of the context, in steps of this size.
        self._slot_tokens = -(-max_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
        self._port = 0

    def _start(self, adapters: tuple[str, ...]) -> ProcessGroup:
        self._port = free_port()
        with all_cores():
            server = ProcessGroup(
                self.name,
                self._command(adapters),
                self._scratch / "server.log",
                environment={
                    **plain_environment(),
                    "OMP_PROC_BIND": "true",
                    "OMP_PLACES": ",".join(f"{{{core}}}" for core in pinned_cores()),
                },
            )
        server.wait_until(lambda: is_healthy(self._port), timeout_s=_START_TIMEOUT_S)
        return server

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Stream every answer from ``/completion``."""
        try:
            return ask_all(
                self._port,
                "/completion",
                calls,
                concurrency=concurrency,
                body=lambda call: request(call, self._loaded, new_tokens),
                take=tokens_of,
            )
        except (OSError, HTTPException) as error:
            raise self._running.failure(f"broke off: {error!r}") from error

    def _command(self, adapters: tuple[str, ...]) -> list[str | Path]:
        threads, slots = str(len(pinned_cores())), self._max_batch
        command: list[str | Path] = [llama_cpp.server(), "--model", self._model, "--host", HOST]
        command += ["--port", str(self._port), "--threads", threads, "--threads-batch", threads]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * self._slot_tokens)]
        # Nothing is remembered from one prompt to the next.
        command += ["--cache-ram", "0"]
        if adapters:
            files = ",".join(str(self._files[name]) for name in adapters)
            command += ["--lora", files, "--lora-init-without-apply"]
        return command


def request(call: Call, loaded: Sequence[str], new_tokens: int) -> dict[str, Any]:
    """Return the body of a call. An adapter that it does not name would apply, so all are named."""
    return {
        "prompt": list(call.prompt_ids),
        "n_predict": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
        "lora": [
            {"id": index, "scale": 1.0 if name == call.adapter else 0.0}
            for index, name in enumerate(loaded)
        ],
    }


def tokens_of(event: dict[str, Any], trace: Trace) -> list[int]:
    """Return the tokens that an event brings, those it is silent about as ``WITHHELD``."""
    told: list[int] = event["tokens"]
    count = int(event["tokens_predicted"]) - len(trace.token_ids)
    return [WITHHELD] * (count - len(told)) + told


def _convert(script: str, runs: Sequence[Sequence[str | Path]]) -> None:
    """Run one of llama.cpp's converters, several times in one process: its imports take seconds.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    path = llama_cpp.source() / script
    environment = plain_environment()
    inherited = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(
        [*filter(None, inherited), str(llama_cpp.converter_packages())]
    )
    lines = "\n".join("\t".join(map(str, arguments)) for arguments in runs)
    program = (
        "import runpy, sys\n"
        "script = sys.argv[1]\n"
        "sys.path.insert(0, script.rpartition('/')[0])\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    sys.argv = [script, *line.split('\\t')]\n"
        "    runpy.run_path(script, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(
            f"llama.cpp's {script} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}"
        )
