"""OpenVINO GenAI's continuous batching, in a process of its own environment."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.peer import Peer
from benchmarks.harness.process_group import ProcessGroup
from benchmarks.harness.threads import all_cores, pinned_cores, plain_environment
from benchmarks.peers import openvino_install, openvino_worker
from benchmarks.peers.catalog import OPENVINO
from benchmarks.workload import Call, Trace
from lorary.bases.once import build_once

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.bases import Base

_CACHE_GIB = 2


class OpenvinoGenai(Peer):
    """A pipeline that is exported once and started anew for every set of adapters.

    Args:
        base: exported into the peer's folder the first time.
        folders: PEFT folders of the adapters by name.
        scratch: where its log goes.
        weights: ``fp16`` or ``int8``.
        dtype: of arithmetic; bfloat16 is the processor's own choice.
        max_batch: sequences in a step.
    """

    def __init__(
        self,
        base: Base,
        folders: Mapping[str, Path],
        scratch: Path,
        *,
        weights: str,
        dtype: str,
        max_batch: int,
    ) -> None:
        super().__init__(f"openvino-{weights}")
        self._folders = folders
        self._log = scratch / self.name / "worker.log"
        self._dtype = dtype
        self._max_batch = max_batch
        self._num_sent = 0
        self._model = OPENVINO.folder / "bases" / f"{base.path.name}-{weights}"
        build_once(self._model, lambda draft: _export(base.path, weights, draft))

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Keep ``concurrency`` calls in flight: the next is sent when one has ended."""
        process = self._running
        traces: dict[int, Trace] = {}
        waiting = iter(calls)

        def send(call: Call) -> None:
            self._num_sent += 1
            content = {
                "id": self._num_sent,
                "prompt": call.prompt_ids,
                "adapter": call.adapter,
                "max_tokens": new_tokens,
            }
            traces[self._num_sent] = Trace(time.perf_counter())
            process.stdin.write(json.dumps(content).encode() + b"\n")
            process.stdin.flush()

        try:
            for _, call in zip(range(concurrency), waiting, strict=False):
                send(call)
            num_open = len(traces)
            while num_open:
                line = process.stdout.readline()
                at_s = time.perf_counter()
                if not line:
                    raise process.failure("broke off")
                event = json.loads(line)
                trace = traces[event["id"]]
                trace.token_ids += event["tokens"]
                trace.token_s += [at_s] * len(event["tokens"])
                if event["done"]:
                    num_open -= 1
                    for call in waiting:
                        send(call)
                        num_open += 1
                        break
        except BrokenPipeError as error:
            raise process.failure("broke off") from error
        return list(traces.values())

    def _start(self, adapters: tuple[str, ...]) -> ProcessGroup:
        properties: dict[str, Any] = {
            "ENABLE_CPU_PINNING": True,
            "INFERENCE_NUM_THREADS": len(pinned_cores()),
        }
        if self._dtype == "float32":
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        settings = {
            "adapters": {
                name: str(self._folders[name] / "adapter_model.safetensors") for name in adapters
            },
            "max_batch": self._max_batch,
            "cache_gib": _CACHE_GIB,
            "properties": properties,
        }
        worker = Path(openvino_worker.__file__)
        with all_cores():
            process = ProcessGroup(
                self.name,
                [OPENVINO.python, worker, self._model, json.dumps(settings)],
                self._log,
                environment=plain_environment(),
                speaks=True,
            )
        try:
            line = process.stdout.readline()
            if not line:
                raise process.failure("did not start")
        except BaseException:
            process.stop()
            raise
        assert json.loads(line) == {"ready": True}
        return process


def _export(base: Path, weights: str, folder: Path) -> None:
    """Export a base with OpenVINO's own exporter.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [str(openvino_install.exporter()), "export", "openvino", "--model", str(base)]
    command += ["--task", "text-generation-with-past", "--weight-format", weights, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=plain_environment()
    )
    if done.returncode:
        raise RuntimeError(
            f"OpenVINO's exporter failed with exit code {done.returncode}:\n{done.stderr[-2000:]}"
        )
