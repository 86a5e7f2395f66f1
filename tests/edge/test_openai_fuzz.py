"""Whatever JSON is sent to the HTTP door, it is understood or refused; never an internal error."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import InvalidRef, InvalidRequest
from lorary.server.http.body import parse_object
from lorary.server.http.problems import problem_of
from lorary.server.http.requests import read_chat, read_completion, read_embeddings
from lorary.server.tools.definitions import check_options, read_toolset, turns_of
from lorary.server.tools.form import Form
from lorary.server.tools.formats import FORMATS
from lorary.server.tools.grammar import call_grammar
from lorary.server.validate import (
    Limits,
    check_input,
    check_priority,
    read_pooling,
    read_sampling,
)

LIMITS = Limits(max_context=64, vocab_size=1000, hidden_size=4, max_message=1 << 22)
GOOD: dict[str, Any] = {
    "model": "alpha@prod",
    "messages": [{"role": "user", "content": "2 5"}],
    "prompt": ["2 5", "7"],
    "n": 2,
    "stop": ["a", "b"],
    "max_tokens": 5,
    "temperature": 0.5,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "logit_bias": {"5": 1.5},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "structured_outputs": {"choice": ["a"]},
    "stop_token_ids": [1],
    "seed": -3,
    "top_k": -1,
    "priority": 2,
    "echo": True,
    "best_of": 2,
    "tools": [
        {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "b", "description": "x", "strict": True}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "a"}},
    "parallel_tool_calls": False,
}
TURNS: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "a", "arguments": "{}"}},
    ],
    "tool_call_id": "c",
}
MEMBERS = (
    *("type", "schema", "regex", "json", "function", "name", "arguments", "parameters", "mode"),
    *("allowed_tools", "1", ""),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, -1, 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["", "\ud800", "text", "json_object", "a" * 300, "\x00"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*GOOD, *TURNS, *MEMBERS]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(
    kept=st.sets(st.sampled_from(sorted(GOOD))),
    changed=st.dictionaries(
        st.sampled_from(sorted(GOOD)) | st.text(max_size=4), VALUES, max_size=4
    ),
    turn=st.dictionaries(st.sampled_from(sorted(TURNS)), VALUES, max_size=2),
    is_chat=st.booleans(),
)
def test_bodies_are_understood_or_refused(
    kept: set[str], changed: dict[str, Any], turn: dict[str, Any], *, is_chat: bool
) -> None:
    """Through everything that runs before a registry is asked."""
    body = {name: GOOD[name] for name in kept} | changed
    if turn and "messages" in kept - changed.keys():
        body["messages"] = [*GOOD["messages"], TURNS | turn]
    raw = json.dumps(body).encode()
    try:
        members = parse_object(raw, "application/json; charset=utf-8")
        ask = (read_chat if is_chat else read_completion)(members, "tiny")
        for request in ask.requests:
            check_input(request.input, LIMITS)
            check_priority(request.priority)
            read_sampling(request.sampling, LIMITS)
            toolset = read_toolset(request.input.chat)
            turns_of(request.input.chat.messages)
            if toolset is not None:
                check_options(toolset, request.sampling)
                call_grammar(toolset, Form(format=FORMATS["hermes"], token_ids={}))
    except (InvalidRequest, InvalidRef) as error:
        problem, error_id = problem_of(error)
        assert (problem.status, error_id) == (400, "")
        json.loads(problem.body)
        problem.body.decode()


EMBEDDINGS: dict[str, Any] = {
    "model": "alpha@prod",
    "input": ["2 5", "7"],
    "encoding_format": "base64",
    "dimensions": 2,
    "pooling": "last",
    "normalize": False,
    "use_template": True,
    "priority": -1,
    "execution": "batched",
    "user": "ada",
}


@settings(max_examples=80, deadline=None)
@given(
    kept=st.sets(st.sampled_from(sorted(EMBEDDINGS))),
    changed=st.dictionaries(st.sampled_from(sorted(EMBEDDINGS)), VALUES, max_size=3),
)
def test_bodies_for_vectors_are_understood_or_refused(
    kept: set[str], changed: dict[str, Any]
) -> None:
    raw = json.dumps({name: EMBEDDINGS[name] for name in kept} | changed).encode()
    try:
        ask = read_embeddings(parse_object(raw, "application/json"), "tiny")
        read_pooling(ask.request, LIMITS)
        check_priority(ask.request.priority)
        for message in ask.request.inputs:
            check_input(message, LIMITS)
    except (InvalidRequest, InvalidRef) as error:
        problem, error_id = problem_of(error)
        assert (problem.status, error_id) == (400, "")
        problem.body.decode()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64) | st.text(max_size=32).map(str.encode))
def test_bytes_are_an_object_or_refused(raw: bytes) -> None:
    try:
        value: Any = parse_object(raw, "application/json")
    except InvalidRequest as error:
        value = problem_of(error)[0].content
    assert isinstance(value, dict)
