"""The HTTP door in OpenAPI's words, at ``/openapi.json``: for those who make clients, and for tools that try doors.

Members are those that ``requests`` and ``tokens`` take, and ranges those of ``validate``; tests compare both. What the
console's page asks for itself, and the Open Inference Protocol's paths, are not in it.
"""

from __future__ import annotations

from typing import Any

from lorary.errors import HTTP_STATUSES
from lorary.registry.refs import MAX_VERSION
from lorary.server import validate
from lorary.server.http.requests import EXECUTIONS, IGNORED, MAX_PROMPTS
from lorary.server.tools.definitions import MAX_TOOLS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ANY_OBJECT: Schema = {"type": "object"}
_IGNORED: Schema = {"description": "Taken, and changes nothing."}
_UINT32 = 2**32 - 1
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _UINT32}}
_MODEL = {
    **_TEXT,
    "description": "A ref: name, name@alias, name@3, name@sha256:…; empty: the bare base.",
}


def _number(low: float, high: float, **more: Any) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high, **more}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _object(properties: dict[str, Schema], *required: str, is_open: bool = False) -> Schema:
    """Return an object; ours refuse what they do not know, and answers may learn new members."""
    found: Schema = {"type": "object", "properties": properties, "required": list(required)}
    return found if is_open else {**found, "additionalProperties": False}


def _nullable(properties: dict[str, Schema]) -> dict[str, Schema]:
    """Say that null is the same as left out."""
    return {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in properties.items()}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_FUNCTION_NAME = {**_TEXT, "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_NAMED = _object(
    {"type": {"const": "function"}, "function": _object({"name": _FUNCTION_NAME}, "name")},
    *("type", "function"),
)
_SAMPLING: dict[str, Schema] = {
    "temperature": {**_number(0, validate.MAX_TEMPERATURE), "default": 1},
    "top_p": _number(0, 1, exclusiveMinimum=0),
    "top_k": {**_integer(-1, _UINT32), "description": "-1 and 0 keep all."},
    "min_p": _number(0, 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 2, exclusiveMinimum=0),
    "max_tokens": _integer(0, _UINT32),
    "min_tokens": _integer(0, _UINT32),
    "n": _integer(1, validate.MAX_ANSWERS),
    "seed": _integer(-(2**63), 2**64 - 1),
    "ignore_eos": _FLAG,
    "stop": {
        "anyOf": [
            {**_TEXT, "minLength": 1, "maxLength": validate.MAX_STOP_CHARS},
            {
                "type": "array",
                "items": {**_TEXT, "minLength": 1, "maxLength": validate.MAX_STOP_CHARS},
                "maxItems": validate.MAX_STOP_STRINGS,
            },
        ]
    },
    "stop_token_ids": {**_IDS, "maxItems": validate.MAX_STOP_TOKEN_IDS},
    "logit_bias": {
        "type": "object",
        "description": "Token ids as texts, to numbers.",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": _number(-validate.MAX_BIAS, validate.MAX_BIAS),
        "maxProperties": validate.MAX_BIASES,
    },
    "response_format": {
        "oneOf": [
            _object({"type": {"enum": ["text", "json_object"]}}, "type"),
            _object(
                {
                    "type": {"const": "json_schema"},
                    "json_schema": _object(
                        {"schema": {"type": ["object", "boolean"]}}, "schema", is_open=True
                    ),
                },
                *("type", "json_schema"),
            ),
        ]
    },
    "structured_outputs": _object(
        {
            "json": {"type": ["object", "string", "boolean"]},
            "regex": _TEXT,
            "grammar": _TEXT,
            "choice": {"type": "array", "items": _TEXT, "maxItems": validate.MAX_CHOICES},
        }
    ),
    "priority": _integer(-validate.MAX_PRIORITY, validate.MAX_PRIORITY),
    "execution": {"enum": list(EXECUTIONS)},
    "stream": _FLAG,
    "stream_options": _object({"include_usage": _FLAG, "include_obfuscation": _FLAG}),
    "model": _MODEL,
    **dict.fromkeys(sorted(IGNORED), _IGNORED),
}
"""What bodies of both kinds have."""
_CHAT: dict[str, Schema] = {
    "messages": {
        "type": "array",
        "items": _ref("Message"),
        "minItems": 1,
        "maxItems": validate.MAX_MESSAGES,
    },
    "use_chat_template": _FLAG,
    "tools": {"type": "array", "items": _ref("Tool"), "maxItems": MAX_TOOLS},
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            _NAMED,
            _object(
                {
                    "type": {"const": "allowed_tools"},
                    "allowed_tools": _object(
                        {
                            "mode": {"enum": ["auto", "required"]},
                            "tools": {"type": "array", "items": _NAMED, "minItems": 1},
                        },
                        *("mode", "tools"),
                    ),
                },
                *("type", "allowed_tools"),
            ),
        ]
    },
    "parallel_tool_calls": _FLAG,
}
_MESSAGE = _object(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        **_nullable(
            {
                "content": {
                    "anyOf": [
                        _TEXT,
                        {
                            "type": "array",
                            "items": _object(
                                {"type": {"const": "text"}, "text": _TEXT},
                                *("type", "text"),
                                is_open=True,
                            ),
                        },
                    ]
                },
                "tool_calls": {"type": "array", "items": _ref("ToolCall")},
                "tool_call_id": _TEXT,
            }
        ),
        **dict.fromkeys(("name", "refusal", "annotations"), _IGNORED),
    },
    "role",
)
_TOOL = _object(
    {
        "type": {"const": "function"},
        "function": _object(
            {
                "name": _FUNCTION_NAME,
                **_nullable({"description": _TEXT, "parameters": _ANY_OBJECT, "strict": _FLAG}),
            },
            "name",
        ),
    },
    *("type", "function"),
)
_TOOL_CALL = _object(
    {
        "id": {**_TEXT, "minLength": 1},
        "type": {"const": "function"},
        "function": _object(
            {
                "name": _FUNCTION_NAME,
                "arguments": {**_TEXT, "description": "A JSON object, as text."},
            },
            "name",
        ),
        "index": {},
    },
    *("id", "type", "function"),
)
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}, "cached_tokens", is_open=True),
    },
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    is_open=True,
)
_RECEIPT = _object(
    {
        "adapter": _TEXT,
        "version": _integer(0, MAX_VERSION),
        "digest": _TEXT,
        "ref": _TEXT,
        "base_fingerprint": _TEXT,
    },
    *("adapter", "version", "digest", "ref", "base_fingerprint"),
    is_open=True,
)
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_ERROR = _object(
    {
        "error": _object(
            {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": _TEXT,
            },
            *("message", "type", "param", "code"),
        )
    },
    "error",
)


