"""Leases on several versions at once, and the place in the pool that they make together.

A composition's place is a list: the rank rows of all its parts, each with its part's weight as the row's
scale. Nothing is copied, so it costs no memory of its own, and it is as exact as its parts.

**Nobody holds one part while waiting for another.** If compositions did, two of them could wait for each
other's memory for ever. So a composition that is not complete asks for its parts (which loads them) but
holds none; it holds all in one go at the moment when all are there. Until then a part may be evicted
again. The composition that has waited longest asks anew each time it is looked at, which makes its parts
the last to be evicted, so among compositions it gets on; those behind it only look.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from lorary.errors import IncompatibleAdapter, LoraryError
from lorary.server.adapters.segments import NO_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.engine.request import DeviceLease, Lease
    from lorary.server.ports import ResidencyLike


@dataclass(slots=True, eq=False)
class _Composition:
    """What all leases of one composition share; guarded by the lock of ``Compositions``.

    Attributes:
        digest: the composition's.
        parts: what to ask the residency for, and its weight, in the order of the parts' digests: equal
            compositions add their rows up in the same order.
        asked: leases of the last time that not all parts were there, given back already; they tell what
            has arrived and what has failed.
        coming: leases of parts that are on their way, so that their loads are wanted.
        num_leases: leases not released.
        num_complete: those of them that hold all parts.
        entry: the place of all parts together, made when a step first needs it and kept while anybody
            holds them. One object, for the rows of a step are grouped by it.
        error: why a part cannot be asked for.
    """

    digest: str
    parts: tuple[tuple[Any, float], ...]
    asked: list[Lease] = field(default_factory=list)
    coming: list[Lease] = field(default_factory=list)
    num_leases: int = 0
    num_complete: int = 0
    entry: PoolEntry | None = None
    error: LoraryError | None = None


class Compositions:
    """Compositions in use, by digest.

    Args:
        residency: whose versions they are made of.
    """

    def __init__(self, residency: ResidencyLike) -> None:
        self._residency = residency
        self._lock = threading.Lock()
        self._by_digest: dict[str, _Composition] = {}
        # Those that are not complete, the longest waiting first.
        self._gathering: dict[_Composition, None] = {}

    @property
    def num_in_use(self) -> int:
        """Compositions that any lease is for."""
        return len(self._by_digest)

    def acquire(
        self, digest: str, resolved: Mapping[str, Any], weights: Mapping[str, float]
    ) -> ComposedLease:
        """Hold a composition, and begin to load the parts that are not on the device; returns at once.

        Args:
            digest: the composition's own.
            resolved: per digest of a part, what the residency is asked for.
            weights: likewise, its weight.

        Raises:
            LoraryError: what a load of a part failed with a moment ago; nothing is held.
        """
        with self._lock:
            composition = self._by_digest.get(digest)
            if composition is None:
                parts = tuple((resolved[part], weights[part]) for part in sorted(weights))
                composition = _Composition(digest, parts)
            lease = ComposedLease(self, composition)
            held = self._ask(composition)
            # Registered once nothing can fail any more.
            self._by_digest[digest] = composition
            composition.num_leases += 1
            if held is None:
                self._gathering.setdefault(composition)
            else:
                self._hold(lease, composition, held)
            return lease

    def entry(self, lease: ComposedLease, composition: _Composition) -> PoolEntry | None:
        """Return the place of all parts together (through ``ComposedLease.entry``)."""
        with self._lock:
            if lease.held and composition.entry is None:
                composition.entry = _joined(lease.held, [weight for _, weight in composition.parts])
            return composition.entry if lease.held else None

    def try_complete(self, lease: ComposedLease, composition: _Composition) -> bool:
        """Hold all parts if all are there (through ``ComposedLease.is_ready``)."""
        with self._lock:
            if lease.is_released or composition.error is not None:
                return False
            # Others may hold it complete already, and let its parts go before this one gets them.
            self._gathering.setdefault(composition)
            if next(iter(self._gathering)) is composition:
                self._let_go_of_arrived()
            elif not all(part.is_ready for part in composition.asked):
                return False
            try:
                held = self._ask(composition)
            except LoraryError as error:
                composition.error = error
                return False
            if held is None:
                return False
            self._hold(lease, composition, held)
            lease.load_ns = time.monotonic_ns() - lease.acquired_ns
            return True

    def release(self, lease: ComposedLease, composition: _Composition) -> None:
        """Give back one hold (through ``ComposedLease.release``)."""
        with self._lock:
            if lease.is_released:
                return
            lease.is_released = True
            held, lease.held = lease.held, ()
            composition.num_leases -= 1
            if held:
                composition.num_complete -= 1
                if not composition.num_complete:
                    # Its pages may go to others from here on.
                    composition.entry = None
            if not composition.num_leases:
                del self._by_digest[composition.digest]
                self._gathering.pop(composition, None)
                held = (*held, *composition.coming)
                composition.coming = []
        for part in held:
            part.release()

    def _ask(self, composition: _Composition) -> tuple[Lease, ...] | None:
        """Ask for every part; hold all or, when one is not there, none.

        Raises:
            LoraryError: a part's load failed a moment ago, or a part cannot be in a sum; none is held.
        """
        asked: list[Lease] = []
        is_complete = False
        try:
            for resolved, _ in composition.parts:
                asked.append(self._residency.acquire(resolved))
            are_ready = all(part.is_ready for part in asked)
            if are_ready:
                _check_linear(composition, asked)
            is_complete = are_ready
        finally:
            before, composition.coming = composition.coming, []
            if not is_complete:
                for part in asked:
                    # What has arrived must not keep its memory from others while the rest is coming; a
                    # load that nobody holds would be given up.
                    if part.is_ready or part.error is not None:
                        part.release()
                    else:
                        composition.coming.append(part)
            for part in before:
                part.release()
        composition.asked = asked
        return tuple(asked) if is_complete else None

    def _let_go_of_arrived(self) -> None:
        """Give back what has come for compositions that are not complete: the first may need its memory.

        They would not do it themselves before it is their turn to ask again.
        """
        for composition in self._gathering:
            coming, composition.coming = composition.coming, []
            for part in coming:
                if part.is_ready or part.error is not None:
                    part.release()
                else:
                    composition.coming.append(part)

    def _hold(
        self, lease: ComposedLease, composition: _Composition, held: tuple[Lease, ...]
    ) -> None:
        self._gathering.pop(composition, None)
        composition.num_complete += 1
        lease.held = held


class ComposedLease:
    """A hold on every part of a composition; fits where an ``AdapterLease`` does.

    Attributes:
        held: leases on all parts, once all are there; guarded by the lock of ``Compositions``.
        load_ns: nanoseconds this holder waited for loads; 0 when all parts were resident.
    """

    def __init__(self, compositions: Compositions, composition: _Composition) -> None:
        self._compositions = compositions
        self._composition = composition
        self.acquired_ns = time.monotonic_ns()
        self.load_ns = 0
        self.held: tuple[Lease, ...] = ()
        self.is_released = False

    @property
    def digest(self) -> str:
        """The composition's digest."""
        return self._composition.digest

    @property
    def is_ready(self) -> bool:
        """Whether all parts are on the device; if they are, they are held from here on."""
        return bool(self.held) or self._compositions.try_complete(self, self._composition)

    @property
    def error(self) -> LoraryError | None:
        """Why a part's load failed, if one did."""
        composition = self._composition
        if self.held or composition.error is not None:
            return composition.error
        return next((part.error for part in composition.asked if part.error is not None), None)

    @property
    def entry(self) -> PoolEntry | None:
        """The place of all parts together once ready."""
        return self._compositions.entry(self, self._composition)

    def release(self) -> None:
        """Give all parts back; a second call does nothing."""
        self._compositions.release(self, self._composition)


