"""Tenants: who is let in, what is visible to whom, how much of it; and TLS underneath."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx2 as httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorary.client import AsyncClient, Client, Credentials
from lorary.errors import (
    AccessDenied,
    AdapterNotFound,
    ConfigError,
    LoraryError,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from lorary.server.access.grants import GrantsFile, Tenant, read_grants
from lorary.server.access.guard import ADMINS, OPEN, USERS
from lorary.server.access.quotas import Quotas
from lorary.server.access.tokens import new_token, token_hash
from lorary.server.config import ServerConfig
from lorary.v1 import control_pb2 as control
from lorary.v1 import inference_pb2 as pb
from tests.edge.certificates import issue, make_authority
from tests.edge.fakes import eventually, serving
from tests.edge.test_bad_input import details

if TYPE_CHECKING:
    from pathlib import Path

    from tests.edge.fakes import Edge

ACME, GLOBEX, ADMIN = (f"lry_{name}-{'x' * 40}" for name in ("acme", "globex", "admin"))
FILE = f"""
tenants:
  acme:
    tokens: [{token_hash(ACME)}]
    adapters: ["al*"]
    base: false
    max_calls: 1
  globex:
    tokens: [{token_hash(GLOBEX)}]
    certificates: [spiffe://prod/globex]
  operations:
    role: admin
    tokens: [{token_hash(ADMIN)}]
"""


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    return path


def client(edge: Edge, token: str | None) -> AsyncClient:
    return AsyncClient(edge.address, credentials=Credentials(token=token))


async def test_who_brings_no_token_or_a_wrong_one_gets_nothing(tenants: Path) -> None:
    async with serving(access=tenants) as edge:
        for metadata in (
            (),
            (("authorization", ACME),),
            (("authorization", f"Basic {ACME}"),),
            (("authorization", "Bearer "),),
            (("authorization", f"Bearer {ACME}x"),),
            (("authorization", f"Bearer {token_hash(ACME)}"),),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await edge.inference.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert details(caught.value)["ErrorInfo"].reason == "UNAUTHENTICATED"
        for bad in ("", ACME[:-1]):
            async with client(edge, bad or None) as somebody:
                with pytest.raises(Unauthenticated, match="token"):
                    await somebody.generate(prompt="2 5", adapter="alpha")
        assert not edge.engine.submitted
        health = health_pb2_grpc.HealthStub(edge.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="lorary.v1.Inference"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_absent_and_forbidden_look_the_same(tenants: Path) -> None:
    async with serving(access=tenants) as edge, client(edge, ACME) as acme:
        answer = await acme.generate(prompt="2 5", adapter="alpha", max_tokens=1)
        assert (answer.text, answer.receipt.name) == ("7 ", "alpha")
        said: dict[str, str] = {}
        for name in ("beta", "gamma"):
            for call in (acme.generate, acme.classify, acme.tokenize):
                with pytest.raises(AdapterNotFound) as caught:
                    await call(prompt="2 5", adapter=f"{name}@1")
                said.setdefault(name, str(caught.value))
        assert said["beta"].replace("beta", "gamma") == said["gamma"]
        with pytest.raises(AccessDenied, match="bare base"):
            await acme.generate(prompt="2 5")
        async with client(edge, GLOBEX) as globex:
            assert (await globex.classify(prompt="2 5", adapter="beta")).label == "8"
            assert (await globex.generate(prompt="2 5", max_tokens=1)).text == "6 "


async def test_the_http_door_asks_as_well(tenants: Path) -> None:
    async with serving(access=tenants, http_port=0) as edge:
        body = {"model": "alpha", "prompt": [2, 5], "max_tokens": 1}
        async with httpx.AsyncClient(base_url=edge.http, timeout=30) as nobody:
            for refused in (
                await nobody.post("/v1/completions", json=body),
                await nobody.get("/v1/models", headers={"authorization": "Bearer lry_wrong"}),
            ):
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "unauthenticated"
            assert (await nobody.get("/health")).status_code == 200
            assert (await nobody.get("/metrics")).status_code == 404
        headers = {"authorization": f"Bearer {ACME}"}
        async with httpx.AsyncClient(base_url=edge.http, headers=headers, timeout=30) as acme:
            assert (await acme.post("/v1/completions", json=body)).json()["choices"][0][
                "text"
            ] == "7 "
            hidden = await acme.post("/v1/completions", json={**body, "model": "beta"})
            absent = await acme.post("/v1/completions", json={**body, "model": "gamma"})
            assert (hidden.status_code, absent.status_code) == (404, 404)
            assert hidden.text.replace("beta", "gamma") == absent.text
            models = [model["id"] for model in (await acme.get("/v1/models")).json()["data"]]
            assert not [model for model in models if model.startswith("beta")]
            assert "alpha" in models
    assert [request.salt for request in edge.engine.submitted] == ["acme"]


async def test_health_by_adapter_is_the_tenants(tenants: Path) -> None:
    async with serving(access=tenants) as edge:
        stub = health_pb2_grpc.HealthStub(edge.channel)

        async def check(adapter: str, token: str | None) -> grpc.StatusCode:
            metadata = () if token is None else (("authorization", f"Bearer {token}"),)
            asked = health_pb2.HealthCheckRequest(service=f"lorary.adapter/{adapter}")
            try:
                await stub.Check(asked, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert await check("alpha", None) == grpc.StatusCode.UNAUTHENTICATED
        assert await check("alpha", ACME) == grpc.StatusCode.OK
        assert await check("beta", ACME) == grpc.StatusCode.NOT_FOUND
        assert await check("beta", GLOBEX) == grpc.StatusCode.OK


async def test_control_and_reflection_are_for_admins_and_leave_a_line(
    tenants: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorary.audit")
    async with serving(access=tenants) as edge:
        async with client(edge, GLOBEX) as globex:
            for call in (globex.list_adapters(), globex.unload_adapter("alpha")):
                with pytest.raises(AccessDenied, match="role admin"):
                    await call
        async with client(edge, ADMIN) as admin:
            assert (await admin.load_adapter("alpha", pin=True)).pinned
            with pytest.raises(AdapterNotFound):
                await admin.unload_adapter("gamma")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub
        for token, code in ((GLOBEX, grpc.StatusCode.PERMISSION_DENIED), (ADMIN, None)):
            asked = stub(edge.channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
                metadata=(("authorization", f"Bearer {token}"),),
            )
            if code is None:
                assert (await asked.read()).list_services_response.service
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asked.read()
            assert caught.value.code() == code
    lines = [r.getMessage() for r in caplog.records if r.name == "lorary.audit"]
    unload = "/lorary.v1.Control/UnloadAdapter"
    assert f'globex: {unload} {{adapter: "alpha" mode: UNLOAD_MODE_DRAIN}}: AccessDenied' in lines
    assert (
        "globex: /grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo {a stream}: "
        "AccessDenied" in lines
    )
    assert 'operations: /lorary.v1.Control/LoadAdapter {adapter: "alpha" pin: true}: ok' in lines
    assert (
        f'operations: {unload} {{adapter: "gamma" mode: UNLOAD_MODE_DRAIN}}: AdapterNotFound'
        in lines
    )
    assert not any(token in line for line in lines for token in (ACME, GLOBEX, ADMIN))


def test_every_method_is_on_one_list() -> None:
    assert len(OPEN | USERS | ADMINS) == len(OPEN) + len(USERS) + len(ADMINS)
    assert "/lorary.v1.Control/UnloadAdapter" in ADMINS
    assert "/lorary.v1.Inference/Generate" in USERS


async def test_a_tenant_has_its_calls_at_once_and_keys_and_values_of_its_own(tenants: Path) -> None:
    async with serving(access=tenants) as edge, client(edge, ACME) as acme:
        edge.engine.gate.clear()
        first = asyncio.ensure_future(acme.generate(prompt="2 5", adapter="alpha", max_tokens=2))
        await eventually(lambda: bool(edge.engine.submitted))
        with pytest.raises(QuotaExceeded) as caught:
            await acme.generate(prompt="2 5", adapter="alpha")
        assert caught.value.subject == "tenant:acme/calls"
        cause: Any = caught.value.__cause__
        assert {"RetryInfo", "QuotaFailure"} <= details(cause).keys()
        async with client(edge, GLOBEX) as globex:
            others = asyncio.ensure_future(globex.generate(prompt="2 5", max_tokens=1))
            await eventually(lambda: len(edge.engine.submitted) == 2)
            edge.engine.gate.set()
            await asyncio.gather(first, others)
        # The first has ended, so another is let through.
        await acme.generate(prompt="2 5", adapter="alpha", max_tokens=1)
        assert [request.salt for request in edge.engine.submitted] == ["acme", "globex", "acme"]


def test_a_rate_is_a_bucket_that_fills_again() -> None:
    now = 100.0
    quotas = Quotas(clock=lambda: now)
    tenant = Tenant(name="acme", calls_per_minute=30)

    def call() -> None:
        with quotas.held(tenant):
            pass

    for _ in range(5):  # ten seconds' worth at once
        call()
    with pytest.raises(QuotaExceeded) as caught:
        call()
    assert caught.value.retry_after_s == pytest.approx(2.0)
    now += 1.9
    with pytest.raises(QuotaExceeded):
        call()
    now += 0.1
    call()
    now += 1e6
    for _ in range(5):
        call()
    with pytest.raises(QuotaExceeded):
        call()


def test_a_changed_file_counts_and_a_broken_one_does_not(
    tenants: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    file = GrantsFile(tenants, clock=lambda: now)
    assert file.grants.by_token[token_hash(ACME)].name == "acme"
    for text, is_known in ((FILE.replace("acme:", "acme-2:"), True), ("tenants: [", False)):
        tenants.write_text(text)
        now += 2
        assert file.grants.by_token[token_hash(ACME)].name == "acme-2"
        assert ("stays as it was" in caplog.text) is not is_known
    tenants.unlink()
    now += 2
    assert file.grants.by_token[token_hash(ACME)].name == "acme-2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tenants: [acme]", "a key 'tenants'"),
        ("tenants: {acme: {tokens: [], adapters: [a]}}", "neither tokens nor certificates"),
        ("tenants: {acme: {tokens: [lry_secret-that-must-not-be-shown]}}", "no sha256"),
        ("tenants: {acme: {certificates: [a], adapter: [b]}}", "did you mean 'adapters'"),
        ("tenants: {acme: {certificates: [a], role: root}}", "'user' or 'admin'"),
        ("tenants: {acme: {certificates: [a], max_calls: true}}", "whole number"),
        ("tenants: {acme: {certificates: [a], calls_per_minute: .nan}}", "number from 0"),
        ("tenants: {acme: {certificates: [a], base: 'no'}}", "true or false"),
        ("tenants: {'../x': {certificates: [a]}}", "lower-case letters"),
        ("tenants: {a: {certificates: [x]}, b: {certificates: [x]}}", "is of both 'a' and 'b'"),
        ("tenants: {a: &a {certificates: *a}}", "list of texts"),
        ("!!python/object/apply:os.system ['true']", "no YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_grants(path)
    assert "secret" not in str(caught.value)


def test_a_network_host_needs_both_tls_and_tenants(tmp_path: Path) -> None:
    def config(**given: Any) -> ServerConfig:
        return ServerConfig(base="tiny", **given)

    files = {"tls_cert": tmp_path / "c", "tls_key": tmp_path / "k"}
    access = {"access": tmp_path / "t"}
    for given, said in (
        ({}, "no TLS .* and no --access"),
        (files, "there is no --access"),
        (access, "there is no TLS"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(host="0.0.0.0", **given)
    assert config(host="0.0.0.0", **access, **files).tls is not None
    for wrong in ({"tls_cert": tmp_path / "c"}, {"tls_client_ca": tmp_path / "a"}):
        with pytest.raises(ConfigError, match="tls"):
            config(**wrong)


async def test_tls_with_client_certificates_and_a_renewed_one(
    tenants: Path, tmp_path: Path
) -> None:
    authority, stranger = make_authority(tmp_path), make_authority(tmp_path, "stranger")
    server = issue(tmp_path, authority, "server", "DNS:localhost,IP:127.0.0.1")
    mine = issue(tmp_path, authority, "globex", "URI:spiffe://prod/globex")
    nobody = issue(tmp_path, authority, "nobody", "URI:spiffe://prod/nobody")
    forged = issue(tmp_path, stranger, "forged", "URI:spiffe://prod/globex")
    options: dict[str, Any] = {
        "tls_cert": server.certificate,
        "tls_key": server.key,
        "tls_client_ca": authority.certificate,
        "access": tenants,
    }

    async def ask(edge: Edge, **given: Any) -> str:
        credentials = Credentials(ca=given.pop("ca", authority.certificate), **given)
        async with AsyncClient(edge.address, credentials=credentials, timeout_s=30) as caller:
            return (await caller.generate(prompt="2 5", adapter="beta", max_tokens=1)).text

    async with serving(**options) as edge:
        assert await ask(edge, certificate=mine.certificate, key=mine.key) == "8 "
        both: dict[str, Any] = {"certificate": nobody.certificate, "key": nobody.key}
        assert await ask(edge, **both, token=GLOBEX) == "8 "
        with pytest.raises(Unauthenticated, match="spiffe://prod/nobody"):
            await ask(edge, **both)
        for wrong in (
            {"token": GLOBEX},
            {"certificate": forged.certificate, "key": forged.key},
            {"certificate": mine.certificate, "key": mine.key, "ca": stranger.certificate},
        ):
            with pytest.raises(Unavailable):
                await ask(edge, **wrong)
        with pytest.raises(LoraryError):
            async with AsyncClient(edge.address, timeout_s=2) as plain:
                await plain.server_info()
        # Half written, it changes nothing for those who connect now.
        server.key.write_text("half of it")
        assert await ask(edge, certificate=mine.certificate, key=mine.key) == "8 "
        # Renewed by another authority: what connects now sees the new certificate.
        renewed = issue(tmp_path, stranger, "renewed", "DNS:localhost,IP:127.0.0.1")
        for fresh, old in ((renewed.key, server.key), (renewed.certificate, server.certificate)):
            os.replace(fresh, old)
        shown: dict[str, Any] = {"certificate": mine.certificate, "key": mine.key}
        assert await ask(edge, **shown, ca=stranger.certificate) == "8 "


async def test_https_shows_the_certificate_that_is_there_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = make_authority(tmp_path)
    server = issue(tmp_path, authority, "server", "DNS:localhost,IP:127.0.0.1")
    mine = issue(tmp_path, authority, "mine", "URI:spiffe://prod/globex")
    options: dict[str, Any] = {
        "tls_cert": server.certificate,
        "tls_key": server.key,
        "tls_client_ca": authority.certificate,
        "http_port": 0,
    }

    async def serial(edge: Edge, *, name: str) -> int:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        context.load_cert_chain(mine.certificate, mine.key)
        port = int(edge.http.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=name
        )
        shown = writer.get_extra_info("ssl_object").getpeercert()
        writer.close()
        return int(shown["serialNumber"], 16)

    async with serving(**options) as edge:
        before = await serial(edge, name="localhost")
        renewed = issue(tmp_path, authority, "renewed", "DNS:localhost,IP:127.0.0.1")
        server.key.write_text("half of it")
        assert await serial(edge, name="127.0.0.1") == before
        assert "stays as it was" in caplog.text
        os.replace(renewed.key, server.key)
        os.replace(renewed.certificate, server.certificate)
        after = [await serial(edge, name=name) for name in ("127.0.0.1", "localhost")]
        assert before not in after
        assert len(set(after)) == 1


def test_a_client_keeps_its_token_off_the_open_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORARY_TOKEN", "lry_abc\n")
    for target in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/x", "dns:///localhost:1"):
        Client(target).close()
    for target in ("10.0.0.7:1", "lorary:1", "dns:///lorary:1", "localhost.example:1"):
        with pytest.raises(ConfigError, match="unencrypted"):
            Client(target)
    monkeypatch.setenv("LORARY_TLS", "1")
    Client("lorary:1").close()
    monkeypatch.setenv("LORARY_TLS", "maybe")
    with pytest.raises(ConfigError, match="LORARY_TLS is 'maybe'"):
        Client("lorary:1")
    monkeypatch.delenv("LORARY_TLS")
    with pytest.raises(ConfigError, match="cannot be read"):
        Client("lorary:1", credentials=Credentials(token="x", ca=tmp_path / "absent"))
    with pytest.raises(ConfigError, match="line break"):
        Client("localhost:1", credentials=Credentials(token="a\nb"))
    Client("lorary:1", credentials=Credentials(token="x", insecure=True)).close()


def test_tokens_are_long_and_kept_as_hashes() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert {len(token) for token in made} == {47}
    assert all(token.startswith("lry_") and token.isascii() for token in made)
    assert control.DESCRIPTOR.package == "lorary.v1"
