"""From a message to the engine's nouns: every range of ``inference.proto`` is checked here.

Checks run before any work; each raises ``InvalidRequest`` with the dotted path of its field.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lorary.errors import InvalidRequest
from lorary.server.engine.request import Constraint, Execution, Pooling, Sampling
from lorary.server.interceptors import MAX_REQUEST_ID_CHARS, is_valid_request_id
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lorary.registry.manifest import Task

DEFAULT_MAX_TOKENS = 256
MAX_ANSWERS = 16
MAX_LABELS = 128
MAX_INPUTS = 1024
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_CHOICES = 1024
MAX_CONSTRAINT_BYTES = 65_536
MAX_MESSAGES = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TEMPERATURE = 100.0
MAX_PRIORITY = 10
MAX_ROUTING_KEY = 256
# No real text has this many characters per token; longer inputs are refused before the tokenizer
# spends seconds on them.
MAX_CHARS_PER_TOKEN = 32
# What a vector's receipt and counts take in a message, generously.
RECEIPT_BYTES = 2048
POOLINGS = {"mean": pb.POOLING_MEAN, "last": pb.POOLING_LAST}
"""By the names that bodies and parameters have for them."""


# By the numbers of inference.proto.
_EXECUTIONS: dict[int, Execution] = {0: "auto", 1: "auto", 2: "batched", 3: "merged"}
_POOLINGS: dict[int, Literal["mean", "last"]] = {0: "mean", 1: "mean", 2: "last"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the resident base allows: tokens of prompt and answer together, ids, and components of a vector.

    ``max_message`` is the most bytes that an answer of one message may have.
    """

    max_context: int
    vocab_size: int
    hidden_size: int
    max_message: int


def hint_for(name: str, known: Collection[str]) -> str:
    """Return how an error about a name that is none of ``known`` ends: with the nearest of them, if one is near."""
    # What is longer is no misspelt option, and comparing it would take its time.
    near = difflib.get_close_matches(name[:64], known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ". Leave it out."


def check_request_id(value: str) -> None:
    """Refuse an id that could not travel in metadata and logs; an empty one is not given."""
    if value and not is_valid_request_id(value):
        raise InvalidRequest(
            f"request_id has {len(value)} characters, ones that are not printable ASCII, or spaces at its "
            f"ends; at most {MAX_REQUEST_ID_CHARS} printable ASCII characters are allowed. Shorten it, or leave "
            "it empty.",
            field="request_id",
        )


def check_routing_key(value: str) -> None:
    """Refuse a key longer than any that people route by."""
    if len(value) > MAX_ROUTING_KEY:
        raise InvalidRequest(
            f"routing_key has {len(value)} characters; at most {MAX_ROUTING_KEY} are allowed. Send "
            "a user's or a session's id, or leave it empty.",
            field="routing_key",
        )


def check_priority(value: int) -> None:
    """Refuse a priority out of range; one that is not given is 0."""
    if not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority is {value}; it must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], where higher is "
            "sooner.",
            field="priority",
        )


def check_execution(value: int) -> Execution:
    """Return how the adapter is to take part.

    Raises:
        InvalidRequest: a number that means nothing here.
    """
    execution = _EXECUTIONS.get(value)
    if execution is None:
        raise InvalidRequest(
            f"execution is {value}, which this server does not know; it is one of AUTO, BATCHED, MERGED.",
            field="execution",
        )
    return execution


def check_input(message: pb.Input, limits: Limits) -> str:
    """Check the shape of an input and return which kind it is.

    Returns:
        ``"text"``, ``"prompt"``, ``"chat"`` or ``"token_ids"``.

    Raises:
        InvalidRequest: none is set, it is empty, too long to fit, or an id is out of range.
    """
    kind: str | None = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest(
            "input is missing; set one of text, prompt, chat, token_ids.", field="input"
        )
    if kind == "token_ids":
        _check_token_ids(message.token_ids.ids, limits)
    elif kind == "chat":
        _check_chat(message.chat.messages, limits)
    else:
        _check_text(message.text if kind == "text" else message.prompt, f"input.{kind}", limits)
    return kind


