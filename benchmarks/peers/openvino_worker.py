"""OpenVINO GenAI behind two pipes; run by the interpreter of its own environment.

    openvino_worker.py FOLDER SETTINGS

``FOLDER`` is an exported model, ``SETTINGS`` a JSON object: ``adapters`` (name to safetensors file),
``max_batch``, ``cache_gib``, ``properties`` (of the device). After ``{"ready": true}`` on standard output,
lines of standard input are calls, and lines of standard output their tokens as they come:

    {"id": 0, "prompt": [1, 2], "adapter": "a" or null, "max_tokens": 2}
    {"id": 0, "tokens": [5], "done": false}
    {"id": 0, "tokens": [6], "done": true}

The pipeline applies one set of adapters to everything in it, and takes another set only through
``generate()``; with ``add_request()`` the last one would silently apply to all. So calls of one adapter are
answered together, and between adapters one token is generated and thrown away.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections import deque
from typing import Any


class Groups:
    """Calls in order of arrival, of which those of one adapter at a time are let through."""

    def __init__(self) -> None:
        self._waiting: deque[dict[str, Any]] = deque()
        self._adapter: str | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, call: dict[str, Any]) -> None:
        """Put a call at the end of the line."""
        self._waiting.append(call)

    def take(self, *, is_idle: bool) -> tuple[str | None, list[dict[str, Any]]]:
        """Return the adapter to apply and the calls that may start now.

        Args:
            is_idle: nothing is being answered, so that the adapter may change: to that of the call
                which has waited longest.
        """
        if is_idle and self._waiting:
            self._adapter = self._waiting[0]["adapter"]
        let_through = [call for call in self._waiting if call["adapter"] == self._adapter]
        self._waiting = deque(call for call in self._waiting if call["adapter"] != self._adapter)
        return self._adapter, let_through


def main(folder: str, settings: dict[str, Any]) -> None:
    """Answer calls until standard input ends."""
    # What libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    adapters = {name: genai.Adapter(path) for name, path in settings["adapters"].items()}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = settings["cache_gib"]
    scheduler.max_num_seqs = settings["max_batch"]
    scheduler.max_num_batched_tokens = 4096
    scheduler.enable_prefix_caching = False
    properties = dict(settings["properties"])
    if adapters:
        properties["adapters"] = genai.AdapterConfig(list(adapters.values()))
    pipeline = genai.ContinuousBatchingPipeline(
        folder, scheduler_config=scheduler, device="CPU", properties=properties
    )

    def config_of(adapter: str | None, max_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        if adapters:
            chosen = [] if adapter is None else [adapters[adapter]]
            config.adapters = genai.AdapterConfig(chosen)
        return config

    def tensor_of(prompt: list[int]) -> Any:
        return ov.Tensor(np.array([prompt], dtype=np.int64))

    arrived: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            arrived.put(json.loads(line))
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    print(json.dumps({"ready": True}), file=out)

    groups = Groups()
    # An adapter's name, or None for the base; at first nobody knows what applies.
    applied: object = object()
    handles: dict[int, Any] = {}
    while True:
        while not arrived.empty() or not (groups or handles):
            call = arrived.get()
            if call is None:
                return
            groups.add(call)
        adapter, calls = groups.take(is_idle=not handles)
        if adapters and calls and adapter != applied:
            pipeline.generate([tensor_of(calls[0]["prompt"][:1])], [config_of(adapter, 1)])
            applied = adapter
        for call in calls:
            handles[call["id"]] = pipeline.add_request(
                call["id"], tensor_of(call["prompt"]), config_of(adapter, call["max_tokens"])
            )
        pipeline.step()
        for number, handle in list(handles.items()):
            is_done = handle.get_status() != genai.GenerationStatus.RUNNING
            tokens = []
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
            if is_done:
                del handles[number]
            if tokens or is_done:
                line = {"id": number, "tokens": tokens, "done": is_done}
                print(json.dumps(line), file=out)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
