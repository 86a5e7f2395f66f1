"""From OpenAI's bodies to our own requests: names and shapes are checked here, ranges by ``validate``.

``model`` is a ref; empty, left out, or the base's own name is the bare base. Beside OpenAI's members those of
vLLM are taken: ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos``, ``stop_token_ids``,
``priority`` (as in SGLang, higher is sooner), ``structured_outputs``. ``execution`` is ours: auto, batched, merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.server.http.body import Fields, json_text, unicode_text
from lorary.server.http.tools import read_tool_calls, read_tools
from lorary.server.validate import MAX_INPUTS, POOLINGS
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_PROMPTS = 128
"""Prompts of one call of /v1/completions."""

# What OpenAI's clients may send that changes nothing about an answer of ours.
IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
_REFUSED_CHAT = {
    "audio": "answers are text.",
    "functions": "it is the old name of tools. Send those.",
    "function_call": "it is the old name of tool_choice. Send that.",
    "prediction": "drafts are the server's own (--draft-rows). Leave it out.",
    "web_search_options": "the model reads the messages and nothing else. Leave it out.",
}
_REFUSED_COMPLETION = {"suffix": "the base continues texts, it does not fill them. Leave it out."}

EXECUTIONS = {
    "auto": pb.EXECUTION_AUTO,
    "batched": pb.EXECUTION_BATCHED,
    "merged": pb.EXECUTION_MERGED,
}

# OpenAI's own defaults, where ours differ: a client that sends no temperature expects to sample.
DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a body asks for.

    Attributes:
        model: as it was sent, to be told again in the answer.
        requests: one for each prompt.
        num_answers: to each of them.
        has_logprobs: whether answers carry log probabilities.
        has_usage: whether a stream ends with the counts.
        is_echo: whether each prompt goes before its answers.
        is_silent: whether that is all, and nothing is generated.
    """

    model: str
    requests: tuple[pb.GenerateRequest, ...]
    num_answers: int
    has_logprobs: bool
    is_stream: bool
    has_usage: bool
    is_echo: bool = False
    is_silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsAsk:
    """What a body of /v1/embeddings asks for; ``model`` is told again, vectors as numbers or as their bytes."""

    model: str
    request: pb.EmbedRequest
    is_base64: bool


def read_chat(members: Mapping[str, Any], base: str) -> Ask:
    """Return what a body of /v1/chat/completions asks for.

    Raises:
        InvalidRequest: a member is unknown, of the wrong type, or cannot be served.
    """
    fields = Fields(members)
    model, adapter = read_model(fields, base)
    chat = read_messages(fields)
    params = _sampling(fields)
    limit = fields.integer("max_completion_tokens")
    if limit is not None:
        _set(fields, params, "max_tokens", limit, name="max_completion_tokens")
    has_logprobs = fields.switch("logprobs")
    top = fields.integer("top_logprobs")
    if has_logprobs:
        _set(fields, params, "logprobs", top or 0, name="top_logprobs")
    elif top:
        raise fields.error("top_logprobs", f"top_logprobs is {top} without logprobs: true. Set it.")
    if fields.take("modalities") not in (None, ["text"]):
        raise fields.error("modalities", "modalities is more than text; answers are text.")
    fields.refuse(_REFUSED_CHAT)
    request = _request(fields, adapter, params)
    request.input.chat.CopyFrom(chat)
    is_stream, has_usage = _streaming(fields)
    fields.finish(IGNORED)
    return Ask(
        model=model,
        requests=(request,),
        num_answers=params.n,
        has_logprobs=has_logprobs,
        is_stream=is_stream,
        has_usage=has_usage,
    )


def read_completion(members: Mapping[str, Any], base: str) -> Ask:
    """Return what a body of /v1/completions asks for; raises as ``read_chat``."""
    fields = Fields(members)
    model, adapter = read_model(fields, base)
    prompts = _prompts(fields, "prompt", field="prompt", most=MAX_PROMPTS)
    params = _sampling(fields)
    logprobs = fields.integer("logprobs")
    if logprobs is not None:
        _set(fields, params, "logprobs", logprobs)
    best_of = fields.integer("best_of")
    if best_of not in (None, params.n):
        raise fields.error(
            "best_of",
            f"best_of is {best_of} and n is {params.n}: this server returns every answer it makes. "
            "Leave best_of out, and choose among n answers by their logprobs.",
        )
    is_echo = fields.switch("echo")
    is_silent = is_echo and params.max_tokens == 0 and params.HasField("max_tokens")
    if is_silent:
        params.max_tokens = 1  # whoever reads a prompt to its end has made a token
    if is_echo and logprobs is not None:
        _set(fields, params, "prompt_logprobs", logprobs, name="logprobs")
    fields.refuse(_REFUSED_COMPLETION)
    template = _request(fields, adapter, params)
    is_stream, has_usage = _streaming(fields)
    if is_stream and is_echo and (is_silent or logprobs is not None):
        raise fields.error(
            "stream", "stream was sent with echo and logprobs or max_tokens 0. Ask for it whole."
        )
    fields.finish(IGNORED)
    requests = []
    for prompt in prompts:
        request = pb.GenerateRequest()
        request.CopyFrom(template)
        request.input.CopyFrom(prompt)
        requests.append(request)
    return Ask(
        model=model,
        requests=tuple(requests),
        num_answers=params.n,
        has_logprobs=logprobs is not None,
        is_stream=is_stream,
        has_usage=has_usage,
        is_echo=is_echo,
        is_silent=is_silent,
    )


