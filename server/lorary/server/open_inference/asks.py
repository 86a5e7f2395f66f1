"""From a call of the protocol to calls of ``lorary.v1``: names and shapes are checked here, ranges by ``validate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor

from lorary.errors import InvalidRequest
from lorary.server.open_inference.tensors import read_texts
from lorary.server.validate import POOLINGS, hint_for
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from lorary.oip import open_inference_pb2 as oip

MAX_TEXTS = 128
"""Texts of one call; each is a call of its own where the server says how many it takes."""

OUTPUTS: dict[str, dict[str, str]] = {
    "text": {"text_output": "BYTES", "finish_reason": "BYTES", "completion_tokens": "INT64"},
    "label": {"label": "BYTES", "probability": "FP32"},
    "vector": {"embedding": "FP32"},
}
"""What may be asked for, by what has to be computed for it: names, and the types of their elements."""

# Several answers and log probabilities have no tensor; lists have no parameter but for a single stop string.
_NOT_HERE = frozenset({"n", "logprobs", "prompt_logprobs"})
_SAMPLING = frozenset(
    field.name
    for field in pb.SamplingParams.DESCRIPTOR.fields
    if field.message_type is None and field.name not in _NOT_HERE | {"stop_token_ids"}
)
_OF_ALL = frozenset({"priority", "scale", "routing_key"})
_OF_VECTORS = frozenset({"normalize", "dimensions"})
_KNOWN: dict[str, frozenset[str]] = {
    "text": _SAMPLING | _OF_ALL | {"use_template"},
    "label": _OF_ALL | {"use_template"},
    "vector": _OF_VECTORS | _OF_ALL | {"use_template", "pooling"},
}
_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: (int,),
    FieldDescriptor.CPPTYPE_INT64: (int,),
    FieldDescriptor.CPPTYPE_UINT32: (int,),
    FieldDescriptor.CPPTYPE_UINT64: (int,),
    FieldDescriptor.CPPTYPE_FLOAT: (int, float),
    FieldDescriptor.CPPTYPE_DOUBLE: (int, float),
    FieldDescriptor.CPPTYPE_BOOL: (bool,),
    FieldDescriptor.CPPTYPE_STRING: (str,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a call asks for.

    Attributes:
        kind: what has to be computed, a key of ``OUTPUTS``.
        outputs: which tensors of it are wanted, in order.
        shape: of the texts.
        is_raw: whether elements were sent, and are to be answered, as raw bytes.
        requests: one for each text; of vectors one for all.
    """

    kind: str
    outputs: tuple[str, ...]
    shape: Sequence[int]
    is_raw: bool
    requests: tuple[Any, ...]


def model_ref(name: str, version: str, base: str) -> str:
    """Return the ref that a model's name and version are; empty for the bare base, which is called ``base``.

    Raises:
        InvalidRequest: a version of the base, or of a name that says one itself.
    """
    ref = "" if name == base else name
    if not version:
        return ref
    if not ref or "@" in ref:
        what = f"'{ref[:128]}' names a version itself" if ref else "the bare base has no versions"
        raise InvalidRequest(
            f"the model's version is '{version[:64]}', and {what}. Leave the version out.",
            field="model_version",
        )
    return f"{ref}@{version}"


def read_ask(request: oip.ModelInferRequest, base: str) -> Ask:
    """Return what a call asks for.

    Raises:
        InvalidRequest: a tensor, a type or a parameter is not known, or cannot be used.
    """
    adapter = model_ref(request.model_name, request.model_version, base)
    kind, outputs = _outputs(request)
    texts, shape = read_texts(request, most=MAX_TEXTS)
    values = _parameters(request, kind)
    has_template = values.pop("use_template", False)
    if not isinstance(has_template, bool):
        raise _unfit("use_template", has_template)
    inputs = [pb.Input(text=text) if has_template else pb.Input(prompt=text) for text in texts]
    common: dict[str, Any] = {"adapter": adapter, "request_id": request.id}
    requests: list[Any]
    if kind == "text":
        requests = [pb.GenerateRequest(input=one, **common) for one in inputs]
    elif kind == "label":
        requests = [pb.ClassifyRequest(input=one, **common) for one in inputs]
    else:
        requests = [pb.EmbedRequest(inputs=inputs, pooling=_pooling(values), **common)]
    for one in requests:
        for name, value in values.items():
            _set(one.sampling if name in _SAMPLING else one, name, value)
    return Ask(
        kind=kind,
        outputs=outputs,
        shape=shape,
        is_raw=bool(request.raw_input_contents),
        requests=tuple(requests),
    )


def _outputs(request: oip.ModelInferRequest) -> tuple[str, tuple[str, ...]]:
    """Return what has to be computed, and which tensors of it are wanted."""
    if not request.outputs:
        return "text", tuple(OUTPUTS["text"])
    kinds = {name: kind for kind, names in OUTPUTS.items() for name in names}
    names = tuple(tensor.name for tensor in request.outputs)
    for i, tensor in enumerate(request.outputs):
        if tensor.name not in kinds:
            raise InvalidRequest(
                f"output '{tensor.name[:64]}' is not known; there are {', '.join(kinds)}.",
                field=f"outputs[{i}].name",
            )
        if tensor.parameters or tensor.name in names[:i]:
            why = (
                "has parameters, and tensors here have none"
                if tensor.parameters
                else "is there twice"
            )
            raise InvalidRequest(f"output '{tensor.name}' {why}.", field=f"outputs[{i}]")
    wanted = {kinds[name] for name in names}
    if len(wanted) > 1:
        raise InvalidRequest(
            f"the outputs {', '.join(names)} are of different kinds; ask for text, labels or vectors in "
            "calls of their own.",
            field="outputs",
        )
    return wanted.pop(), names


def _parameters(request: oip.ModelInferRequest, kind: str) -> dict[str, Any]:
    values = {}
    for name, parameter in request.parameters.items():
        known = _KNOWN[kind]
        if name not in known:
            raise InvalidRequest(
                f"'{name[:64]}' is no parameter of a call for {kind}s{hint_for(name, known)}",
                field=f"parameters.{name[:64]}",
            )
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"{name} has no value.", field=f"parameters.{name}")
        values[name] = getattr(parameter, choice)
    return values


def _pooling(values: dict[str, Any]) -> pb.Pooling:
    pooling = values.pop("pooling", "mean")
    if pooling not in POOLINGS:
        raise InvalidRequest(
            f"pooling is {str(pooling)[:64]!r}; it is one of {', '.join(POOLINGS)}.",
            field="parameters.pooling",
        )
    return POOLINGS[pooling]


def _set(message: Message, name: str, value: Any) -> None:
    """Set a field; a list, which is that of stop strings, gets the value as its only element."""
    field = message.DESCRIPTOR.fields_by_name[name]
    kinds = _TYPES[field.cpp_type]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _unfit(name, value)
    try:
        if name == "stop":
            getattr(message, name).append(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise _unfit(name, value) from error


def _unfit(name: str, value: Any) -> InvalidRequest:
    return InvalidRequest(
        f"{name} is {str(value)[:64]!r}, which it cannot be; see the ranges of lorary.v1's SamplingParams.",
        field=f"parameters.{name}",
    )
