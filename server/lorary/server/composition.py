"""Several adapters in one call: what may be asked, what it is called, and its digest.

A composition is the base plus the weighted sum of what each adapter would change::

    y = W x + sum over parts i of  weight_i * B_i A_i x

which is one adapter whose rank rows are all the parts' rank rows, so it shares its batch with anybody
and nothing is merged or copied (``adapters.composed``). Its identity is what it computes: the digest is
taken over (digest, weight) of the parts in an order of their own, so the same parts in another order,
or with one of them named twice, are the same composition, and a single part of weight 1 is that
adapter itself.

The first adapter named *leads*: its task gives template, labels, stop strings and default length, and its
share of the server is what the call counts against (``fair_queue``).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorary.errors import IncompatibleAdapter, InvalidRequest
from lorary.server.targets import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorary.server.ports import ResidencyLike
    from lorary.server.targets import Targets
    from lorary.v1 import inference_pb2 as pb

    HasAdapters = (
        pb.GenerateRequest
        | pb.ClassifyRequest
        | pb.ScoreRequest
        | pb.EmbedRequest
        | pb.TokenizeRequest
    )

MAX_PARTS = 8
MAX_WEIGHT = 16.0
DIGEST_PREFIX = "mix:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One adapter of a composition, as the caller named it, and what that turned out to be."""

    ref: str
    name: str
    version: int
    digest: str
    weight: float
    resolved: Any


def read_adapters(request: HasAdapters) -> tuple[tuple[str, float], ...]:
    """Return the refs and weights that a call names; none is the bare base.

    Raises:
        InvalidRequest: both ``adapter`` and ``adapters`` are set, a part has no ref, there are too many,
            or a weight is not a number of the allowed size.
    """
    scale = _scale(request)
    if not request.adapters:
        if scale is None:
            return ((request.adapter, 1.0),) if request.adapter else ()
        if not request.adapter:
            raise InvalidRequest(
                f"scale is {scale:g} and no adapter is named; the bare base has nothing to scale.",
                field="scale",
            )
        return ((request.adapter, _checked(scale, "scale")),)
    if request.adapter:
        raise InvalidRequest(
            f"adapter is {request.adapter[:64]!r} and adapters names {len(request.adapters)} more; "
            "set one of the two.",
            field="adapters",
        )
    if scale is not None:
        raise InvalidRequest(
            f"scale is {scale:g} beside adapters, which have weights of their own; multiply those.",
            field="scale",
        )
    if len(request.adapters) > MAX_PARTS:
        raise InvalidRequest(
            f"{len(request.adapters)} adapters were named; at most {MAX_PARTS} can be composed. Name "
            "fewer, or merge them into a version of their own.",
            field="adapters",
        )
    named = []
    for i, part in enumerate(request.adapters):
        if not part.adapter:
            raise InvalidRequest(
                f"adapters[{i}] names no adapter; the base is always part of the sum.",
                field=f"adapters[{i}].adapter",
            )
        weight = part.weight if part.HasField("weight") else 1.0
        named.append((part.adapter, _checked(weight, f"adapters[{i}].weight")))
    return tuple(named)


def composition_digest(weights: Iterable[tuple[str, float]]) -> str:
    """Return the digest of a composition of versions' digests with weights, each digest once.

    A weight counts with its float32 bits, which is what the kernels multiply by.
    """
    hashed = hashlib.sha256(b"lorary composition 1\n")
    for digest, weight in sorted(weights):
        hashed.update(digest.encode() + b"\0" + struct.pack("<f", weight))
    return f"{DIGEST_PREFIX}sha256:{hashed.hexdigest()}"


async def resolve_adapters(
    targets: Targets,
    named: Sequence[tuple[str, float]],
    residency: ResidencyLike,
    *,
    max_rank: int,
    key: str | None = None,
) -> Target:
    """Return what refs with weights mean now; ``key`` decides who is in a canary.

    Raises:
        InvalidRef, AdapterNotFound, IncompatibleAdapter: as ``Targets.resolve``, of any part.
        IncompatibleAdapter: their ranks add up to more than ``max_rank``, they do not fit into the
            adapters' memory together, or one of several is an aLoRA.
    """
    if not named:
        return await targets.resolve("")
    if len(named) == 1 and named[0][1] == 1.0:
        return await targets.resolve(named[0][0], key)
    found = await asyncio.gather(*(targets.resolve(ref, key) for ref, _ in named))
    parts = tuple(
        Part(
            ref=target.ref,
            name=target.name,
            version=target.version,
            digest=target.digest,
            weight=weight,
            resolved=target.resolved,
        )
        for target, (_, weight) in zip(found, named, strict=True)
    )
    weights = summed(parts)
    shown = "+".join(f"{part.ref}*{part.weight:g}" for part in parts)
    if list(weights.values()) == [1.0]:
        return replace(found[0], ref=shown, parts=parts)
    _check_always_on(found, weights)
    ranks = {target.digest: target.rank for target in found}
    rank = sum(ranks.values())
    if rank > max_rank:
        raise IncompatibleAdapter(
            f"the ranks of '{shown}' add up to {rank}; this server computes at most {max_rank} for one "
            "call. Name fewer adapters, or start the server with a larger --max-rank."
        )
    residency.check_fits(ranks)
    names = sorted({part.name for part in parts})
    return Target(
        ref=shown,
        name="+".join(names),
        version=parts[0].version if len(weights) == 1 else 0,
        digest=composition_digest(weights.items()),
        task=found[0].task,
        parts=parts,
        rank=rank,
        invocation=found[0].invocation,
    )


def _check_always_on(found: Sequence[Target], weights: Mapping[str, float]) -> None:
    """Refuse an aLoRA among several: where the sum begins, each part would have to say for itself."""
    for target in found:
        if target.is_activated and len(weights) > 1:
            raise IncompatibleAdapter(
                f"'{target.name}@{target.version}' is an aLoRA, which is off until its invocation, and the "
                "other parts are not: it is no part of a sum. Call it alone, with any scale."
            )


def summed(parts: Iterable[Part]) -> dict[str, float]:
    """Return the weight of each digest, float32, summed where one is named twice."""
    weights: dict[str, float] = {}
    for part in parts:
        weights[part.digest] = _float32(weights.get(part.digest, 0.0) + part.weight)
    return weights


def _scale(request: HasAdapters) -> float | None:
    if "scale" not in request.DESCRIPTOR.fields_by_name:
        return None
    return request.scale if request.HasField("scale") else None  # type: ignore[union-attr, arg-type]


def _checked(weight: float, field: str) -> float:
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise InvalidRequest(
            f"{field} is {weight:g}; it must be in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}].", field=field
        )
    # One zero: minus zero computes the same.
    return _float32(weight) + 0.0


def _float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
