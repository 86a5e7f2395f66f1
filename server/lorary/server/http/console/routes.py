"""Which path of the console is what.

======  ========================  =============================================================
GET     /console/…                the page and its files, for anybody
GET     /console/api/state        the server, adapters; to admins also traffic and rollouts
GET     /console/api/figures      what the charts are drawn from; for admins
GET     /console/api/moves/NAME   an adapter's alias log; for admins
POST    /console/api/promote      moves an alias; for admins
POST    /console/api/rollback     moves it back; for admins
======  ========================  =============================================================
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.routing import Route

from lorary.server.http.call import Endpoint, encode
from lorary.server.http.console.figures import read_figures
from lorary.server.http.console.hosts import check_host
from lorary.server.http.console.moves import Moves
from lorary.server.http.console.pages import Pages
from lorary.server.http.console.view import View

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lorary.server.access.grants import Role
    from lorary.server.access.guard import Guard
    from lorary.server.control import ControlService
    from lorary.server.http.call import Handler, HttpCall
    from lorary.server.ports import RegistryLike
    from lorary.server.service import Parts

    Answer = Callable[[HttpCall], Awaitable[dict[str, Any]]]

_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def console_routes(
    control: ControlService,
    parts: Parts,
    registry: RegistryLike,
    *,
    host: str,
    max_body: int,
    guard: Guard | None,
) -> list[Route]:
    """Return the console's routes.

    Args:
        control: lists adapters and moves aliases.
        parts: what the server is made of.
        registry: keeps the log of aliases.
        host: what the HTTP door listens on.
        max_body: largest body accepted, in bytes.
        guard: asks who calls; None asks nobody, and everybody is an admin, as over gRPC.
    """
    pages = Pages()
    view = View(control, parts, has_tenants=guard is not None)
    moves = Moves(control, parts.targets, registry)

    async def state(_: HttpCall) -> dict[str, Any]:
        return await view.state()

    async def figures(_: HttpCall) -> dict[str, Any]:
        # With many adapters it takes long, and streams must not wait for it.
        return await asyncio.to_thread(read_figures, parts.metrics.registry)

    async def log(call: HttpCall) -> dict[str, Any]:
        return await moves.log(call.path["name"])

    async def promote(call: HttpCall) -> dict[str, Any]:
        return await moves.promote(call.members)

    async def rollback(call: HttpCall) -> dict[str, Any]:
        return await moves.roll_back(call.members)

    def handled(answer: Answer) -> Handler:
        async def handler(call: HttpCall) -> None:
            if guard is None:
                check_host(call.header("host"), host)
            await call.answer(encode(await answer(call)), headers=_HEADERS)

        return handler

    def api(path: str, name: str, answer: Answer, role: Role, *, is_post: bool = False) -> Route:
        endpoint = Endpoint(
            name,
            handled(answer),
            parts.metrics,
            max_body=max_body if is_post else 0,
            guard=guard,
            role=role,
        )
        return Route(f"/console/api/{path}", endpoint, methods=["POST" if is_post else "GET"])

    return [
        api("state", "ConsoleState", state, "user"),
        api("figures", "ConsoleFigures", figures, "admin"),
        api("moves/{name:path}", "ConsoleMoves", log, "admin"),
        api("promote", "ConsolePromote", promote, "admin", is_post=True),
        api("rollback", "ConsoleRollback", rollback, "admin", is_post=True),
        Route("/console", pages.redirect),
        Route("/console/{file:path}", pages.file),
    ]