def _check_linear(composition: _Composition, asked: Sequence[Lease]) -> None:
    """Check that parts which are all there can be summed.

    Raises:
        IncompatibleAdapter: one cannot, for DoRA's column scales are of the base and it alone.
    """
    for part, (resolved, _) in zip(asked, composition.parts, strict=True):
        entry = cast("DeviceLease", part).entry
        if entry is not None and entry.columns != NO_COLUMNS:
            raise IncompatibleAdapter(
                f"'{resolved.name}@{resolved.version}' is DoRA, which scales the outputs of the base and of "
                "its own change together: it is no part of a weighted sum, and takes no scale. Call it "
                "alone with weight 1, or compose plain LoRA adapters."
            )


def _joined(held: tuple[Lease, ...], weights: list[float]) -> PoolEntry:
    """Return the rows of all parts as one entry.

    Semantics: rows = rows_1 ++ rows_2 ++ …; scales = weight_1 * scales_1 ++ weight_2 * scales_2 ++ …
    """
    entries = [cast("PoolEntry", cast("DeviceLease", part).entry) for part in held]
    return replace(
        entries[0],
        rows=tuple(row for entry in entries for row in entry.rows),
        scales=tuple(
            weight * scale
            for entry, weight in zip(entries, weights, strict=True)
            for scale in entry.scales
        ),
        error=max(entry.error for entry in entries),
        first_layer=min(entry.first_layer for entry in entries),
    )