def check_length(prompt_ids: Sequence[int], limits: Limits, *, room: int = 1) -> None:
    """Refuse a prompt that is empty, or leaves no room for ``room`` further tokens."""
    if not prompt_ids:
        raise InvalidRequest("the prompt has no tokens; send some text.", field="input")
    if len(prompt_ids) + room > limits.max_context:
        raise InvalidRequest(
            f"the prompt has {len(prompt_ids)} tokens and needs room for {room} more; this server's "
            f"context holds {limits.max_context}. Shorten it, or start the server with a larger "
            "--max-context.",
            field="input",
        )


def read_sampling(params: pb.SamplingParams, limits: Limits) -> tuple[Sampling, int]:
    """Check how to answer, without regard to prompt and adapter.

    Returns:
        The sampling, which ``complete`` still has to finish, and how many answers to draw.
    """
    values = {name: _number(params, name, *bounds) for name, bounds in _FLOATS.items()}
    for name in ("top_p", "repetition_penalty"):
        if values[name] == 0.0:
            raise _out_of_range(name, 0.0, _FLOATS[name][3])
    max_tokens = params.max_tokens if params.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_tokens < 1:
        raise _out_of_range("max_tokens", max_tokens, "at least 1")
    num_answers = params.n if params.HasField("n") else 1
    if not 1 <= num_answers <= MAX_ANSWERS:
        raise _out_of_range("n", num_answers, f"between 1 and {MAX_ANSWERS}")
    for name, asked in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if asked > MAX_LOGPROBS:
            raise _out_of_range(name, asked, f"at most {MAX_LOGPROBS}")
    sampling = Sampling(
        max_tokens=max_tokens,
        # A k that reaches the whole vocabulary filters nothing, which is what 0 says.
        top_k=params.top_k if params.top_k < limits.vocab_size else 0,
        min_tokens=params.min_tokens,
        stop=_stop_strings(params),
        stop_token_ids=_stop_token_ids(params, limits),
        ignore_eos=params.ignore_eos,
        seed=params.seed if params.HasField("seed") else None,
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        constraint=_constraint(params),
        logit_bias=_logit_bias(params, limits),
        shown_ids=(),  # callers do not choose them
        **values,
    )
    return sampling, num_answers


def complete(
    sampling: Sampling,
    params: pb.SamplingParams,
    task: Task | None,
    num_prompt_tokens: int,
    limits: Limits,
) -> Sampling:
    """Fill in the adapter's defaults and fit the answer into what the context has left.

    A default number of tokens is cut to the room there is; one that the caller asked for is never
    cut in silence.

    Raises:
        InvalidRequest: prompt and max_tokens exceed the context, or min_tokens exceeds max_tokens.
    """
    room = limits.max_context - num_prompt_tokens
    max_tokens = sampling.max_tokens
    if not params.HasField("max_tokens"):
        max_tokens = min(task.max_new_tokens if task else max_tokens, room)
    elif max_tokens > room:
        raise InvalidRequest(
            f"max_tokens is {max_tokens} and the prompt has {num_prompt_tokens} tokens; this "
            f"server's context holds {limits.max_context} together. Ask for at most {room}.",
            field="sampling.max_tokens",
        )
    if sampling.min_tokens > max_tokens:
        raise _out_of_range("min_tokens", sampling.min_tokens, f"at most max_tokens ({max_tokens})")
    stop = sampling.stop or (task.stop if task else ())
    return replace(sampling, max_tokens=max_tokens, stop=stop)


def read_labels(labels: Sequence[str], task: Task | None) -> tuple[str, ...]:
    """Return the labels to score: those sent, else the adapter's own.

    Raises:
        InvalidRequest: none, too many, an empty one, or two that are the same.
    """
    chosen = tuple(labels) or (task.labels if task else ())
    if not chosen:
        raise InvalidRequest(
            "no labels were sent and the adapter has none of its own; send the labels to score.",
            field="labels",
        )
    if len(chosen) > MAX_LABELS:
        raise InvalidRequest(
            f"{len(chosen)} labels were sent; at most {MAX_LABELS} can be scored. Send fewer.",
            field="labels",
        )
    seen: dict[str, int] = {}
    for i, label in enumerate(chosen):
        if not label.strip():
            raise InvalidRequest(f"label {i} is empty; name it.", field=f"labels[{i}]")
        if label in seen:
            raise InvalidRequest(
                f"labels {seen[label]} and {i} are both {label[:64]!r}; labels must differ.",
                field=f"labels[{i}]",
            )
        seen[label] = i
    return chosen


