"""/openapi.json says what the door does: its paths, its members, and its answers."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from jsonschema import Draft202012Validator

from lorary.errors import InvalidRequest
from lorary.server.http import requests
from lorary.server.http.body import Fields
from lorary.server.http.openapi import description
from tests.edge.fakes import serving

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENT = description("1.0", has_metrics=True, has_tenants=False)
SCHEMAS = DOCUMENT["components"]["schemas"]
TURNS = [{"role": "user", "content": "2 5"}]


def judge(schema: str) -> Any:
    """Return what checks values against one of the document's schemas."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{schema}", **DOCUMENT})


@pytest.mark.parametrize(
    ("schema", "read", "refused"),
    [
        ("ChatRequest", requests.read_chat, requests._REFUSED_CHAT),
        ("CompletionRequest", requests.read_completion, requests._REFUSED_COMPLETION),
        ("EmbeddingsRequest", requests.read_embeddings, {}),
    ],
)
def test_the_members_are_those_that_are_read(
    monkeypatch: pytest.MonkeyPatch,
    schema: str,
    read: Callable[[dict[str, Any], str], object],
    refused: dict[str, str],
) -> None:
    """What the reader asks a body for, less what it asks for only to refuse it."""
    bodies: list[Fields] = []

    class Watched(Fields):
        def __init__(self, members: Any, path: str = "") -> None:
            super().__init__(members, path)
            if not path:
                bodies.append(self)

    monkeypatch.setattr(requests, "Fields", Watched)
    with suppress(InvalidRequest):
        read({"messages": TURNS, "prompt": "2 5", "input": "2 5"}, "tiny")
    asked = bodies[0]._asked - refused.keys() | requests.IGNORED
    assert set(SCHEMAS[schema]["properties"]) == asked


async def test_every_path_is_described_and_answers_as_it_says() -> None:
    async with serving(http_port=0) as edge, httpx.AsyncClient(base_url=edge.http) as http:
        served = await http.get("/openapi.json")
        document = served.json()
        Draft202012Validator.check_schema({"$defs": document["components"]["schemas"]})
        listener: Any = edge.server._http
        routes = {route.path for route in listener._server.config.app.routes}
        public = {path.replace(":path", "") for path in routes if not path.startswith("/console")}
        assert set(document["paths"]) == public
        chat = {"model": "beta", "messages": TURNS, "max_tokens": 2}
        for described, path, schema, body in (
            ("/v1/chat/completions", "", "Chat", chat),
            (
                "/v1/completions",
                "",
                "Completion",
                {"prompt": "2 5", "max_tokens": 2, "logprobs": 1},
            ),
            ("/v1/completions", "", "Error", {"prompt": 5}),
            ("/tokenize", "", "Tokens", {"prompt": "2 5"}),
            ("/detokenize", "", "Text", {"tokens": [2, 5]}),
            ("/v1/models", "", "Models", None),
            ("/v1/models/{ref}", "/v1/models/beta@1", "Model", None),
            ("/v1/models/{ref}", "/v1/models/nobody", "Error", None),
        ):
            url = path or described
            answer = await (http.get(url) if body is None else http.post(url, json=body))
            (method,) = document["paths"][described].values()
            told = method["responses"][str(answer.status_code)]["content"]["application/json"]
            assert told["schema"] == {"$ref": f"#/components/schemas/{schema}"}
            judge(schema).validate(answer.json())


async def test_where_callers_are_asked_for_a_token_it_says_so() -> None:
    document = description("1.0", has_metrics=False, has_tenants=True)
    assert document["security"]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "/metrics" not in document["paths"]