def _answer(kind: str, said: dict[str, Schema]) -> Schema:
    choice = _object(
        {
            "index": _COUNT,
            **said,
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": _FINISH,
            "stop_reason": {"type": ["string", "null"]},
        },
        *("index", *said, "finish_reason"),
        is_open=True,
    )
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "choices": {"type": "array", "items": choice, "minItems": 1},
            "usage": _ref("Usage"),
            "lorary": _ref("Receipt"),
        },
        *("id", "object", "created", "model", "choices", "usage", "lorary"),
        is_open=True,
    )


_SCHEMAS: dict[str, Schema] = {
    "ChatRequest": _object(
        {
            "messages": _CHAT["messages"],
            **_nullable(
                {
                    **_SAMPLING,
                    **{name: schema for name, schema in _CHAT.items() if name != "messages"},
                    "max_completion_tokens": _integer(1, _UINT32),
                    "logprobs": _FLAG,
                    "top_logprobs": _integer(0, validate.MAX_LOGPROBS),
                    "modalities": {"const": ["text"]},
                }
            ),
        },
        "messages",
    ),
    "CompletionRequest": _object(
        {
            "prompt": {
                "anyOf": [
                    _TEXT,
                    _IDS,
                    {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
                    {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
                ]
            },
            **_nullable(
                {
                    **_SAMPLING,
                    "logprobs": _integer(0, validate.MAX_LOGPROBS),
                    "echo": _FLAG,
                    "best_of": {**_integer(1, validate.MAX_ANSWERS), "description": "As n."},
                }
            ),
        },
        "prompt",
    ),
    "EmbeddingsRequest": _object(
        {
            "input": {
                "anyOf": [
                    _TEXT,
                    _IDS,
                    {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": validate.MAX_INPUTS},
                    {"type": "array", "items": _IDS, "minItems": 1, "maxItems": validate.MAX_INPUTS},
                ]
            },
            **_nullable(
                {
                    "model": _MODEL,
                    "use_template": _FLAG,
                    "encoding_format": {"enum": ["float", "base64"]},
                    "pooling": {"enum": list(validate.POOLINGS)},
                    "normalize": _FLAG,
                    "dimensions": _integer(1, _UINT32),
                    "priority": _SAMPLING["priority"],
                    "execution": _SAMPLING["execution"],
                    **dict.fromkeys(sorted(IGNORED), _IGNORED),
                }
            ),
        },
        "input",
    ),
    "TokenizeRequest": _object(
        {
            **_nullable({"model": _MODEL, "prompt": _TEXT, **_CHAT, "return_token_strs": _FLAG}),
            "add_special_tokens": {},
            "add_generation_prompt": {},
        }
    ),
    "DetokenizeRequest": _object({"tokens": _IDS, **_nullable({"model": _MODEL})}, "tokens"),
    "Message": _MESSAGE,
    "Tool": _TOOL,
    "ToolCall": _TOOL_CALL,
    "Usage": _USAGE,
    "Receipt": _RECEIPT,
    "Chat": _answer("chat.completion", {"message": _object({"role": {"const": "assistant"}}, is_open=True)}),
    "Completion": _answer("text_completion", {"text": _TEXT}),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": _ANY_OBJECT, "minItems": 1},
            "model": _TEXT,
            "usage": _ANY_OBJECT,
            "lorary": _ref("Receipt"),
        },
        *("object", "data", "model", "usage", "lorary"),
    ),
    "Tokens": _object(
        {
            "tokens": _IDS,
            "count": _COUNT,
            "max_model_len": _COUNT,
            "token_strs": {"type": ["array", "null"], "items": _TEXT},
        },
        *("tokens", "count", "max_model_len"),
    ),
    "Text": _object({"prompt": _TEXT}, "prompt"),
    "Model": _object(
        {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "lorary": _ANY_OBJECT},
        *("id", "object", "created", "lorary"),
        is_open=True,
    ),
    "Models": _object(
        {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}},
        *("object", "data"),
    ),
    "Error": _ERROR,
}  # fmt: skip


