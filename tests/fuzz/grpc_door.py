"""Calls of every method, as they should not be, and what may become of them."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st

from lorary.errors import OUTCOMES, reason
from lorary.oip import open_inference_pb2 as oip
from lorary.server.status import DETAILS_KEY, DOMAIN
from lorary.v1 import control_pb2 as control
from lorary.v1 import inference_pb2 as pb
from tests.fuzz.messages import changed, damaged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from google.protobuf.message import Message

    from tests.fuzz.messages import Draw

PATIENCE_S = 120.0
"""A call that nobody ends must have ended by then."""
MAX_METADATA = 8 << 10
"""What gRPC lets through; above, it refuses by itself, and below twice that only now and then."""
MAX_MESSAGE = 4 << 20
"""The same (``--max-message``)."""
_CALL_STATUSES = {reason(cls): found.grpc_status for cls, found in OUTCOMES.items()}
_TOOLS = [
    pb.Tool(name="look", description="it", parameters='{"type": "object", "properties": {}}'),
    pb.Tool(name="now"),
]
_TURNS = [
    pb.ChatMessage(role="user", content="the cat"),
    pb.ChatMessage(
        role="assistant", tool_calls=[pb.ToolCall(id="call", name="look", arguments="{}")]
    ),
    pb.ChatMessage(role="tool", content="sat", tool_call_id="call"),
]
_CHAT = pb.Input(chat=pb.ChatMessages(messages=_TURNS[:1]))
_TOOL_CHAT = pb.Input(chat=pb.ChatMessages(messages=_TURNS, tools=_TOOLS))
_PROMPT = pb.Input(prompt="the cat sat")
_IDS = pb.Input(token_ids=pb.TokenIds(ids=[5, 9, 12, 30]))
_FEW = pb.SamplingParams(max_tokens=4)


def _infer(model: str, *outputs: str, raw: bytes = b"", **parameters: int | str | bool) -> Message:
    """Return a call of the Open Inference Protocol, of two texts, or of one sent raw."""
    message = oip.ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name="text_input", datatype="BYTES", shape=[1 if raw else 2])
    if raw:
        message.raw_input_contents.append(raw)
    else:
        tensor.contents.bytes_contents.extend([b"the cat", b"sat"])
    for name in outputs:
        message.outputs.add(name=name)
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param"}
    for name, value in parameters.items():
        setattr(message.parameters[name], kinds[type(value)], value)
    return message


SEEDS: dict[str, Sequence[Message]] = {
    "GenerateRequest": (
        pb.GenerateRequest(adapter="alpha", input=_PROMPT, sampling=_FEW),
        pb.GenerateRequest(input=_IDS, sampling=pb.SamplingParams(max_tokens=3, n=2, logprobs=2)),
        pb.GenerateRequest(
            adapter="judge@prod",
            input=pb.Input(text="the film was good"),
            sampling=pb.SamplingParams(max_tokens=2, temperature=1, top_p=0.9, top_k=9, seed=1),
        ),
        pb.GenerateRequest(
            input=_CHAT,
            sampling=pb.SamplingParams(max_tokens=6, json_schema='{"type": "integer"}'),
        ),
        pb.GenerateRequest(input=_CHAT, sampling=pb.SamplingParams(max_tokens=6, regex="[a-c]+")),
        pb.GenerateRequest(
            input=_PROMPT, sampling=pb.SamplingParams(max_tokens=6, lark='start: "a" start | "b"')
        ),
        pb.GenerateRequest(
            input=_PROMPT,
            sampling=pb.SamplingParams(max_tokens=6, choice=pb.Choices(texts=["good", "bad"])),
        ),
        pb.GenerateRequest(adapter="alpha", input=_TOOL_CHAT, sampling=_FEW),
        pb.GenerateRequest(
            adapters=[
                pb.WeightedAdapter(adapter="alpha", weight=0.5),
                pb.WeightedAdapter(adapter="judge", weight=0.5),
            ],
            input=_PROMPT,
            sampling=_FEW,
        ),
        pb.GenerateRequest(adapter="alpha", scale=0.5, input=_IDS, sampling=_FEW, priority=3),
    ),
    "ClassifyRequest": (
        pb.ClassifyRequest(adapter="judge", input=pb.Input(text="the film was bad")),
        pb.ClassifyRequest(input=_PROMPT, labels=["good", "bad"]),
    ),
    "ScoreRequest": (
        pb.ScoreRequest(adapter="alpha", input=_PROMPT, continuations=[" good", " bad"]),
        pb.ScoreRequest(input=_IDS, continuations=[" not"], with_end=True),
    ),
    "TokenizeRequest": (
        pb.TokenizeRequest(input=_TOOL_CHAT),
        pb.TokenizeRequest(adapter="judge", input=pb.Input(text="the film")),
    ),
    "EmbedRequest": (
        pb.EmbedRequest(adapter="alpha", inputs=[_PROMPT, _IDS], dimensions=8, normalize=True),
    ),
    "ModelInferRequest": (
        _infer("alpha", max_tokens=3, stop="cat"),
        _infer("base", max_tokens=2, raw=b"\x07\0\0\0the cat"),
        _infer("judge@prod", "label", "probability", use_template=True),
        _infer("alpha", "embedding", dimensions=8, pooling="last", normalize=True),
    ),
    "ModelReadyRequest": (oip.ModelReadyRequest(name="alpha", version="1"),),
    "ModelMetadataRequest": (oip.ModelMetadataRequest(name="judge@prod"),),
    "SetAliasRequest": (
        control.SetAliasRequest(name="alpha", alias="canary", version=1, reason="why"),
    ),
}
"""Good messages, by their types; others grow out of the empty one, with its adapter named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method: its path, the class of its answers, and messages to begin with."""

    path: str
    answers: type[Message]
    seeds: Sequence[Message]
    is_endless: bool = False


def _methods() -> Iterator[Method]:
    services = [
        *pb.DESCRIPTOR.services_by_name.values(),
        *control.DESCRIPTOR.services_by_name.values(),
        *oip.DESCRIPTOR.services_by_name.values(),
        *health_pb2.DESCRIPTOR.services_by_name.values(),
        *reflection_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    for service in services:
        for method in service.methods:
            empty = GetMessageClass(method.input_type)()
            if "adapter" in method.input_type.fields_by_name:
                empty.adapter = "alpha"  # type: ignore[attr-defined]
            yield Method(
                path=f"/{service.full_name}/{method.name}",
                answers=GetMessageClass(method.output_type),
                seeds=SEEDS.get(method.input_type.name, (empty,)),
                is_endless=method.name in ("Watch", "ServerReflectionInfo"),
            )


METHODS = tuple(_methods())
_KNOWN = {method.path: method for method in METHODS}
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_BY_DOOR = {
    "gRPC": tuple(one for one in METHODS if not one.path.startswith("/inference.")),
    # What answers is most of that service; the others say what there is.
    "OIP gRPC": (
        *(one for one in METHODS if one.path.startswith("/inference.")),
        *(_KNOWN[_INFER],) * 6,
    ),
}
_STRANGE_PATHS = (
    *("/lorary.v1.Inference/Nothing", "/lorary.v1.Inference/", "/", "//", "/a/b/c"),
    *(
        "/inference.GRPCInferenceService/Nothing",
        "/inference.GRPCInferenceService/ModelStreamInfer",
    ),
    *("/lorary.v2.Inference/Generate", "/" + "x" * 3000, "/lorary.v1.inference/generate"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcInput:
    """One call.

    Attributes:
        leaves_after: messages after which the caller goes away; None: it stays to the end.
    """

    path: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_s: float | None = None
    leaves_after: int | None = None
    door: str = "gRPC"

    async def faults(self, channel: grpc.aio.Channel) -> str:
        """Make the call; return what is wrong with its end, "" if nothing is."""
        bare: Any = channel.stream_stream  # bytes as they are, which its stubs do not know
        call = bare(self.path)(
            self._sent(), metadata=self.metadata, timeout=self.timeout_s or PATIENCE_S
        )
        answers: list[bytes] = []
        try:
            if self.leaves_after == 0:
                await asyncio.sleep(0)
                call.cancel()
            async for raw in call:
                answers.append(raw)
                if len(answers) == self.leaves_after:
                    call.cancel()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # its code says it, too
        code: grpc.StatusCode = await call.code()
        if code == grpc.StatusCode.OK:
            return self._wrong_answers(answers)
        return self._wrong_end(
            code, str(await call.details()), dict(await call.trailing_metadata() or ())
        )

    async def _sent(self) -> AsyncIterator[bytes]:
        for message in self.messages:
            yield message

    def _wrong_answers(self, answers: Sequence[bytes]) -> str:
        method = _KNOWN.get(self.path)
        if method is None:
            return "a method that does not exist ended with OK"
        read = [method.answers.FromString(raw) for raw in answers]
        if any(map(_has_nan, read)):
            return "an answer holds a number that is none"
        if self.path.endswith("/Generate"):
            asked = pb.GenerateRequest.FromString(self.messages[0]).sampling
            wanted = asked.n if asked.HasField("n") else 1
            ended = [a.complete.index for a in read if a.HasField("complete")]  # type: ignore[attr-defined]
            if sorted(ended) != list(range(wanted)):
                return f"{wanted} answers were asked for, and the ends are of {sorted(ended)}"
        # A stream into which nothing is sent, as of reflection, ends without an answer.
        wrong = (_wrong_tensors(one) for one in read if isinstance(one, oip.ModelInferResponse))
        return next(filter(None, wrong), "")

    def _wrong_end(self, code: grpc.StatusCode, text: str, trailing: dict[str, Any]) -> str:
        """Return why a status is none that is documented (docs/errors.md), "" if it is."""
        said = f"{code.name}: {text[:200]}"
        if text == "Internal error from Core":
            return ""  # the client's own word: it still writes to a call that has ended
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            return said
        packed = trailing.get(DETAILS_KEY)
        if packed is not None:
            for detail in status_pb2.Status.FromString(packed).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    is_right = info.domain == DOMAIN and _CALL_STATUSES[info.reason] == code.name
                    return "" if is_right else f"{said}, and its reason is {info.reason}"
            return f"{said}, without a reason"
        return "" if self._is_grpcs_own(code) else f"{said}, without details"

    def _is_grpcs_own(self, code: grpc.StatusCode) -> bool:
        """Whether gRPC may have refused this before Lorary saw it, or the caller ended it."""
        return {
            grpc.StatusCode.UNIMPLEMENTED: self.path not in _KNOWN,
            grpc.StatusCode.RESOURCE_EXHAUSTED: (
                sum(len(k) + len(v) + 32 for k, v in self.metadata) > MAX_METADATA - 1024
                or any(len(message) > MAX_MESSAGE for message in self.messages)
            ),
            grpc.StatusCode.DEADLINE_EXCEEDED: self.timeout_s is not None,
            # A deadline that passes before anything was sent is the client's own end, too.
            grpc.StatusCode.CANCELLED: self.leaves_after is not None or self.timeout_s is not None,
            # The health service of gRPC's own says no more of names that it does not know.
            grpc.StatusCode.NOT_FOUND: self.path.startswith("/grpc.health."),
        }.get(code, False)


def _wrong_tensors(answer: oip.ModelInferResponse) -> str:
    """Return which tensor of an answer has not the elements that its shape says, "" if none."""
    for i, tensor in enumerate(answer.outputs):
        if answer.raw_output_contents:
            raw = answer.raw_output_contents[i]
            size = {"INT64": 8, "FP32": 4}.get(tensor.datatype)
            count = len(raw) // size if size else _num_raw_texts(raw)
        else:
            ((_, elements),) = tensor.contents.ListFields()
            count = len(elements)
        if count != math.prod(tensor.shape):
            return f"{tensor.name} has {count} elements and shape {list(tensor.shape)}"
    return ""


def _num_raw_texts(raw: bytes) -> int:
    count = at = 0
    while at < len(raw):
        at += 4 + int.from_bytes(raw[at : at + 4], "little")
        count += 1
    return count


def _has_nan(message: Message) -> bool:
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            if any(map(_has_nan, value if field.is_repeated else [value])):
                return True
        elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE) and any(
            map(math.isnan, value if field.is_repeated else [value])
        ):
            return True
    return False


_KEYS = st.sampled_from(
    (
        *("lorary-request-id", "x-adapter-id", "authorization", "x-request-id", "traceparent"),
        *("grpc-accept-encoding", "te", "user-agent", "x-odd-bin", "lorary-adapter", "a.b_c-d"),
    )
)
_VALUES = st.sampled_from(
    ("", "id", "x" * 129, "Bearer x", " ", "~" * 300, "x" * 9_000, "x" * 20_000)
)


@st.composite
def grpc_inputs(draw: Draw, door: str = "gRPC") -> GrpcInput:
    """Any call of any method of Lorary's own, or of the Open Inference Protocol's."""
    method = draw(st.sampled_from(_BY_DOOR[door]))
    good = changed(draw, method.seeds).SerializeToString()
    is_good = draw(st.sampled_from((True, True, True, True, False)))
    payload = good if is_good else damaged(draw, good)
    messages: tuple[bytes, ...] = (payload,)
    path = method.path
    oddity = draw(
        st.sampled_from((*("none",) * 12, "path", "twice", "metadata", "deadline", "leaves"))
    )
    metadata: list[tuple[str, str | bytes]] = []
    timeout_s = 0.15 if method.is_endless else None
    leaves_after = None
    if oddity == "path":
        path = draw(st.sampled_from(_STRANGE_PATHS))
    elif oddity == "twice":
        messages = (payload,) * draw(st.sampled_from((0, 2, 3)))
        # A call that never sends its message waits for as long as its caller does.
        timeout_s = 0.15
    elif oddity == "metadata":
        for _ in range(draw(st.integers(1, 3))):
            key = draw(_KEYS)
            is_binary = key.endswith("-bin")
            metadata.append((key, draw(st.binary(max_size=64)) if is_binary else draw(_VALUES)))
    elif oddity == "deadline":
        timeout_s = draw(st.sampled_from((1e-6, 0.001, 0.005, 0.02, 0.1)))
    elif oddity == "leaves":
        leaves_after = draw(st.sampled_from((0, 1, 2)))
    return GrpcInput(
        path=path,
        messages=messages,
        metadata=tuple(metadata),
        timeout_s=timeout_s,
        leaves_after=leaves_after,
        door=door,
    )