def read_embeddings(members: Mapping[str, Any], base: str) -> EmbeddingsAsk:
    """Return what a body of /v1/embeddings asks for; raises as ``read_chat``."""
    fields = Fields(members)
    model, adapter = read_model(fields, base)
    inputs = _prompts(fields, "input", field="inputs", most=MAX_INPUTS)
    if fields.switch("use_template"):
        inputs = [_for_template(fields, one) for one in inputs]
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise fields.error(
            "encoding_format", f"encoding_format is {encoding[:32]!r}; it is float or base64."
        )
    pooling = fields.text("pooling") or "mean"
    if pooling not in POOLINGS:
        raise fields.error(
            "pooling", f"pooling is {pooling[:32]!r}; it is one of {', '.join(POOLINGS)}."
        )
    normalize = fields.boolean("normalize")
    request = pb.EmbedRequest(
        adapter=adapter,
        inputs=inputs,
        pooling=POOLINGS[pooling],
        # OpenAI's have length 1, and who compares them by their product relies on it.
        normalize=normalize is not False,
    )
    _set(fields, request, "dimensions", fields.integer("dimensions"))
    _read_place(fields, request)
    fields.finish(IGNORED)
    return EmbeddingsAsk(model=model, request=request, is_base64=encoding == "base64")


def _for_template(fields: Fields, message: pb.Input) -> pb.Input:
    if message.WhichOneof("input") == "token_ids":
        raise fields.error(
            "use_template", "use_template was sent with token ids, which are read as they are."
        )
    return pb.Input(text=message.prompt)


def read_model(fields: Fields, base: str) -> tuple[str, str]:
    """Return ``model`` as it was sent, and the ref that it is; empty for the bare base."""
    model = fields.text("model") or ""
    return model or base, "" if model == base else model


def read_messages(fields: Fields) -> pb.ChatMessages:
    """Return a chat: its messages, its tools, and how the prompt is made of them."""
    messages = fields.list("messages", dict, "objects")
    if not messages:
        raise fields.error("messages", "messages is empty; send at least one.")
    chat = pb.ChatMessages(
        messages=[_message(Fields(m, f"messages[{i}].")) for i, m in enumerate(messages)],
        prefer_task=not fields.switch("use_chat_template"),
    )
    read_tools(fields, chat)
    return chat


def _message(fields: Fields) -> pb.ChatMessage:
    role = fields.text("role") or ""
    content = fields.take("content")
    if isinstance(content, list):
        content = "".join(_part(part, fields) for part in content)
    calls = read_tool_calls(fields)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise fields.error("content", "content is no text; send a string, or parts of type text.")
    call_id = fields.text("tool_call_id") or ""
    fields.refuse(
        {"function_call": "it is the old name of tool_calls. Send those.", "audio": "send text."}
    )
    fields.finish({"name", "refusal", "annotations"})
    return pb.ChatMessage(
        # OpenAI's newer name for the same thing.
        role="system" if role == "developer" else role,
        content=unicode_text(fields, "content", content),
        tool_calls=calls,
        tool_call_id=call_id,
    )


def _part(part: Any, fields: Fields) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise fields.error("content", "content has a part that is no text; the base reads text only.")


def _prompts(fields: Fields, name: str, *, field: str, most: int) -> list[pb.Input]:
    """Return every prompt of a member: a text, token ids, or a list of either; at most so many.

    ``field`` is what errors are about, as the protocol calls it (``problems`` tells it as the member).
    """
    prompt = fields.take(name)
    if prompt == []:
        raise fields.error(field, f"{name} is empty; send a text, or token ids.")
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = prompt if many else [prompt]
    if len(prompts) > most:
        raise fields.error(
            field, f"{name} holds {len(prompts)} texts; at most {most} are taken together."
        )
    return [
        _prompt(fields, one, f"{field}[{i}]" if many else field) for i, one in enumerate(prompts)
    ]


def _prompt(fields: Fields, prompt: Any, name: str) -> pb.Input:
    if isinstance(prompt, str):
        return pb.Input(prompt=unicode_text(fields, name, prompt))
    if isinstance(prompt, list) and all(type(i) is int for i in prompt):
        try:
            return pb.Input(token_ids=pb.TokenIds(ids=prompt))
        except ValueError as error:
            raise fields.error(name, f"{name} has an id out of range: {error}.") from error
    raise fields.error(name, f"{name} must be a text, or a list of token ids.")


def _request(fields: Fields, adapter: str, params: pb.SamplingParams) -> pb.GenerateRequest:
    request = pb.GenerateRequest(adapter=adapter, sampling=params)
    _read_place(fields, request)
    return request


