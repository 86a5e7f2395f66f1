"""The console's door: its policy, who is told what, and aliases that move only from where they were seen."""

from __future__ import annotations

import logging
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest

from lorary.errors import AccessDenied, ConfigError
from lorary.registry import BaseCard, Registry
from lorary.server.config import ServerConfig
from lorary.server.http.console.hosts import check_host
from lorary.server.http.console.pages import Pages
from tests.edge.fakes import digest_of, serving
from tests.edge.test_access import ACME, ADMIN, GLOBEX
from tests.edge.test_access import tenants as tenants
from tests.edge.test_following import VersionedResidency
from tests.edge.test_following import card as card
from tests.edge.test_following import registry as registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.edge.fakes import Edge


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[tuple[Edge, httpx.AsyncClient]]:
    async with (
        serving(http_port=0, **options) as edge,
        httpx.AsyncClient(base_url=edge.http, timeout=10) as http,
    ):
        yield edge, http


async def test_the_page_is_whole_and_may_run_nothing_but_itself() -> None:
    """Every file that the page names is there, and no markup brings a script or a style of its own."""
    async with opened() as (_, http):
        moved = await http.get("/console")
        assert (moved.status_code, moved.headers["location"]) == (307, "console/")
        page = await http.get("/console/")
        policy = page.headers["content-security-policy"]
        directives = dict(one.split(" ", 1) for one in policy.split("; "))
        assert directives["default-src"] == "'none'"
        assert {directives[f"{kind}-src"] for kind in ("script", "style", "connect")} == {"'self'"}
        assert directives["frame-ancestors"] == directives["base-uri"] == "'none'"
        assert directives["require-trusted-types-for"] == "'script'"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|https?://", page.text)
        named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
        files = {"index.html": page}
        while named - files.keys():
            name = (named - files.keys()).pop()
            files[name] = await http.get(f"/console/{name}")
            assert files[name].status_code == 200, name
            assert files[name].headers["content-security-policy"] == policy
            named |= set(re.findall(r'from "\./([^"]+)"', files[name].text))
        assert files.keys() == Pages().names, "a file that nothing names"
        kinds = {
            name: file.headers["content-type"].partition(";")[0] for name, file in files.items()
        }
        assert (kinds["main.js"], kinds["console.css"]) == ("text/javascript", "text/css")
        again = await http.get(
            "/console/main.js", headers={"if-none-match": files["main.js"].headers["etag"]}
        )
        assert (again.status_code, again.content) == (304, b"")
        assert "set-cookie" not in page.headers


async def test_only_files_of_the_page_are_served() -> None:
    async with opened() as (_, http):
        for path in (
            *("/console/absent.js", "/console/../app.py", "/console/%2e%2e/pages.py"),
            *("/console/..%2fpages.py", "/console/%2Fetc%2Fpasswd", "/console/site/index.html"),
            *("/console/api/", "/console/api/state/", "/console/index.html%00"),
        ):
            # The client must not tidy the path before it is sent.
            request = http.build_request("GET", "/")
            request.url = request.url.copy_with(raw_path=path.encode())
            assert (await http.send(request)).status_code == 404, path


async def test_there_is_no_console_where_it_is_switched_off() -> None:
    async with opened(console=False) as (_, http):
        for path in ("/console", "/console/", "/console/main.js", "/console/api/state"):
            assert (await http.get(path)).status_code == 404, path
        assert (await http.get("/v1/models")).status_code == 200


def test_it_is_there_by_default_where_strangers_are_kept_out(tmp_path: Path) -> None:
    def has_console(**given: Any) -> bool:
        return ServerConfig(base="tiny", http_port=0, **given).has_console

    assert has_console()
    assert not has_console(http_host="0.0.0.0", insecure_bind=True)
    assert has_console(http_host="0.0.0.0", insecure_bind=True, access=tmp_path / "t")
    assert has_console(http_host="0.0.0.0", insecure_bind=True, console=True)
    with pytest.raises(ConfigError, match="--http-port"):
        ServerConfig(base="tiny", console=True)


