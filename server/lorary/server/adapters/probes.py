"""Golden probes: what a version's manifest says its next tokens are, and how far a server is from it.

The trainer ran base and adapter over a few prompts and wrote down the largest logits of each last
position. A server that runs the same base, with the adapter that the manifest belongs to, gives nearly the
same distribution over these tokens, whatever it rounds; another adapter's tensors do not. ::

    p = softmax of the recorded logits;  q = the served probabilities of the same tokens, made to sum to 1
    divergence of a probe = sum of p * ln(p / q)                         in nats (Kullback and Leibler 1951)
    divergence of a version = the mean over its probes, for one prompt may be on the fence

Nothing here trusts a manifest: ids and numbers are checked before the engine sees them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorary.errors import CorruptArtifact
from lorary.registry.invocation import active_from

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lorary.registry.manifest import GoldenProbe, Manifest

MAX_PROBES = 16
MAX_TOP = 64

LIMITS = {
    "float32": 0.002,
    "bfloat16": 0.02,
    "float16": 0.02,
    "8-bit adapters": 0.02,
    "int8": 0.1,
    "nf4": 0.6,
}
"""Most nats that a healthy version may be off where something is kept in such a type.

From measurement (docs/operations.md, "Verified loads"): a multiple of the largest divergence seen of a
healthy version, and below the smallest of an exchanged one.
"""


def usable_probes(
    manifest: Manifest, *, vocab_size: int, max_context: int
) -> tuple[GoldenProbe, ...]:
    """Return the probes that this server can replay; those longer than its context are left out.

    Raises:
        CorruptArtifact: a probe could not have been recorded on this base.
    """
    probes = manifest.golden_probes[:MAX_PROBES]
    for i, probe in enumerate(probes):
        ids = (*probe.token_ids, *probe.top_token_ids)
        is_right = (
            probe.token_ids
            and 2 <= len(probe.top_token_ids) == len(probe.top_logits) <= MAX_TOP
            and len(set(probe.top_token_ids)) == len(probe.top_token_ids)
            and min(ids) >= 0
            and max(ids) < vocab_size
            and all(math.isfinite(logit) for logit in probe.top_logits)
        )
        if is_right and active_from(probe.token_ids, manifest.method.invocation_tokens) is None:
            raise CorruptArtifact(
                f"golden probe {i} of '{manifest.name}@{manifest.version}' lacks the adapter's invocation, so "
                "it says nothing about the adapter. Train or push the adapter again."
            )
        if not is_right:
            raise CorruptArtifact(
                f"golden probe {i} of '{manifest.name}@{manifest.version}' is none of a base with "
                f"{vocab_size} tokens: it has {len(probe.token_ids)} prompt tokens, "
                f"{len(probe.top_token_ids)} top tokens and {len(probe.top_logits)} logits, and all ids "
                "must be in the vocabulary. Train or push the adapter again."
            )
    return tuple(p for p in probes if len(p.token_ids) < max_context)


def divergence(probe: GoldenProbe, logprobs: Sequence[float]) -> float:
    """Return how many nats served log probabilities of the probe's top tokens are off.

    Args:
        probe: what the trainer saw.
        logprobs: of ``probe.top_token_ids``, in their order, natural logarithms.
    """
    if not all(math.isfinite(value) for value in logprobs):
        return math.inf
    recorded, served = _log_softmax(probe.top_logits), _log_softmax(logprobs)
    total = sum(math.exp(p) * (p - q) for p, q in zip(recorded, served, strict=True))
    # Rounding may take it a little below its least, which is 0.
    return max(0.0, total)


def divergence_limit(kinds: Iterable[str]) -> float:
    """Return the most nats for a server and a version that keep things in these types.

    Args:
        kinds: keys of ``LIMITS`` for the base as it is served, the arithmetic, the adapters' pages, and
            the base that the version was trained on; ``none`` says nothing.
    """
    return max(LIMITS[kind] for kind in ("float32", *kinds) if kind != "none")


def _log_softmax(values: Sequence[float]) -> list[float]:
    best = max(values)
    total = math.log(sum(math.exp(value - best) for value in values))
    return [value - best - total for value in values]
