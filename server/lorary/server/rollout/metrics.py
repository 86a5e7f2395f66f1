"""Gauges and counters of aliases and canaries: read when Prometheus asks, gone when the canary is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from lorary.server.rollout.aliases import Follower
    from lorary.server.rollout.endings import Endings
    from lorary.server.rollout.shadow import Shadows
    from lorary.server.rollout.splits import Trial

PLACE = ["adapter", "alias", "version"]


class RolloutCollector:
    """Metrics of what changes under traffic.

    Args:
        follower: aliases and canaries.
        endings: how canaries ended.
        shadows: copies of calls.
        limit: canaries that have series of their own.
    """

    def __init__(
        self, follower: Follower, endings: Endings, shadows: Shadows, *, limit: int
    ) -> None:
        self._follower = follower
        self._endings = endings
        self._shadows = shadows
        self._limit = limit

    def collect(self) -> Iterator[Metric]:
        """Yield the figures as they are now."""
        follower = self._follower
        followed = follower.followed
        yield _gauge("lorary_registry_up", "0 while the registry is away.", not follower.trouble)
        yield _gauge(
            "lorary_aliases_followed", "Aliases in use.", sum(bool(f.alias) for f in followed)
        )
        yield _gauge(
            "lorary_aliases_behind",
            "Aliases that moved to a version that cannot be served.",
            sum(bool(f.behind) for f in followed),
        )
        turns = CounterMetricFamily(
            "lorary_alias_turns", "Turns to another version.", labels=["result"]
        )
        turns.add_metric(["ok"], follower.num_turned)
        turns.add_metric(["error"], follower.num_failed_turns)
        yield turns
        yield from self._trials(follower.trials[: self._limit])
        ended = CounterMetricFamily(
            "lorary_canaries_ended", "Canaries that this server ended.", labels=["result"]
        )
        for result, count in self._endings.counts.items():
            ended.add_metric([result], count)
        yield ended
        shadows = self._shadows
        copies = CounterMetricFamily("lorary_shadow_calls", "Copies of calls.", labels=["result"])
        copies.add_metric(["same"], shadows.num_same)
        copies.add_metric(["different"], shadows.num_different)
        copies.add_metric(["error"], shadows.num_failed)
        copies.add_metric(["skipped"], shadows.num_skipped)
        yield copies

    def _trials(self, trials: list[Trial]) -> Iterator[Metric]:
        percent = GaugeMetricFamily(
            "lorary_canary_percent", "Percent of calls that a canary sees.", labels=[*PLACE, "how"]
        )
        calls = CounterMetricFamily(
            "lorary_canary_calls",
            "Calls to an alias that has a canary.",
            labels=[*PLACE, "role", "result"],
        )
        divergence = GaugeMetricFamily(
            "lorary_canary_divergence",
            "Mean difference of a canary's copies from the holder's answers.",
            labels=PLACE,
        )
        for trial in trials:
            split = trial.split
            canary = [trial.name, split.alias, str(split.canary.version)]
            holder = [trial.name, split.alias, str(split.version)]
            percent.add_metric([*canary, "answers"], split.canary.percent * trial.is_open)
            percent.add_metric([*canary, "copies"], split.canary.shadow * trial.is_open)
            for place, role, tally in (
                (holder, "holder", trial.holder),
                (canary, "canary", trial.canary),
            ):
                calls.add_metric([*place, role, "ok"], tally.num_calls - tally.num_errors)
                calls.add_metric([*place, role, "error"], tally.num_errors)
            calls.add_metric([*canary, "copy", "ok"], trial.copies.num_compared)
            calls.add_metric([*canary, "copy", "error"], trial.copies.num_errors)
            divergence.add_metric(canary, trial.copies.divergence)
        yield from (percent, calls, divergence)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family
