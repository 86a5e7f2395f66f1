"""Streams of an engine that is quicker than ``--stream-frames``: fewer frames, the same answers, through both doors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest

from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import serving
from tests.edge.test_generate import collect, request

if TYPE_CHECKING:
    from tests.edge.fakes import Edge

TOKENS = 62


async def warmed(edge: Edge, frames_are_joined: bool) -> None:
    """Ask until the engine's pace is known."""
    for _ in range(200):
        await collect(edge.inference.Generate(request()))
        if (edge.calls.steps_per_frame > 1) == frames_are_joined:
            return
    pytest.fail("the engine's pace was never seen")


async def test_joined_frames_say_what_single_ones_say() -> None:
    async with serving(stream_frames=1, http_port=0) as edge:
        await warmed(edge, True)
        events = await collect(edge.inference.Generate(request("beta", max_tokens=TOKENS, n=2)))
        chunks = [e.chunk for e in events if e.HasField("chunk")]
        complete = {e.complete.index: e.complete for e in events if e.HasField("complete")}
        assert len(chunks) < TOKENS
        assert len(chunks[0].token_ids) == 1, "the first token waits for nobody"
        for index in (0, 1):
            own = [c for c in chunks if c.index == index]
            assert sum(len(c.token_ids) for c in own) == TOKENS
            assert "".join(c.text for c in own) == complete[index].text
            ids = [t for c in own for t in c.token_ids]
            assert ids == [8 + 3 * i for i in range(TOKENS)]
            assert complete[index].finish_reason == pb.FINISH_REASON_LENGTH
        body = {"model": "beta", "prompt": "2 5", "max_tokens": TOKENS, "stream": True}
        async with httpx.AsyncClient(base_url=edge.http, timeout=30) as http:
            raw = (await http.post("/v1/completions", json=body)).text
        lines = [line.removeprefix("data: ") for line in raw.splitlines() if line]
        assert lines.pop() == "[DONE]"
        texts = [json.loads(line)["choices"][0]["text"] for line in lines]
        assert "".join(texts) == complete[0].text
        assert len(texts) < TOKENS
        assert edge.metrics.registry.get_sample_value("lorary_steps_per_frame") == (
            edge.calls.steps_per_frame
        )


@pytest.mark.parametrize("frames", [0, 1_000_000])
async def test_below_the_limit_a_token_is_a_frame(frames: int) -> None:
    async with serving(stream_frames=frames) as edge:
        await warmed(edge, False)
        edge.engine.gate.clear()
        call = edge.inference.Generate(request("beta", max_tokens=5))
        sizes = []
        for n in range(1, 6):
            edge.engine.hold_at(n)
            edge.engine.gate.set()
            event: Any = await call.read()
            sizes.append(len(event.chunk.token_ids))
        assert sizes == [1] * 5
        assert (await call.read()).complete.usage.completion_tokens == 5
