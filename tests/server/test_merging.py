"""Who is merged for its share of the traffic, and when it is let go of: on paper, with a clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from lorary.registry import Resolved
from lorary.server.adapters import merging as module
from lorary.server.adapters.merging import KEEP, LEAST_TOKENS, Merging
from lorary.server.adapters.probe_runs import Probes, Verdict
from lorary.server.adapters.traffic_share import WINDOW_S
from tests.server.on_paper import Clock, FakeLease
from tests.server.test_residency import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.errors import LoraryError

SHARE = 0.8


class FakeWeights:
    num_bytes = 7
    is_freed = False

    def free(self) -> None:
        self.is_freed = True


class FakeRuns:
    """Every version passes."""

    def read(self, resolved: Resolved) -> Probes:
        return Probes(resolved, (), (), 0.0)

    def run(self, *_: object, **__: object) -> Verdict:
        return Verdict(state="passed", num_probes=1)

    def close(self) -> None:
        pass


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.built: list[tuple[str, FakeWeights]] = []
        self.dropped: list[str] = []
        self.refusal: LoraryError | None = None
        self.is_short = False
        self.merging = Merging(
            build=self._build,
            runs=cast("Any", FakeRuns()),
            wake=lambda: None,
            share=SHARE,
            is_short=lambda: self.is_short,
            observer=self,
            clock=self.clock,
        )

    def _build(self, resolved: Resolved) -> Any:
        self.built.append((resolved.name, FakeWeights()))
        return self.built[-1][1]

    def on_merge(self, name: str, seconds: float, error: LoraryError | None) -> None:
        assert error is None

    def on_unmerge(self, cause: str) -> None:
        self.dropped.append(cause)

    def lease(self, name: str) -> Any:
        resolved = Resolved(name=name, version=1, digest=f"sha256:{name}")
        return self.merging.hold(resolved, FakeLease(digest=resolved.digest), "auto")

    def window(self, share: float, *, hot: str = "hot", tokens: int = 1000) -> None:
        """Let a whole window pass in which this part of the tokens was for ``hot``."""
        count = round(share * tokens)
        self.merging.note([self.lease("other")] * (tokens - count))
        self.clock.now += WINDOW_S
        self.merging.note([self.lease(hot)] * count)

    @property
    def state(self) -> str:
        merged = self.merging.merged()
        return "" if merged is None else merged.state


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.merging.close()


def test_a_share_merges_and_a_smaller_one_keeps(world: World) -> None:
    world.window(SHARE - 0.05)
    world.window(1.0, tokens=LEAST_TOKENS - 1)
    assert world.state == ""
    world.window(SHARE)
    wait_for(lambda: world.state == "ready")
    # Not at the threshold, where a share that wavers would build a copy in every other window.
    world.window(SHARE * KEEP + 0.01)
    assert world.state == "ready"
    lease = world.lease("hot")
    weights = lease.take()
    assert weights is world.built[0][1]
    assert world.lease("other").take() is None
    world.window(SHARE * KEEP - 0.01)
    assert world.state == "leaving"
    # Who runs on it does so to the end; nobody else begins to.
    assert world.lease("hot").take() is None
    assert not weights.is_freed
    lease.release()
    wait_for(lambda: weights.is_freed)
    assert world.state == ""
    assert world.dropped == ["share"]


def test_an_idle_copy_goes_and_a_hot_adapter_replaces_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    world.window(1.0, hot="first")
    wait_for(lambda: world.state == "ready")
    asked = Resolved(name="asked", version=1, digest="sha256:asked")
    lease: Any = world.merging.hold(asked, FakeLease(digest=asked.digest), "merged")
    wait_for(lambda: lease.is_ready)
    lease.release()
    world.window(1.0)
    wait_for(lambda: world.state == "ready")
    assert [name for name, _ in world.built] == ["first", "asked", "hot"]
    world.clock.now += module.IDLE_S
    wait_for(lambda: world.state == "")
    assert world.dropped == ["replaced", "replaced", "idle"]
    # The worker forgets a copy before it frees it.
    wait_for(lambda: all(weights.is_freed for _, weights in world.built))


def test_short_memory_takes_it_and_keeps_it_away_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    world.window(1.0)
    wait_for(lambda: world.state == "ready")
    lease = world.lease("hot")
    assert lease.take() is not None
    world.is_short = True
    wait_for(lambda: world.merging.is_revoked)
    # The engine takes it from whoever runs on it, and only then is it freed.
    assert not world.built[0][1].is_freed
    lease.give_up()
    world.merging.free_revoked()
    assert world.built[0][1].is_freed
    assert lease.take() is None
    world.is_short = False
    world.window(1.0)
    assert world.state == ""
    world.clock.now += module.BACKOFF_S
    world.window(1.0)
    wait_for(lambda: world.state == "ready")
    assert world.dropped == ["memory"]
