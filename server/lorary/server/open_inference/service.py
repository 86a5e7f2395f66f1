"""``inference.GRPCInferenceService``: the data plane for clients of the Open Inference Protocol.

Every call becomes calls of ``lorary.v1.Inference``, so admission, batches, receipts and errors are theirs.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRequest
from lorary.oip import open_inference_pb2 as oip
from lorary.oip import open_inference_pb2_grpc
from lorary.server.caller import PartOfCall
from lorary.server.open_inference.asks import OUTPUTS, model_ref, read_ask
from lorary.server.open_inference.tensors import TEXT_INPUT, add_output
from lorary.server.together import together
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorary.server.caller import Waiting
    from lorary.server.open_inference.asks import Ask
    from lorary.server.ports import RegistryLike
    from lorary.server.service import InferenceService, Parts

PLATFORM = "lorary"
_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
# Our own paths, as this protocol's.
_FIELDS = (
    (re.compile(r"^sampling\.(\w+).*"), r"parameters.\1"),
    (re.compile(r"^(priority|scale|routing_key|dimensions)$"), r"parameters.\1"),
    (re.compile(r"^inputs?(\[\d+\])?(\.(text|prompt))?$"), "inputs[0]"),
    (re.compile(r"^request_id$"), "id"),
    (re.compile(r"^labels.*"), "outputs"),
)


class OpenInference(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The six calls.

    Args:
        service: answers.
        parts: what it works with.
        registry: for the versions of a name.
        is_ready: whether new calls are wanted.
        has_failed: whether the engine broke.
    """

    def __init__(
        self,
        service: InferenceService,
        parts: Parts,
        registry: RegistryLike,
        *,
        is_ready: Callable[[], bool],
        has_failed: Callable[[], bool],
    ) -> None:
        self._service = service
        self._parts = parts
        self._registry = registry
        self._is_ready = is_ready
        self._has_failed = has_failed

    async def ServerLive(  # noqa: N802
        self, request: oip.ServerLiveRequest, context: Any
    ) -> oip.ServerLiveResponse:
        """Say whether the process can answer at all."""
        return oip.ServerLiveResponse(live=not self._has_failed())

    async def ServerReady(  # noqa: N802
        self, request: oip.ServerReadyRequest, context: Any
    ) -> oip.ServerReadyResponse:
        """Say whether new calls are wanted."""
        return oip.ServerReadyResponse(ready=self._is_ready())

    async def ServerMetadata(  # noqa: N802
        self, request: oip.ServerMetadataRequest, context: Any
    ) -> oip.ServerMetadataResponse:
        """Say which server this is."""
        return oip.ServerMetadataResponse(name=PLATFORM, version=self._parts.facts.version)

    async def ModelReady(  # noqa: N802
        self, request: oip.ModelReadyRequest, context: Any
    ) -> oip.ModelReadyResponse:
        """Say whether a call would be taken, be the adapter on the device or not."""
        ref = model_ref(request.name, request.version, self._parts.facts.base)
        target = await self._parts.targets.resolve(ref)
        is_refused = target.digest in self._parts.residency.quarantined()
        return oip.ModelReadyResponse(ready=self._is_ready() and not is_refused)

    async def ModelMetadata(  # noqa: N802
        self, request: oip.ModelMetadataRequest, context: Any
    ) -> oip.ModelMetadataResponse:
        """Say which versions there are, and which tensors go in and out."""
        ref = model_ref(request.name, request.version, self._parts.facts.base)
        target = await self._parts.targets.resolve(ref)
        versions: Sequence[Any] = ()
        if target.name:
            # Of thousands of adapters, which a Hub is asked for one by one, this is about one.
            versions = await self._parts.targets.run(self._registry.list, target.name)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        outputs = [(*one, kind) for kind, names in OUTPUTS.items() for one in names.items()]
        return oip.ModelMetadataResponse(
            name=request.name,
            versions=[str(v.version) for v in versions],
            platform=PLATFORM,
            inputs=[tensor(name=TEXT_INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                tensor(
                    name=name,
                    datatype=datatype,
                    shape=[-1, self._parts.limits.hidden_size] if kind == "vector" else [-1],
                )
                for name, datatype, kind in outputs
            ],
        )

    async def ModelInfer(  # noqa: N802
        self, request: oip.ModelInferRequest, context: Waiting
    ) -> oip.ModelInferResponse:
        """Answer every text of a call, side by side."""
        ask = read_ask(request, self._parts.facts.base)
        with _in_their_words():
            found, receipt = await self._answers(ask, context)
        response = oip.ModelInferResponse(
            model_name=request.model_name,
            model_version=str(receipt.version) if receipt.name else "",
            id=receipt.request_id,
        )
        told = {
            "lorary_adapter": receipt.name,
            "lorary_digest": receipt.digest,
            "lorary_base_fingerprint": receipt.base_fingerprint,
        }
        for name, value in told.items():
            response.parameters[name].string_param = value
        for name in ask.outputs:
            values, further = found[name]
            datatype = OUTPUTS[ask.kind][name]
            add_output(response, name, datatype, [*ask.shape, *further], values, is_raw=ask.is_raw)
        return response

    async def _answers(
        self, ask: Ask, context: Waiting
    ) -> tuple[dict[str, tuple[Sequence[Any], Sequence[int]]], pb.Receipt]:
        """Return the elements of every output, with the dimensions that they have beside the texts', and a receipt."""
        if ask.kind == "vector":
            embeddings = (await self._service.Embed(ask.requests[0], context)).embeddings
            values = [value for one in embeddings for value in one.values]
            width = len(embeddings[0].values)
            return {"embedding": (values, [width])}, embeddings[-1].receipt
        if ask.kind == "label":
            scored = await together(self._service.Classify(one, context) for one in ask.requests)
            best = [one.scores[0] for one in scored]
            return {
                "label": ([one.label for one in best], ()),
                "probability": ([one.probability for one in best], ()),
            }, scored[-1].receipt
        ends = [_End(context) for _ in ask.requests]
        await together(
            self._service.Generate(one, end) for one, end in zip(ask.requests, ends, strict=True)
        )
        completes = [end.complete for end in ends]
        return {
            "text_output": ([one.text for one in completes], ()),
            "finish_reason": ([_FINISH_REASONS[one.finish_reason] for one in completes], ()),
            "completion_tokens": ([one.usage.completion_tokens for one in completes], ()),
        }, completes[-1].receipt


@dataclass(slots=True)
class _End(PartOfCall):
    """The caller of one text's Generate, who wants its end alone."""

    complete: pb.GenerateComplete = field(default_factory=pb.GenerateComplete)

    async def write(self, message: pb.GenerateResponse, /) -> None:
        if message.HasField("complete"):
            self.complete = message.complete


@contextmanager
def _in_their_words() -> Iterator[None]:
    """Let errors name the fields that the caller has sent."""
    try:
        yield
    except InvalidRequest as error:
        for pattern, path in _FIELDS:
            if pattern.match(error.field):
                raise InvalidRequest(str(error), field=pattern.sub(path, error.field)) from error
        raise
