"""Tokens of identity providers: which are good, whose they are, and where keys come from."""

from __future__ import annotations

import http.server
import json
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from lorary.client import AsyncClient, Credentials
from lorary.errors import ConfigError, Unauthenticated, Unavailable
from lorary.server.access.grants import GrantsFile, read_grants
from lorary.server.access.guard import Guard
from lorary.server.access.jwt_keys import RENEW_S, RETRY_S, JwtKeys
from tests.edge.fakes import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lorary.server.access.grants import Tenant

ISSUER = "https://login.example.com"
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public(kid: str, key: Any, **more: str) -> dict[str, Any]:
    algorithm = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    shown: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    return {**shown, "kid": kid, **more}


def token(key: Any = EC_KEY, kid: str = "one", algorithm: str = "ES256", **claims: Any) -> str:
    now = int(time.time())
    said = {"iss": ISSUER, "aud": "lorary", "sub": "acme-batch", "exp": now + 60, **claims}
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, key, algorithm=algorithm, headers={"kid": kid})


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    keys = [public("one", EC_KEY, use="sig"), public("two", RSA_KEY, alg="RS256")]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    path = tmp_path / "tenants.yaml"
    path.write_text(
        f"issuers:\n  {ISSUER}: {{keys: keys.json, audience: lorary}}\n"
        f"tenants:\n  acme: {{subjects: {{{ISSUER}: [acme-batch]}}, adapters: ['al*']}}\n"
    )
    return path


@pytest.fixture
def guard(tenants: Path) -> Iterator[Guard]:
    made = Guard(GrantsFile(tenants))
    yield made
    made.close()


def who(guard: Guard, text: str) -> Tenant:
    return guard.identify(f"Bearer {text}")


def test_a_good_token_is_its_tenants(guard: Guard) -> None:
    assert who(guard, token()).name == "acme"
    assert who(guard, token(RSA_KEY, "two", "RS256")).name == "acme"
    assert who(guard, token(aud=["other", "lorary"])).name == "acme"
    assert who(guard, token(exp=int(time.time()) - 20)).name == "acme", "clocks differ"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: token(exp=int(time.time()) - 40), "expired"),
        (lambda: token(exp=None), 'missing the "exp"'),
        (lambda: token(nbf=int(time.time()) + 90), "not yet valid"),
        (lambda: token(aud="other"), "[Aa]udience"),
        (lambda: token(aud=None), '"aud"'),
        (lambda: token(iss="https://evil.example"), "issuer is none"),
        (lambda: token(iss=None), "issuer is none"),
        (lambda: token(sub="stranger"), "'stranger' is no tenant's here"),
        (lambda: token(sub=None), "no claim 'sub'"),
        (lambda: token(kid="three"), "does not publish"),
        (lambda: token(ec.generate_private_key(ec.SECP256R1())), "[Ss]ignature"),
        (lambda: token(None, algorithm="none"), "not good"),
        # The public key as a shared secret, and as a key of the token's own choice.
        (lambda: token(b"x" * 32, kid="two", algorithm="HS256"), "not good"),
        (lambda: token(EC_KEY, kid="two"), "not good"),
        (lambda: "a.b.c", "no JWT"),
        (lambda: token(fill="x" * 20_000), "16384 are the most"),
    ],
)
def test_whatever_is_wrong_with_a_token_is_said_and_it_is_nobodys(
    guard: Guard, make: Callable[[], str], why: str
) -> None:
    with pytest.raises(Unauthenticated, match=why):
        who(guard, make())


async def test_calls_are_made_with_them(tenants: Path) -> None:
    async with serving(access=tenants) as edge:
        credentials = Credentials(token=token())
        async with AsyncClient(edge.address, credentials=credentials) as acme:
            assert (await acme.generate(prompt="2 5", adapter="alpha", max_tokens=1)).text == "7 "
        credentials = Credentials(token=token(exp=1))
        async with AsyncClient(edge.address, credentials=credentials) as late:
            with pytest.raises(Unauthenticated, match="expired"):
                await late.generate(prompt="2 5", adapter="alpha", max_tokens=1)


@contextmanager
def publishing(answer: Callable[[], tuple[int, bytes]]) -> Iterator[str]:
    """Serve keys over HTTP on loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer()
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/keys"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_keys_are_read_again_and_outlive_their_issuer() -> None:
    now, listed = 0.0, [public("one", EC_KEY)]
    status, num_asked = 200, 0

    def answer() -> tuple[int, bytes]:
        nonlocal num_asked
        num_asked += 1
        return status, json.dumps({"keys": listed}).encode()

    with publishing(answer) as address:
        keys = JwtKeys(clock=lambda: now)
        keys._thread = threading.current_thread()  # the test looks itself
        keys.use([address])
        assert keys.trouble(address) == "they were not read yet"
        keys.renew_due()
        assert keys.find(address, "one") is not None
        assert not keys.trouble(address)
        listed.append(public("two", RSA_KEY))
        keys.renew_due()
        assert keys.find(address, "two") is None
        keys.renew_due()
        assert num_asked == 1, "whoever makes up names of keys must not make us ask"
        now += RETRY_S
        keys.renew_due()
        assert keys.find(address, "two") is not None
        now += RENEW_S - 1
        keys.renew_due()
        assert num_asked == 2
        now += 1
        for status in (500, 302):  # noqa: B007 - read by ``answer``
            keys.renew_due()
            assert keys.trouble(address)
            assert keys.find(address, "one") is not None
            now += RETRY_S
        status = 200
        keys.renew_due()
        assert not keys.trouble(address)
        assert num_asked == 5, "a redirect is not followed"


def test_an_issuer_that_is_away_is_told_from_a_bad_token(tenants: Path) -> None:
    with publishing(lambda: (503, b"")) as address:
        text = tenants.read_text().replace("keys.json", address)
        tenants.write_text(text)
        guard = Guard(GrantsFile(tenants))
        with pytest.raises(Unavailable, match="cannot be read just now"):
            who(guard, token())
        guard.close()


@pytest.mark.parametrize(
    "keys", ["", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "eA"}]}']
)
def test_what_is_no_set_of_public_keys_lets_nobody_in(tenants: Path, keys: str) -> None:
    (tenants.parent / "keys.json").write_text(keys)
    guard = Guard(GrantsFile(tenants))
    with pytest.raises(Unavailable):
        who(guard, token())
    guard.close()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("keys: keys.json, ", "", "'keys' is missing"),
        (", audience: lorary", "", "'audience' is missing"),
        ("keys.json", "http://login.example.com/keys", "neither a file nor an https address"),
        ("keys.json", "file:///etc/passwd", "neither a file nor an https address"),
        ("lorary}", "lorary, algorithms: [HS256]}", "HS256"),
        ("lorary}", "lorary, colour: red}", "'colour' is unknown"),
        (f"{{{ISSUER}: [acme-batch]}}", "{https://other: [a]}", "no issuer of this file"),
        ("[acme-batch]", "acme-batch", "list of texts"),
        ("[acme-batch]", "[]", "nobody could be it"),
    ],
)
def test_slips_in_the_file_are_found(tenants: Path, old: str, new: str, why: str) -> None:
    text = tenants.read_text()
    assert old in text
    tenants.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=why):
        read_grants(tenants)
