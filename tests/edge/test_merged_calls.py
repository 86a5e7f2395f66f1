"""How an adapter takes part in a call: what is asked, refused, proved and shown, over real sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lorary.client import AsyncClient
from lorary.errors import InvalidRequest, LoraryError, NotMergeable
from lorary.server.adapters.merging import MergedAdapter, MergeLease
from lorary.server.adapters.probe_runs import Verdict
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import digest_of, serving

if TYPE_CHECKING:
    from tests.edge.fakes import Edge

ALPHA = digest_of("alpha")


@dataclass
class FakeMerging:
    """Holds whatever is asked for, or refuses it."""

    refusal: LoraryError | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def hold(self, resolved: Any, lease: Any, execution: str) -> Any:
        self.asked.append((resolved.name, execution))
        if self.refusal is not None:
            raise self.refusal
        return lease if execution == "batched" else MergeLease(self, resolved, lease, None)  # type: ignore[arg-type]

    def drop(self, digest: str) -> None:
        self.dropped.append(digest)

    def merged(self) -> MergedAdapter:
        verdict = Verdict(state="passed", divergence=0.25, limit=0.5, num_probes=1)
        return MergedAdapter(
            digest=ALPHA, state="ready", num_bytes=2**20, num_holders=3, verdict=verdict
        )


async def test_the_execution_reaches_the_engine_and_the_receipt_tells_it() -> None:
    merging = FakeMerging()
    async with serving(merging=merging) as edge, AsyncClient(edge.address) as client:
        for execution, is_merged in (("merged", True), ("batched", False), ("auto", False)):
            answer = await client.generate(
                prompt="2",
                adapter="alpha",
                execution=execution,  # type: ignore[arg-type]
                max_tokens=1,
            )
            assert answer.receipt.is_merged == is_merged
        scored = await client.classify(prompt="2", adapter="beta", labels=["8"], execution="merged")
        assert scored.receipt.is_merged
        # Nothing to merge: neither is asked for.
        await client.generate(prompt="2", max_tokens=1)
        await client.generate(prompt="2", adapter="alpha", scale=0.5, max_tokens=1)
        assert [r.execution for r in edge.engine.submitted] == [
            *("merged", "batched", "auto", "merged"),
            *("batched", "batched"),
        ]
        assert edge.residency.num_held == 0
    assert merging.asked == [
        *(("alpha", "merged"), ("alpha", "batched"), ("alpha", "auto"), ("beta", "merged"))
    ]


async def test_what_cannot_be_merged_is_refused(edge: Edge) -> None:
    """Before any work where that is known, else by the merging; nothing is held afterwards."""
    async with AsyncClient(edge.address) as client:
        with pytest.raises(NotMergeable, match="--merge-memory"):
            await client.generate(prompt="2", adapter="alpha", execution="merged")
    merging = FakeMerging(refusal=NotMergeable("'alpha@1' is too large to be merged"))
    async with serving(merging=merging) as other, AsyncClient(other.address) as client:
        with pytest.raises(NotMergeable, match="too large"):
            await client.generate(prompt="2", adapter="alpha", execution="merged")
        for options in ({}, {"adapter": "alpha", "scale": 0.5}):
            with pytest.raises(InvalidRequest, match="one adapter with weight 1") as caught:
                await client.generate(prompt="2", execution="merged", **options)  # type: ignore[arg-type]
            assert caught.value.field == "execution"
        request = pb.GenerateRequest(
            adapter="alpha",
            input=pb.Input(prompt="2"),
            execution=9,  # type: ignore[arg-type]
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in other.inference.Generate(request):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert other.residency.num_held == 0
        assert not other.engine.submitted


async def test_control_shows_the_copy_and_unload_drops_it() -> None:
    merging = FakeMerging()
    async with serving(merging=merging) as edge, AsyncClient(edge.address) as client:
        await client.load_adapter("alpha")
        await client.load_adapter("beta")
        shown = {a.name: a for a in await client.list_adapters(resident_only=True)}
        alpha = shown["alpha"]
        assert (alpha.merged, alpha.merged_bytes, alpha.merged_running) == ("ready", 2**20, 3)
        assert alpha.merged_divergence == 0.25
        assert shown["beta"].merged == ""
        await client.unload_adapter("alpha")
    assert merging.dropped == [ALPHA]