def _read_place(fields: Fields, request: pb.GenerateRequest | pb.EmbedRequest) -> None:
    """Read how soon, and in what way, a call is to be served."""
    priority = fields.integer("priority")
    if priority is not None:
        try:
            request.priority = priority
        except ValueError as error:
            raise fields.error("priority", f"priority is {priority}: {error}.") from error
    execution = fields.text("execution")
    if execution is not None:
        if execution not in EXECUTIONS:
            raise fields.error(
                "execution",
                f"execution is {execution[:32]!r}; it is one of {', '.join(EXECUTIONS)}.",
            )
        request.execution = EXECUTIONS[execution]


def _sampling(fields: Fields) -> pb.SamplingParams:
    """Return what both kinds of body have of sampling."""
    params = pb.SamplingParams(temperature=DEFAULT_TEMPERATURE, n=1)
    for name in (
        *("temperature", "top_p", "min_p"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty"),
    ):
        _set(fields, params, name, fields.number(name))
    for name in ("n", "max_tokens", "min_tokens"):
        _set(fields, params, name, fields.integer(name))
    top_k = fields.integer("top_k")
    _set(fields, params, "top_k", 0 if top_k == -1 else top_k)  # vLLM's word for all
    seed = fields.integer("seed")
    # OpenAI's seeds are signed.
    _set(fields, params, "seed", seed + 2**64 if seed is not None and seed < 0 else seed)
    params.ignore_eos = fields.switch("ignore_eos")
    stop = fields.take("stop")
    if isinstance(stop, str):
        stop = [stop]
    elif stop is not None:
        stop = Fields({"stop": stop}).list("stop", str, "strings")
    params.stop.extend(unicode_text(fields, "stop", text) for text in stop or ())
    _constrain(fields, params)
    _bias(fields, params)
    for i, token_id in enumerate(fields.list("stop_token_ids", int, "token ids") or ()):
        try:
            params.stop_token_ids.append(token_id)
        except ValueError as error:
            raise fields.error(f"stop_token_ids[{i}]", f"{token_id} is no token id.") from error
    return params


def _constrain(fields: Fields, params: pb.SamplingParams) -> None:
    """Read what the answer must be: OpenAI's response_format, or vLLM's structured_outputs."""
    wanted = fields.object("response_format")
    if wanted is not None:
        kind = wanted.text("type")
        schema: Any = {"type": "object"}
        if kind == "json_schema":
            named = wanted.object("json_schema")
            schema = named.take("schema") if named is not None else None
            if not isinstance(schema, dict | bool):
                raise fields.error("response_format", "response_format has no json_schema.schema.")
        elif kind not in ("json_object", "text"):
            raise wanted.error("type", f"type is {kind!r}; it is text, json_object or json_schema.")
        wanted.finish()
        if kind != "text":
            params.json_schema = json_text(fields, "response_format", schema)
    outputs = fields.object("structured_outputs")
    if outputs is None:
        return
    if params.WhichOneof("constraint") is not None:
        raise fields.error(
            "structured_outputs", "structured_outputs was sent with response_format."
        )
    schema = outputs.take("json")
    if schema is not None:
        params.json_schema = (
            unicode_text(outputs, "json", schema)
            if isinstance(schema, str)
            else json_text(outputs, "json", schema)
        )
    for name, field in (("regex", "regex"), ("grammar", "lark")):
        text = outputs.text(name)
        if text is not None:
            setattr(params, field, text)
    choices = outputs.list("choice", str, "texts")
    if choices is not None:
        params.choice.texts.extend(unicode_text(outputs, "choice", text) for text in choices)
    outputs.finish()


def _bias(fields: Fields, params: pb.SamplingParams) -> None:
    """Read logit_bias, whose keys are token ids as strings."""
    given = fields.mapping("logit_bias") or {}
    values = fields.within("logit_bias", given)
    for token_id in given:
        value = values.number(token_id)
        try:
            if value is not None:
                params.logit_bias[int(token_id)] = value
        except ValueError as error:
            raise fields.error(
                "logit_bias", f"logit_bias has {token_id[:32]!r}, which is no token id."
            ) from error


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """Return whether to stream, and whether the usage comes at the end of the stream."""
    is_stream = fields.switch("stream")
    options = fields.object("stream_options")
    if options is None:
        return is_stream, False
    has_usage = options.switch("include_usage")
    options.finish({"include_obfuscation"})
    if not is_stream:
        raise fields.error("stream_options", "stream_options was sent without stream: true.")
    return is_stream, has_usage


def _set(
    fields: Fields,
    params: pb.SamplingParams | pb.EmbedRequest,
    field: str,
    value: float | None,
    *,
    name: str = "",
) -> None:
    """Set a field; what protobuf cannot hold is out of range as well."""
    if value is None:
        return
    try:
        setattr(params, field, value)
    except (TypeError, ValueError) as error:
        name = name or field
        raise fields.error(name, f"{name} is {value}, which is out of its range.") from error
