"""Whatever is sent to /v2, it is understood or refused; never an internal error."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import InvalidRequest
from lorary.oip import open_inference_pb2 as oip
from lorary.server.http.body import parse_object
from lorary.server.http.open_inference import read_infer
from lorary.server.http.problems import problem_of
from lorary.server.open_inference.asks import read_ask
from tests.edge.test_openai_fuzz import SCALARS

TENSOR: dict[str, Any] = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["5"]}
GOOD: dict[str, Any] = {
    "id": "mine",
    "inputs": [TENSOR],
    "outputs": [{"name": "embedding"}],
    "parameters": {"max_tokens": 4, "temperature": 0.5, "stop": "9", "normalize": True},
}
NESTED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*TENSOR, *GOOD, *GOOD["parameters"]]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=120, deadline=None)
@given(
    kept=st.sets(st.sampled_from(sorted(GOOD))),
    changed=st.dictionaries(st.sampled_from(sorted(GOOD)), NESTED, max_size=2),
    tensor=st.dictionaries(st.sampled_from(sorted(TENSOR)), NESTED, max_size=2),
    parameters=st.dictionaries(
        st.sampled_from(["max_tokens", "seed", "stop", "pooling", "dimensions", "scale", "\ud800"]),
        NESTED,
        max_size=2,
    ),
)
def test_bodies_are_understood_or_refused(
    kept: set[str],
    changed: dict[str, Any],
    tensor: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    body = {name: GOOD[name] for name in kept} | changed
    if tensor:
        body["inputs"] = [TENSOR | tensor]
    if parameters:
        body["parameters"] = parameters
    try:
        request = read_infer(parse_object(json.dumps(body).encode(), "application/json"))
        read_ask(request, "tiny")
    except InvalidRequest as error:
        problem, error_id = problem_of(error)
        assert (problem.status, error_id) == (400, "")
        problem.body.decode()


@settings(max_examples=120, deadline=None)
@given(
    raw=st.lists(st.binary(max_size=12), max_size=2),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    elements=st.lists(st.binary(max_size=6), max_size=3),
)
def test_messages_are_understood_or_refused(
    raw: list[bytes], shape: list[int], elements: list[bytes]
) -> None:
    request = oip.ModelInferRequest(model_name="beta", raw_input_contents=raw)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
    tensor.contents.bytes_contents.extend(elements)
    try:
        ask = read_ask(request, "tiny")
    except InvalidRequest:
        return
    assert len(ask.requests) == len(elements) or raw
