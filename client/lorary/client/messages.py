"""From arguments to requests, and from responses to results; shared by both clients."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypeAlias, TypedDict, TypeVar, cast

from lorary.client.results import (
    AdapterInfo,
    Chunk,
    Classification,
    ComposedAdapter,
    Embedding,
    Execution,
    FinishReason,
    GenerateResult,
    Pooling,
    PositionLogprobs,
    Receipt,
    Scored,
    ScoredText,
    ServerInfo,
    Timings,
    Tokens,
    ToolCall,
    ToolCallPiece,
    Usage,
)
from lorary.errors import InvalidRequest
from lorary.v1 import control_pb2, inference_pb2

Adapters: TypeAlias = Sequence[tuple[str, float]] | Mapping[str, float]
"""Refs with weights."""
Call = TypeVar(
    "Call",
    inference_pb2.GenerateRequest,
    inference_pb2.ClassifyRequest,
    inference_pb2.ScoreRequest,
    inference_pb2.EmbedRequest,
)
Number = TypeVar("Number")

FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
TOOL_MODES = {
    "none": inference_pb2.TOOL_MODE_NONE,
    "auto": inference_pb2.TOOL_MODE_AUTO,
    "required": inference_pb2.TOOL_MODE_REQUIRED,
}

POOLINGS = {"mean": inference_pb2.POOLING_MEAN, "last": inference_pb2.POOLING_LAST}

EXECUTIONS = {
    "auto": inference_pb2.EXECUTION_UNSPECIFIED,
    "batched": inference_pb2.EXECUTION_BATCHED,
    "merged": inference_pb2.EXECUTION_MERGED,
}

CONSTRAINTS = ("choice", "json_schema", "regex", "lark")
"""Options that say what an answer must be; at most one of them."""


class Message(TypedDict, total=False):
    """One turn of a conversation; ``role`` is system, user, assistant or tool.

    ``tool_calls`` are OpenAI's: ``{"id": …, "type": "function", "function": {"name": …, "arguments": "{…}"}}``.
    """

    role: Required[str]
    content: str | None
    tool_calls: Sequence[Mapping[str, Any]]
    """In an assistant's turn: what it asked for (``ToolCall.to_message``)."""
    tool_call_id: str
    """In a tool's turn: which call it answers."""


class ToolOptions(TypedDict, total=False):
    """Functions that the model may call, with ``messages``."""

    tools: Sequence[Mapping[str, Any]]
    """OpenAI's: ``{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}``."""
    tool_choice: str | Mapping[str, Any]
    """``auto`` (default), ``none``, ``required``, or ``{"type": "function", "function": {"name": …}}``."""
    parallel_tool_calls: bool
    """Whether one answer may hold several calls; default true."""


class SamplingOptions(TypedDict, total=False):
    """How the next token is chosen; what is left out takes the adapter's or the server's default."""

    temperature: float
    """0 takes the most likely token (default); at most 100."""
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    seed: int
    logprobs: int
    prompt_logprobs: int
    choice: Sequence[str]
    """The answer is one of these texts."""
    json_schema: str | Mapping[str, Any]
    """The answer is JSON that this schema allows; ``{}`` is any."""
    regex: str
    """This regular expression matches the whole answer."""
    lark: str
    """The answer is a sentence of this grammar."""
    logit_bias: Mapping[int, float]
    """Added to the logits of token ids; [-100, 100]."""


class GenerateOptions(SamplingOptions, ToolOptions, total=False):
    """How to answer, and with which functions."""


def make_input(
    text: str | None,
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
) -> inference_pb2.Input:
    """Return the input message for exactly one of the four.

    Raises:
        InvalidRequest: none or several are given.
    """
    _check_one("input", text=text, prompt=prompt, messages=messages, token_ids=token_ids)
    if messages is not None:
        turns = [_turn(turn) for turn in messages]
        return inference_pb2.Input(chat=inference_pb2.ChatMessages(messages=turns))
    if token_ids is not None:
        return inference_pb2.Input(token_ids=_set("input.token_ids", _token_ids, token_ids))
    if prompt is not None:
        return inference_pb2.Input(prompt=prompt)
    return inference_pb2.Input(text=text or "")