def check_continuations(texts: Sequence[str], limits: Limits) -> None:
    """Refuse none, too many, or one that no context can hold."""
    if not 0 < len(texts) <= MAX_LABELS:
        raise InvalidRequest(
            f"{len(texts)} continuations were sent; send 1 to {MAX_LABELS}.", field="continuations"
        )
    for i, text in enumerate(texts):
        _check_text(text, f"continuations[{i}]", limits)


def read_pooling(request: pb.EmbedRequest, limits: Limits) -> Pooling:
    """Return how each input of a call becomes a vector.

    Raises:
        InvalidRequest: no inputs or too many, a pooling that is not known, more dimensions than there are,
            or vectors that no message can hold together.
    """
    if not 0 < len(request.inputs) <= MAX_INPUTS:
        raise InvalidRequest(
            f"{len(request.inputs)} inputs were sent; send 1 to {MAX_INPUTS}.", field="inputs"
        )
    kind = _POOLINGS.get(request.pooling)
    if kind is None:
        raise InvalidRequest(
            f"pooling is {request.pooling}, which this server does not know; it is MEAN or LAST.",
            field="pooling",
        )
    dimensions = request.dimensions if request.HasField("dimensions") else limits.hidden_size
    if not 0 < dimensions <= limits.hidden_size:
        raise InvalidRequest(
            f"dimensions is {dimensions}; it must be between 1 and the base's hidden size, "
            f"{limits.hidden_size}.",
            field="dimensions",
        )
    num_bytes = len(request.inputs) * (4 * dimensions + RECEIPT_BYTES)
    if num_bytes > limits.max_message:
        raise InvalidRequest(
            f"{len(request.inputs)} vectors of {dimensions} components take up to {num_bytes} bytes with their "
            f"receipts; this server's messages hold {limits.max_message}. Send fewer inputs, ask for fewer "
            "dimensions, or raise --max-message.",
            field="inputs",
        )
    return Pooling(kind=kind, dimensions=dimensions, is_normalized=request.normalize)


# name: (default, lowest, highest, how the range reads)
_FLOATS: dict[str, tuple[float, float, float, str]] = {
    "temperature": (0.0, 0.0, MAX_TEMPERATURE, f"in [0, {MAX_TEMPERATURE:g}]"),
    "top_p": (1.0, 0.0, 1.0, "in (0, 1]"),
    "min_p": (0.0, 0.0, 1.0, "in [0, 1]"),
    "frequency_penalty": (0.0, -2.0, 2.0, "in [-2, 2]"),
    "presence_penalty": (0.0, -2.0, 2.0, "in [-2, 2]"),
    "repetition_penalty": (1.0, 0.0, 2.0, "in (0, 2]"),
}


def _number(
    params: pb.SamplingParams, name: str, default: float, lowest: float, highest: float, want: str
) -> float:
    if not params.HasField(name):  # type: ignore[arg-type]
        return default
    value = float(getattr(params, name))
    if not math.isfinite(value) or not lowest <= value <= highest:
        raise _out_of_range(name, value, want)
    return value


def _out_of_range(name: str, value: float, want: str) -> InvalidRequest:
    shown = value if isinstance(value, int) else f"{value:g}"
    return InvalidRequest(f"{name} is {shown}; it must be {want}.", field=f"sampling.{name}")


def _stop_strings(params: pb.SamplingParams) -> tuple[str, ...]:
    if len(params.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"{len(params.stop)} stop strings were sent; at most {MAX_STOP_STRINGS} are allowed.",
            field="sampling.stop",
        )
    for i, text in enumerate(params.stop):
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop string {i} has {len(text)} characters; it must have 1 to {MAX_STOP_CHARS}.",
                field=f"sampling.stop[{i}]",
            )
    return tuple(params.stop)


