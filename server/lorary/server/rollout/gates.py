"""What is measured of a canary and its holder, and what its gates say to that.

Gates compare two groups of calls that were drawn from the same callers by a hash. So what callers do
wrong, and what the machine suffers from, is in both, and the difference is the version's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorary.registry.splits import Canary

NUM_LATENCIES = 512
"""First-token latencies that are remembered of each side, the latest ones."""
QUANTILE = 0.95


@dataclass(slots=True)
class Tally:
    """What one side's calls came to."""

    num_calls: int = 0
    num_errors: int = 0
    last_error: str = ""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_LATENCIES))

    def ok(self, first_token_s: float | None = None) -> None:
        """Count a call that was answered."""
        self.num_calls += 1
        if first_token_s is not None:
            self.latencies_s.append(first_token_s)

    def failed(self, error: BaseException) -> None:
        """Count a call that was not."""
        self.num_calls += 1
        self.num_errors += 1
        self.last_error = f"{type(error).__name__}: {error}"[:300]

    @property
    def error_rate(self) -> float:
        """Failed calls among all; 0 before the first."""
        return self.num_errors / self.num_calls if self.num_calls else 0.0

    @property
    def p95_s(self) -> float:
        """95th percentile of first-token latency; 0 before the first (nearest rank)."""
        if not self.latencies_s:
            return 0.0
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))]


@dataclass(slots=True)
class Copies:
    """What the candidate's copies of the holder's calls came to.

    Attributes:
        num_compared: pairs of answers that were compared.
        num_same: those that were the same to the last token.
        num_errors: copies that failed while the holder's call was answered.
        num_skipped: calls that got no copy because answers were waiting for a place.
        divergence_sum: the differences added up, each 0 to 1.
        first_difference: position of the latest first difference, in tokens; -1 for none yet.
    """

    num_compared: int = 0
    num_same: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    divergence_sum: float = 0.0
    first_difference: int = -1
    last_error: str = ""

    @property
    def divergence(self) -> float:
        """Mean difference, 0 to 1; 0 before the first."""
        return self.divergence_sum / self.num_compared if self.num_compared else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates say: ``wait`` for more calls, ``fail`` with a reason, or ``pass``."""

    kind: Literal["wait", "fail", "pass"]
    reason: str = ""


def judge(canary: Canary, holder: Tally, candidate: Tally, copies: Copies) -> Verdict:
    """Return what the gates say to what was measured so far.

    A gate fails as soon as there are ``gates.calls`` calls on the side that it looks at and its limit is
    exceeded. All pass together, once every one could be judged and ``promote_after`` calls were seen.
    """
    gates = canary.gates
    seen = candidate.num_calls + copies.num_compared + copies.num_errors
    is_open = seen < max(gates.calls, canary.promote_after)
    if gates.errors is not None and seen >= gates.calls:
        rate = (candidate.num_errors + copies.num_errors) / seen
        if rate - holder.error_rate > gates.errors:
            last = candidate.last_error or copies.last_error
            return Verdict(
                "fail",
                f"gate errors: {rate:.1%} of {seen} calls failed, {holder.error_rate:.1%} of the "
                f"holder's {holder.num_calls}; allowed is {gates.errors:.1%} more ({last})",
            )
    if gates.divergence is not None:
        is_open = is_open or copies.num_compared < gates.calls
        if copies.num_compared >= gates.calls and copies.divergence > gates.divergence:
            return Verdict(
                "fail",
                f"gate divergence: {copies.num_compared} copies differ from the holder's answers by "
                f"{copies.divergence:.3f} on average; allowed is {gates.divergence:g}",
            )
    if gates.latency is not None:
        fewest = min(len(candidate.latencies_s), len(holder.latencies_s))
        needed = min(gates.calls, NUM_LATENCIES)
        is_open = is_open or fewest < needed
        if fewest >= needed and candidate.p95_s > gates.latency * holder.p95_s:
            return Verdict(
                "fail",
                f"gate latency: the 95th percentile of first tokens is {candidate.p95_s * 1e3:.1f} ms, "
                f"the holder's {holder.p95_s * 1e3:.1f} ms; allowed is {gates.latency:g} times that",
            )
    if is_open or not gates.has_any:
        return Verdict("wait")
    return Verdict(
        "pass",
        f"held its gates over {seen} calls: {candidate.error_rate:.1%} failed, "
        f"divergence {copies.divergence:.3f} over {copies.num_compared} copies, "
        f"p95 {candidate.p95_s * 1e3:.1f} ms beside {holder.p95_s * 1e3:.1f} ms",
    )