def _check_one(field: str, **given: object) -> None:
    """Check that exactly one of the arguments is given.

    Raises:
        InvalidRequest: none or several are.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InvalidRequest(
            f"give exactly one of {', '.join(given)}; got {named or 'none'}.", field=field
        )


def _turn(turn: Message) -> inference_pb2.ChatMessage:
    rest: dict[str, Any] = dict(turn)
    calls = [_tool_call(call) for call in rest.pop("tool_calls", None) or ()]
    content = rest.pop("content", None) or ""
    return inference_pb2.ChatMessage(content=content, tool_calls=calls, **rest)


def _tool_call(call: Mapping[str, Any]) -> inference_pb2.ToolCall:
    try:
        function = call["function"]
        return inference_pb2.ToolCall(
            id=call["id"], name=function["name"], arguments=function["arguments"]
        )
    except (KeyError, TypeError) as error:
        raise InvalidRequest(
            f"a tool call of a message has no id, or no function with name and arguments: {call!r}.",
            field="input.chat.messages",
        ) from error


def add_tools(chat: inference_pb2.ChatMessages, options: Mapping[str, Any]) -> None:
    """Put the functions that may be called into a chat; ``None`` is the same as left out.

    Raises:
        InvalidRequest: they do not have OpenAI's shape; what they hold is the server's affair.
    """
    try:
        for tool in options.get("tools") or ():
            function = tool["function"]
            parameters = function.get("parameters")
            chat.tools.add(
                name=function["name"],
                description=function.get("description") or "",
                parameters="" if parameters is None else json.dumps(parameters),
            )
        choice = options.get("tool_choice")
        if isinstance(choice, Mapping):
            chat.tool_choice.mode = inference_pb2.TOOL_MODE_REQUIRED
            chat.tool_choice.functions.append(choice["function"]["name"])
            chat.parallel_tool_calls = False
        elif choice is not None:
            chat.tool_choice.mode = TOOL_MODES[choice]
        if options.get("parallel_tool_calls") is not None:
            chat.parallel_tool_calls = options["parallel_tool_calls"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"tools and tool_choice do not have OpenAI's shape: {error!r}. Send "
            '{"type": "function", "function": {"name": …}}, and auto, none, required or a function.',
            field="input.chat.tools",
        ) from error


def make_sampling(options: Mapping[str, Any]) -> inference_pb2.SamplingParams:
    """Return the sampling message; ``None`` is the same as left out.

    Raises:
        TypeError: an option that does not exist.
        InvalidRequest: a value that cannot be sent at all; ranges are the server's affair.
    """
    known = set(inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    params = inference_pb2.SamplingParams()
    constraints = [name for name in CONSTRAINTS if options.get(name) is not None]
    if len(constraints) > 1:
        raise InvalidRequest(
            f"{' and '.join(constraints)} were given; an answer has one constraint.",
            field=f"sampling.{constraints[1]}",
        )
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"'{name}' is no sampling option{hint}")
        if value is not None:
            _set(f"sampling.{name}", _assign, params, name, value)
    return params


def generate_request(
    n: int,
    text: str | None,
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    adapter: str,
    priority: int,
    request_id: str,
    sampling: Mapping[str, Any],
    adapters: Adapters = (),
    scale: float | None = None,
    routing_key: str = "",
    execution: Execution = "auto",
) -> inference_pb2.GenerateRequest:
    """Return the request for ``n`` answers; raises as ``make_input`` and ``make_sampling``."""
    chosen = {**sampling, "n": n}
    tools = {name: chosen.pop(name, None) for name in ToolOptions.__annotations__}
    read = make_input(text, prompt, messages, token_ids)
    if any(value is not None for value in tools.values()):
        if messages is None:
            raise InvalidRequest(
                "tools were given without messages; only a chat can call them.", field="input"
            )
        add_tools(read.chat, tools)
    request = inference_pb2.GenerateRequest(
        adapter=adapter,
        input=read,
        sampling=make_sampling(chosen),
        request_id=request_id,
        adapters=weighted(adapters),
        routing_key=routing_key,
        execution=_number("execution", execution, EXECUTIONS),
    )
    return _with_numbers(request, priority, scale)


def classify_request(
    text: str | None,
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    adapter: str,
    labels: Sequence[str],
    priority: int,
    request_id: str,
    adapters: Adapters = (),
    scale: float | None = None,
    routing_key: str = "",
    execution: Execution = "auto",
) -> inference_pb2.ClassifyRequest:
    """Return the request for labels' probabilities; raises as ``make_input``."""
    request = inference_pb2.ClassifyRequest(
        adapter=adapter,
        input=make_input(text, prompt, messages, token_ids),
        labels=labels,
        request_id=request_id,
        adapters=weighted(adapters),
        routing_key=routing_key,
        execution=_number("execution", execution, EXECUTIONS),
    )
    return _with_numbers(request, priority, scale)


