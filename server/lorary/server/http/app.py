"""Which path is what.

======  ======================  ===============================================================
POST    /v1/chat/completions    chat, whole or streamed
POST    /v1/completions         text, whole or streamed
POST    /v1/embeddings          texts to vectors
GET     /v1/models, …/{ref}     the base, adapters with versions and aliases
POST    /tokenize, /detokenize  as vLLM has them
GET     /health                 200 while the process can answer at all
GET     /ready                  200 while it wants new calls; 503 while it drains
GET     /metrics                what --metrics-port serves
GET     /openapi.json           all of this but the console, for tools
…       /console/…              a page for people, with --console (``console.routes``)
…       /v2/…                   with --open-inference (``open_inference``)
======  ======================  ===============================================================
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from lorary.server.http.answers import Pieces
from lorary.server.http.call import Endpoint, encode
from lorary.server.http.embeddings import Embeddings
from lorary.server.http.generate import Generation
from lorary.server.http.models import Models
from lorary.server.http.openapi import description
from lorary.server.http.problems import problem
from lorary.server.http.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from lorary.server.access.guard import Guard
    from lorary.server.control import ControlService
    from lorary.server.http.call import Handler
    from lorary.server.service import InferenceService, Parts
    from lorary.server.tracing.calls import Tracing


def build_app(
    service: InferenceService,
    control: ControlService,
    parts: Parts,
    *,
    max_body: int,
    is_ready: Callable[[], bool],
    has_failed: Callable[[], bool],
    guard: Guard | None = None,
    further: Sequence[Route] = (),
    tracing: Tracing | None = None,
) -> Starlette:
    """Return the HTTP door as an ASGI application.

    Args:
        service: the data plane.
        control: for lists of adapters.
        parts: what they work with.
        max_body: largest body accepted, in bytes.
        is_ready: whether new calls are wanted.
        has_failed: whether the engine broke.
        guard: asks who calls; None asks nobody. With one, metrics are left to their own port.
        further: the routes of what else is behind the door: the console, which looks every second and has no
            spans, and the Open Inference Protocol.
        tracing: gives every request of the API a span; None gives none.
    """
    metrics, facts, prompts = parts.metrics, parts.facts, parts.prompts

    def route(method: str, path: str, name: str, handler: Handler, max_body: int = 0) -> Route:
        endpoint = Endpoint(
            name, handler, metrics, max_body=max_body, guard=guard, tracing=tracing, path=path
        )
        return Route(path, endpoint, methods=[method])

    def post(path: str, name: str, handler: Handler) -> Route:
        return route("POST", path, name, handler, max_body)

    def get(path: str, name: str, handler: Handler) -> Route:
        return route("GET", path, name, handler)

    async def health(_: Request) -> Response:
        return Response(status_code=503 if has_failed() else 200)

    async def ready(_: Request) -> Response:
        return Response(status_code=200 if is_ready() else 503)

    async def scrape(_: Request) -> Response:
        # With many adapters it takes long, and streams must not wait for it.
        text = await asyncio.to_thread(generate_latest, metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    document = encode(
        description(facts.version, has_metrics=guard is None, has_tenants=guard is not None)
    )

    async def describe(_: Request) -> Response:
        return Response(document, media_type="application/json")

    generation = Generation(service, prompts, Pieces(prompts.pieces), facts)
    models = Models(control, parts.targets, facts)
    tokens = Tokens(service, prompts, facts, parts.limits)
    return Starlette(
        routes=[
            post("/v1/chat/completions", "ChatCompletions", generation.chat),
            post("/v1/completions", "Completions", generation.completion),
            post("/v1/embeddings", "Embeddings", Embeddings(service, facts).embeddings),
            get("/v1/models", "Models", models.list),
            get("/v1/models/{ref:path}", "Models", models.retrieve),
            post("/tokenize", "HttpTokenize", tokens.tokenize),
            post("/detokenize", "HttpDetokenize", tokens.detokenize),
            Route("/health", health),
            Route("/ready", ready),
            Route("/openapi.json", describe),
            *([] if guard is not None else [Route("/metrics", scrape)]),
            *further,
        ],
        exception_handlers={HTTPException: _refused},
    )


async def _refused(request: Request, error: Any) -> Response:
    """Answer an unknown path or method as everything else is answered."""
    known = {404: "not_found", 405: "method_not_allowed"}
    text = (
        f"{request.method} {request.scope['path'][:128]}: {error.detail.lower()}; see /v1/models."
    )
    found = problem(error.status_code, text, code=known.get(error.status_code, "http_error"))
    headers = {**found.headers, **(error.headers or {})}
    return Response(found.body, found.status, headers, "application/json")