@pytest.mark.parametrize(
    ("host", "is_safe"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("a.localhost", True),
        ("[::1]:8000", True),
        ("10.0.0.7", True),
        ("LORARY.example:8000", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example:8000@127.0.0.1", False),
        ("", False),
    ],
)
def test_a_name_may_be_a_strangers_page(host: str, is_safe: bool) -> None:
    if is_safe:
        check_host(host, own="lorary.example")
        return
    with pytest.raises(AccessDenied, match="--access"):
        check_host(host, own="lorary.example")


async def test_without_tenants_a_strangers_page_is_told_nothing() -> None:
    """DNS rebinding: the browser takes a stranger's name for this server's address."""
    async with opened() as (edge, http):
        for host, code in (("evil.example", 403), (edge.http.partition("//")[2], 200)):
            for path in ("state", "figures"):
                answer = await http.get(f"/console/api/{path}", headers={"host": host})
                assert answer.status_code == code, (host, path)
        body = {"name": "a", "alias": "prod", "version": 1, "expect_version": 0}
        as_text = await http.post("/console/api/promote", content=str(body))
        assert as_text.status_code == 400, "what a form or a foreign page can send unasked"


async def test_data_is_for_tenants_and_each_sees_its_own(tenants: Path) -> None:
    async with opened(access=tenants) as (edge, http):
        assert (await http.get("/console/")).status_code == 200, "the page itself holds nothing"
        for headers in ({}, bearer("lry_wrong")):
            for path in ("state", "figures", "moves/alpha"):
                assert (await http.get(f"/console/api/{path}", headers=headers)).status_code == 401
        await http.post(
            "/v1/completions",
            json={"model": "alpha@prod", "prompt": [2, 5], "max_tokens": 1},
            headers=bearer(GLOBEX),
        )
        edge.residency.copies = {digest_of("beta")}
        states = {
            token: (await http.get("/console/api/state", headers=bearer(token))).json()
            for token in (ACME, GLOBEX, ADMIN)
        }
    mine = states[ACME]
    assert mine["caller"] == {"name": "acme", "role": "user", "has_token": True}
    assert [adapter["name"] for adapter in mine["adapters"]] == ["alpha"]
    assert (
        not {"num_served", "num_running", "last_used_ms"}
        & mine["adapters"][0]["versions"][0].keys()
    )
    assert "rollouts" not in mine
    everything = states[ADMIN]
    assert everything["caller"]["role"] == "admin"
    assert [adapter["name"] for adapter in everything["adapters"]] == [
        "alpha",
        "beta",
        "other-base",
    ]
    alpha = everything["adapters"][0]["versions"][0]
    assert (alpha["aliases"], alpha["residency"], alpha["num_served"]) == (["prod"], "resident", 1)
    assert everything["server"]["base"] == "tiny"
    tiers = {
        token: states[token]["adapters"][1]["versions"][0]["residency"] for token in (GLOBEX, ADMIN)
    }
    assert tiers == {GLOBEX: "registry", ADMIN: "host"}


async def test_only_admins_move_aliases_and_it_leaves_a_line(
    tenants: Path, registry: Registry, card: BaseCard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorary.audit")
    move = {"name": "a", "alias": "prod", "version": 2, "expect_version": 1, "reason": "better"}
    async with opened(
        access=tenants,
        registry=registry,
        residency=VersionedResidency(),
        fingerprint=card.fingerprint,
    ) as (_, http):
        for path in ("promote", "rollback"):
            refused = await http.post(f"/console/api/{path}", json=move, headers=bearer(GLOBEX))
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "access_denied")
        for path in ("figures", "moves/a"):
            refused = await http.get(f"/console/api/{path}", headers=bearer(GLOBEX))
            assert refused.status_code == 403
        assert registry.aliases("a")["prod"] == 1
        moved = await http.post("/console/api/promote", json=move, headers=bearer(ADMIN))
        assert moved.json() == {"from_version": 1, "to_version": 2}
        assert moved.headers["cache-control"] == "no-store"
    assert registry.aliases("a")["prod"] == 2
    last = registry.log("a")[-1]
    assert (last.actor, last.reason, last.kind) == ("operations", "better", "set")
    lines = [r.getMessage() for r in caplog.records if r.name == "lorary.audit"]
    assert [line.partition(":")[0] for line in lines] == ["globex", "globex", "operations"]
    assert lines[0].endswith("AccessDenied")
    assert lines[2].startswith('operations: ConsolePromote {{"name":"a","alias":"prod","version":2')
    assert lines[2].endswith(": ok")
    assert not any(token in line for line in lines for token in (GLOBEX, ADMIN))


async def test_who_saw_the_alias_elsewhere_moves_nothing(
    registry: Registry, card: BaseCard
) -> None:
    """Two admins with the same page: the second is told, whether she promotes or rolls back."""
    async with opened(
        registry=registry, residency=VersionedResidency(), fingerprint=card.fingerprint
    ) as (_, http):

        async def post(path: str, **body: Any) -> httpx.Response:
            return await http.post(
                f"/console/api/{path}", json={"name": "a", "alias": "prod", **body}
            )

        assert (await post("promote", version=2, expect_version=1)).status_code == 200
        for path, body in (
            ("promote", {"version": 1, "expect_version": 1}),
            ("promote", {"version": 1, "expect_version": 0}),
            ("rollback", {"expect_version": 1}),
        ):
            late = await post(path, **body)
            assert (late.status_code, late.json()["error"]["code"]) == (409, "conflict"), path
            assert "points at version 2, not at" in late.json()["error"]["message"]
        for path, body in (
            ("promote", {"version": 1}),
            ("promote", {"version": 0, "expect_version": 2}),
            ("promote", {"version": 1, "expect_version": 2, "force": True}),
            ("rollback", {}),
        ):
            assert (await post(path, **body)).status_code == 400, body
        assert (await post("promote", version=9, expect_version=2)).status_code == 404
        told = (await http.get("/console/api/moves/a")).json()
        assert told["aliases"] == {"prod": {"version": 2, "before": 1, "canary": None}}
        back = await post("rollback", expect_version=2, reason="errors")
        assert back.json() == {"from_version": 2, "to_version": 1}
        told = (await http.get("/console/api/moves/a")).json()
        assert told["aliases"] == {"prod": {"version": 1, "before": None, "canary": None}}
        assert [(m["kind"], m["to_version"]) for m in told["moves"]] == [
            *(("rollback", 1), ("set", 2)),
            ("set", 1),
        ]
        assert (await http.get("/console/api/moves/nobody")).status_code == 404
    assert registry.aliases("a")["prod"] == 1


async def test_a_rollback_ends_a_canary_that_the_page_saw(
    registry: Registry, card: BaseCard
) -> None:
    from lorary.registry.splits import Canary

    registry.rollouts.start("a", "prod", Canary(version=2, percent=10))
    async with opened(
        registry=registry, residency=VersionedResidency(), fingerprint=card.fingerprint
    ) as (_, http):
        body = {"name": "a", "alias": "prod", "expect_version": 2}
        assert (await http.post("/console/api/rollback", json=body)).status_code == 409
        told = (await http.get("/console/api/moves/a")).json()
        assert told["aliases"]["prod"] == {"version": 1, "before": None, "canary": 2}
        ended = await http.post("/console/api/rollback", json={**body, "expect_version": 1})
        assert ended.json() == {"from_version": 1, "to_version": 1}
    assert registry.rollouts.of("a", "prod") is None


async def test_figures_are_those_of_a_scrape() -> None:
    async with opened() as (edge, http):
        body = {"model": "alpha", "prompt": [2, 5], "max_tokens": 3}
        await http.post("/v1/completions", json=body)
        figures = (await http.get("/console/api/figures")).json()
        scraped = (await http.get("/metrics")).text
    found = {
        name + str(sorted(labels.items())): value for name, labels, value in figures["samples"]
    }
    assert found["lorary_tokens_total[('kind', 'generation')]"] == 3
    assert found["lorary_tokens_total[('kind', 'prompt')]"] == 2
    assert found["lorary_time_to_first_token_seconds_count[]"] == 1
    assert found["lorary_kv_tokens_capacity[]"] > 0
    for name, _, value in figures["samples"]:
        if name.startswith("lorary_tokens"):
            assert re.search(rf"^{name}.* {value}$", scraped, re.MULTILINE)
    assert edge.calls.num_in_flight == 0