def _stop_token_ids(params: pb.SamplingParams, limits: Limits) -> tuple[int, ...]:
    ids = tuple(params.stop_token_ids)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"{len(ids)} stop token ids were sent; at most {MAX_STOP_TOKEN_IDS} are allowed.",
            field="sampling.stop_token_ids",
        )
    for i, token_id in enumerate(ids):
        if token_id >= limits.vocab_size:
            raise _not_in_vocabulary(token_id, f"sampling.stop_token_ids[{i}]", limits)
    return ids


def _constraint(params: pb.SamplingParams) -> Constraint | None:
    """Return what the answer must be; whether it compiles is found out later, on another thread."""
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    field = f"sampling.{kind}"
    if params.min_tokens or params.ignore_eos:
        raise InvalidRequest(
            f"{kind} was sent with min_tokens or ignore_eos; a constraint alone says where an answer "
            "may end. Leave the others out.",
            field=field,
        )
    text = getattr(params, kind) if kind != "choice" else _choices(params.choice.texts)
    num_bytes = len(text.encode())
    if not 0 < num_bytes <= MAX_CONSTRAINT_BYTES:
        raise InvalidRequest(
            f"{kind} has {num_bytes} bytes; it must have 1 to {MAX_CONSTRAINT_BYTES}.", field=field
        )
    return Constraint(kind, text)


def _choices(texts: Sequence[str]) -> str:
    if not 0 < len(texts) <= MAX_CHOICES or not all(texts):
        raise InvalidRequest(
            f"choice has {len(texts)} texts, or an empty one; send 1 to {MAX_CHOICES}, none empty.",
            field="sampling.choice",
        )
    return json.dumps(list(texts), ensure_ascii=False)


def _logit_bias(params: pb.SamplingParams, limits: Limits) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    if len(params.logit_bias) > MAX_BIASES:
        raise InvalidRequest(
            f"{len(params.logit_bias)} logit biases were sent; at most {MAX_BIASES} are allowed.",
            field=field,
        )
    for token_id, value in params.logit_bias.items():
        if token_id >= limits.vocab_size:
            raise _not_in_vocabulary(token_id, field, limits)
        if not -MAX_BIAS <= value <= MAX_BIAS:  # false for what is no number, too
            raise _out_of_range("logit_bias", value, f"in [-{MAX_BIAS:g}, {MAX_BIAS:g}]")
    return tuple(sorted(params.logit_bias.items()))


def _check_token_ids(ids: Sequence[int], limits: Limits) -> None:
    if not ids:
        raise InvalidRequest(
            "token_ids is empty; send at least one id.", field="input.token_ids.ids"
        )
    check_length(ids, limits)
    # One pass in C for the usual case; the slow one only names the culprit.
    if max(ids) >= limits.vocab_size:
        i = next(i for i, token_id in enumerate(ids) if token_id >= limits.vocab_size)
        raise _not_in_vocabulary(ids[i], f"input.token_ids.ids[{i}]", limits)


def _not_in_vocabulary(token_id: int, field: str, limits: Limits) -> InvalidRequest:
    return InvalidRequest(
        f"token id {token_id} is not in the base's vocabulary; ids are below {limits.vocab_size}.",
        field=field,
    )


def _check_chat(messages: Sequence[pb.ChatMessage], limits: Limits) -> None:
    field = "input.chat.messages"
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"{len(messages)} chat messages were sent; send 1 to {MAX_MESSAGES}.", field=field
        )
    for i, message in enumerate(messages):
        # A tool may return nothing, and who calls one need not say anything.
        if message.content or not (message.tool_calls or message.role == "tool"):
            _check_text(message.content, f"{field}[{i}].content", limits)
        for j, call in enumerate(message.tool_calls):
            where = f"{field}[{i}].tool_calls[{j}]"
            _check_text(call.arguments or "{}", f"{where}.arguments", limits)


def _check_text(text: str, field: str, limits: Limits) -> None:
    if not text:
        raise InvalidRequest(f"{field} is empty; send some text.", field=field)
    most = limits.max_context * MAX_CHARS_PER_TOKEN
    if len(text) > most:
        raise InvalidRequest(
            f"{field} has {len(text)} characters; this server's context of {limits.max_context} "
            f"tokens takes at most {most}. Shorten it.",
            field=field,
        )