def embed_request(
    texts: str | Sequence[str] | None,
    prompts: str | Sequence[str] | None,
    token_ids: Sequence[Sequence[int]] | None,
    adapter: str,
    pooling: Pooling,
    normalize: bool,
    dimensions: int | None,
    priority: int,
    request_id: str,
    adapters: Adapters = (),
    scale: float | None = None,
    routing_key: str = "",
    execution: Execution = "auto",
) -> inference_pb2.EmbedRequest:
    """Return the request for vectors; limits are the server's affair.

    Raises:
        InvalidRequest: none or several of the three are given, or a value cannot be sent at all.
    """
    _check_one("inputs", texts=texts, prompts=prompts, token_ids=token_ids)
    pooled = _number("pooling", pooling, POOLINGS)
    inputs = (
        [make_input(text, None, None, None) for text in _listed(texts)]
        + [make_input(None, prompt, None, None) for prompt in _listed(prompts)]
        + [make_input(None, None, None, ids) for ids in token_ids or ()]
    )
    request = inference_pb2.EmbedRequest(
        adapter=adapter,
        inputs=inputs,
        pooling=pooled,
        request_id=request_id,
        normalize=normalize,
        adapters=weighted(adapters),
        routing_key=routing_key,
        execution=_number("execution", execution, EXECUTIONS),
    )
    if dimensions is not None:
        _set("dimensions", setattr, request, "dimensions", dimensions)
    return _with_numbers(request, priority, scale)


def _listed(texts: str | Sequence[str] | None) -> Sequence[str]:
    """Return several texts; a single one may stand for a list of it."""
    return [texts] if isinstance(texts, str) else texts or ()


def _with_numbers(request: Call, priority: int, scale: float | None) -> Call:
    """Return a call's request with the numbers that all calls have, if they can be sent.

    Raises:
        InvalidRequest: they cannot.
    """
    _set("priority", setattr, request, "priority", priority)
    if scale is not None:
        _set("scale", setattr, request, "scale", scale)
    return request


def _number(field: str, value: str, numbers: Mapping[str, Number]) -> Number:
    """Return the message's number for a word.

    Raises:
        InvalidRequest: there is none.
    """
    if value not in numbers:
        raise InvalidRequest(
            f"{field} is {value!r}; it is one of {', '.join(numbers)}.", field=field
        )
    return numbers[value]


def score_request(
    continuations: Sequence[str],
    text: str | None,
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    adapter: str,
    with_end: bool,
    priority: int,
    request_id: str,
    adapters: Adapters = (),
    scale: float | None = None,
    routing_key: str = "",
    execution: Execution = "auto",
) -> inference_pb2.ScoreRequest:
    """Return the request for continuations' log probabilities; raises as ``make_input``."""
    request = inference_pb2.ScoreRequest(
        adapter=adapter,
        input=make_input(text, prompt, messages, token_ids),
        continuations=continuations,
        with_end=with_end,
        request_id=request_id,
        adapters=weighted(adapters),
        routing_key=routing_key,
        execution=_number("execution", execution, EXECUTIONS),
    )
    return _with_numbers(request, priority, scale)


def weighted(adapters: Adapters) -> list[inference_pb2.WeightedAdapter]:
    """Return the messages of a composition's parts; limits are the server's affair.

    Raises:
        InvalidRequest: a weight is not a number.
    """
    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
    parts = []
    for i, (ref, weight) in enumerate(pairs):
        part = inference_pb2.WeightedAdapter(adapter=ref)
        _set(f"adapters[{i}].weight", setattr, part, "weight", weight)
        parts.append(part)
    return parts


def _assign(params: inference_pb2.SamplingParams, name: str, value: Any) -> None:
    if name in ("stop", "stop_token_ids"):
        getattr(params, name).extend([value] if isinstance(value, str) else value)
    elif name == "choice":
        params.choice.texts.extend(value)
    elif name == "json_schema" and not isinstance(value, str):
        params.json_schema = json.dumps(value)
    elif name == "logit_bias":
        for token_id, bias in value.items():
            params.logit_bias[token_id] = bias
    else:
        setattr(params, name, value)


def _token_ids(ids: Sequence[int]) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=ids)


def _set(field: str, function: Any, *args: Any) -> Any:
    """Call ``function``; what protobuf refuses becomes an InvalidRequest for ``field``."""
    try:
        return function(*args)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} cannot be {args[-1]!r}: {error}.", field=field) from error


