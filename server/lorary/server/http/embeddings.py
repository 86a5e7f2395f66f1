"""/v1/embeddings: texts or token ids to vectors, as OpenAI tells them."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.server.http import answers
from lorary.server.http.requests import read_embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.answers import ServerFacts
    from lorary.server.http.call import HttpCall
    from lorary.server.service import InferenceService
    from lorary.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The endpoint, around the data plane and the facts of its server."""

    service: InferenceService
    facts: ServerFacts

    async def embeddings(self, call: HttpCall) -> None:
        """Answer ``POST /v1/embeddings``."""
        ask = read_embeddings(call.members, self.facts.base)
        answer = await self.service.Embed(ask.request, call)
        told = _in_base64 if ask.is_base64 else list
        await call.answer_json(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": i, "embedding": told(one.values)}
                    for i, one in enumerate(answer.embeddings)
                ],
                "model": ask.model,
                "usage": _usage(answer.embeddings),
                "lorary": answers.receipt(answer.embeddings[-1].receipt),
            }
        )


def _in_base64(values: Sequence[float]) -> str:
    """Return the bytes of float32 numbers, the least significant first, which is how OpenAI's clients ask."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _usage(embeddings: Sequence[pb.Embedding]) -> dict[str, Any]:
    read = sum(one.usage.prompt_tokens for one in embeddings)
    cached = sum(one.usage.cached_tokens for one in embeddings)
    return {
        "prompt_tokens": read,
        "total_tokens": read,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