def _json(schema: str) -> Schema:
    return {"application/json": {"schema": _ref(schema)}}


def _errors(*further: int) -> dict[str, Schema]:
    statuses = sorted({*HTTP_STATUSES.values(), *further} - {499})  # 499 is for who is not there
    return {str(one): {"description": "Refused.", "content": _json("Error")} for one in statuses}


def _post(summary: str, request: str, answer: str, *, is_streamed: bool = False) -> Schema:
    content = _json(answer)
    if is_streamed:
        content["text/event-stream"] = {"schema": _TEXT}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(request)},
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **_errors(413),
            },
        }
    }


def _get(summary: str, answer: Schema, responses: dict[str, Schema], **more: Any) -> Schema:
    found = {"200": {"description": "So it is.", **answer}, **responses}
    return {"get": {"summary": summary, "responses": found, **more}}


def description(version: str, *, has_metrics: bool, has_tenants: bool) -> Schema:
    """Return the OpenAPI document of the door.

    Args:
        version: Lorary's.
        has_metrics: whether /metrics is behind this door.
        has_tenants: whether callers are asked for a token.
    """
    plain = {"content": {"text/plain": {"schema": _TEXT}}}
    down: dict[str, Schema] = {"503": {"description": "It is not."}}
    ref = {"name": "ref", "in": "path", "required": True, "schema": {**_MODEL, "minLength": 1}}
    paths = {
        "/v1/chat/completions": _post(
            "Answer a chat, whole or streamed", "ChatRequest", "Chat", is_streamed=True
        ),
        "/v1/completions": _post(
            "Continue texts, whole or streamed", "CompletionRequest", "Completion", is_streamed=True
        ),
        "/v1/embeddings": _post("Texts or token ids to vectors", "EmbeddingsRequest", "Embeddings"),
        "/v1/models": _get(
            "List the base, adapters and aliases", {"content": _json("Models")}, _errors()
        ),
        "/v1/models/{ref}": _get(
            "What a ref means now", {"content": _json("Model")}, _errors(), parameters=[ref]
        ),
        "/tokenize": _post("Texts or chats to token ids", "TokenizeRequest", "Tokens"),
        "/detokenize": _post("Token ids to text", "DetokenizeRequest", "Text"),
        "/health": _get("Whether the process can answer at all", {}, down),
        "/ready": _get("Whether new calls are wanted", {}, down),
        "/openapi.json": _get(
            "This document", {"content": {"application/json": {"schema": _ANY_OBJECT}}}, {}
        ),
    }
    if has_metrics:
        paths["/metrics"] = _get("Prometheus' metrics", plain, {})
    components: Schema = {"schemas": _SCHEMAS}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "Lorary",
            "version": version,
            "description": "OpenAI's API over one base and many adapters.",
        },
        "paths": paths,
        "components": components,
    }
    if has_tenants:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in ("/health", "/ready", "/openapi.json"):
            paths[path]["get"]["security"] = []
    return document