class Answers:
    """Follows a Generate stream: events in, chunks and whole answers out."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[PositionLogprobs]] = {}

    def read(self, event: inference_pb2.GenerateResponse) -> Chunk | GenerateResult:
        """Return what one event says; a ``GenerateResult`` ends its answer."""
        if event.WhichOneof("event") == "chunk":
            return self._chunk(event.chunk)
        complete = event.complete
        return GenerateResult(
            index=complete.index,
            text=complete.text,
            token_ids=tuple(self._tokens.pop(complete.index, ())),
            finish_reason=FINISH_REASONS[complete.finish_reason],
            matched_stop=complete.matched_stop,
            usage=usage(complete.usage),
            receipt=receipt(complete.receipt),
            logprobs=tuple(self._logprobs.pop(complete.index, ())),
            prompt_logprobs=tuple(_position(one) for one in complete.prompt_logprobs),
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.name, arguments=call.arguments)
                for call in complete.tool_calls
            ),
        )

    def _chunk(self, message: inference_pb2.GenerateChunk) -> Chunk:
        chunk = Chunk(
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(_position(position) for position in message.logprobs),
            tool_calls=tuple(
                ToolCallPiece(index=one.index, id=one.id, name=one.name, arguments=one.arguments)
                for one in message.tool_calls
            ),
        )
        self._tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
        self._logprobs.setdefault(chunk.index, []).extend(chunk.logprobs)
        return chunk


def _position(message: inference_pb2.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=(message.chosen.token_id, message.chosen.logprob),
        top=tuple((one.token_id, one.logprob) for one in message.top),
    )


def usage(message: inference_pb2.Usage) -> Usage:
    """Return token counts."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def receipt(message: inference_pb2.Receipt) -> Receipt:
    """Return what answered; nanoseconds become seconds."""
    timings = message.timings
    return Receipt(
        ref=message.ref,
        name=message.name,
        version=message.version,
        digest=message.digest,
        base_fingerprint=message.base_fingerprint,
        quantization=message.quantization,
        request_id=message.request_id,
        canary=message.canary,
        is_merged=message.execution == inference_pb2.EXECUTION_MERGED,
        timings=Timings(
            queue_s=timings.queue_ns / 1e9,
            adapter_load_s=timings.adapter_load_ns / 1e9,
            prefill_s=timings.prefill_ns / 1e9,
            decode_s=timings.decode_ns / 1e9,
        ),
        parts=tuple(
            ComposedAdapter(
                ref=part.ref,
                name=part.name,
                version=part.version,
                digest=part.digest,
                weight=part.weight,
            )
            for part in message.parts
        ),
    )


def classification(message: inference_pb2.ClassifyResponse) -> Classification:
    """Return labels and their probabilities."""
    return Classification(
        label=message.scores[0].label,
        probabilities={score.label: score.probability for score in message.scores},
        logprobs={score.label: score.logprob for score in message.scores},
        usage=usage(message.usage),
        receipt=receipt(message.receipt),
    )


def scored(continuations: Sequence[str], message: inference_pb2.ScoreResponse) -> Scored:
    """Return continuations and how likely they are."""
    return Scored(
        texts=tuple(
            ScoredText(
                text=text,
                logprob=score.logprob,
                token_ids=tuple(token.token_id for token in score.tokens),
                logprobs=tuple(token.logprob for token in score.tokens),
            )
            for text, score in zip(continuations, message.scores, strict=True)
        ),
        usage=usage(message.usage),
        receipt=receipt(message.receipt),
    )


def embeddings(message: inference_pb2.EmbedResponse) -> list[Embedding]:
    """Return vectors, in the order of their inputs."""
    return [
        Embedding(values=tuple(one.values), usage=usage(one.usage), receipt=receipt(one.receipt))
        for one in message.embeddings
    ]


def tokens(message: inference_pb2.TokenizeResponse) -> Tokens:
    """Return ids and pieces."""
    return Tokens(token_ids=tuple(message.token_ids), pieces=tuple(message.pieces))


def server_info(message: inference_pb2.GetServerInfoResponse) -> ServerInfo:
    """Return the server's description."""
    fields = {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}
    steps = tuple(fields.pop("steps_by_distinct_adapters"))
    return ServerInfo(**fields, steps_by_distinct_adapters=steps)


def adapter_info(message: control_pb2.Adapter) -> AdapterInfo:
    """Return one version's state."""
    name = control_pb2.Residency.Name(message.residency).removeprefix("RESIDENCY_").lower()
    return AdapterInfo(
        name=message.name,
        version=message.version,
        digest=message.digest,
        aliases=tuple(message.aliases),
        residency=cast("Any", name),
        pinned=message.pinned,
        rank=message.rank,
        device_bytes=message.device_bytes,
        num_running=message.num_running,
        task=message.task,
        verified=message.verified,
        verified_divergence=message.verified_divergence,
        verified_limit=message.verified_limit,
        quarantined=message.quarantined,
        num_served=message.num_served,
        last_used_s=message.last_used_unix_ms / 1000,
        canaries=tuple((c.alias, c.percent, c.shadow) for c in message.canaries),
        num_pages=message.num_pages,
        merged=message.merged,
        merged_bytes=message.merged_bytes,
        merged_running=message.merged_running,
        merged_divergence=message.merged_divergence,
    )


def unload_request(adapter: str, *, force: bool) -> control_pb2.UnloadAdapterRequest:
    """Return the request to unload a version."""
    mode = control_pb2.UNLOAD_MODE_FORCE if force else control_pb2.UNLOAD_MODE_DRAIN
    return control_pb2.UnloadAdapterRequest(adapter=adapter, mode=mode)
