"""The console in a real browser against a real server: sign in, read, ask, stop, promote, roll back, sign out."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.registry import BaseCard, Registry
from lorary.server.access.tokens import token_hash
from tests.devtools import MODIFIER_CTRL, browsing, find_browser
from tests.processes import serving
from tests.registry.conftest import Forge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.devtools import Page
    from tests.processes import ServerProcess

ADMIN, USER = (f"lry_{name}-{'x' * 40}" for name in ("admin", "user"))
TENANTS = f"""
tenants:
  operations: {{role: admin, tokens: [{token_hash(ADMIN)}]}}
  acme: {{tokens: [{token_hash(USER)}], adapters: ["pets/*"]}}
"""
MARKUP = "<img src=x onerror=alert(1)>"
PROMPT = "the cat sat on the mat"
ROWS = "[...document.querySelectorAll('#rows tr')]"
TEXTS = "[...document.querySelectorAll('.text')].map(node => node.textContent)"
STATUSES = "[...document.querySelectorAll('.status')].map(node => node.textContent)"


@pytest.fixture(scope="module")
def registry(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """``pets/cats`` with versions 1 and 2, ``prod`` at 1; and ``dogs``, which is not everybody's."""
    root = tmp_path_factory.mktemp("console")
    forge = Forge(card=BaseCard.from_folder(tiny_base), root=root / "adapters")
    opened = Registry.open(root / "registry", create=True)
    for seed, name in ((1, "pets/cats"), (2, "pets/cats"), (3, "dogs")):
        opened.push(forge.folder(str(seed), seed=seed), name, base=forge.card)
    opened.set_alias("pets/cats", "prod", 1, reason=MARKUP)
    return opened


@pytest.fixture(scope="module")
def server(
    tiny_base: Path, registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    find_browser()  # before minutes go into a server that nobody opens
    work = tmp_path_factory.mktemp("server")
    tenants = work / "tenants.yaml"
    tenants.write_text(TENANTS)
    folder = Path(registry.url.removeprefix("file://"))
    options = ("--http-port", "0", "--access", str(tenants))
    with serving(tiny_base, folder, work, *options) as running:
        yield running


@pytest.fixture
def page(server: ServerProcess, tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path) as opened:
        opened.open(f"{server.http_url}/console/")
        yield opened


def sign_in(page: Page, token: str) -> None:
    page.until("!document.querySelector('#sign-in').hidden")
    page.write("#token", token)
    page.press_enter()


def answer(server: ServerProcess, ref: str, *, num_tokens: int) -> str:
    """Return what the API says, asked without a page."""
    body = {
        "model": ref,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": num_tokens,
        "temperature": 0,
    }
    headers = {"content-type": "application/json", "authorization": f"Bearer {ADMIN}"}
    request = urllib.request.Request(
        f"{server.http_url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        told: dict[str, Any] = json.load(response)
    return str(told["choices"][0]["message"]["content"])


def unexpected(page: Page) -> list[str]:
    """Return what the browser complained of, but for refusals that the page was made to meet."""
    return [text for text in page.problems if "status of 401" not in text and "409" not in text]


def test_an_admin_reads_asks_and_moves_an_alias(
    server: ServerProcess, registry: Registry, page: Page
) -> None:
    sign_in(page, "lry_wrong")
    page.until("document.querySelector('#sign-in-problem').textContent.includes('token')")
    assert page.js("document.querySelector('#main').hidden")
    sign_in(page, ADMIN)
    page.until(f"{ROWS}.length === 3")
    assert page.js("document.cookie + JSON.stringify(localStorage)") == "{}"
    assert page.text("#caller") == "operations (admin)"
    rows = page.js(f"{ROWS}.map(row => [...row.cells].map(cell => cell.innerText.trim()))")
    assert [row[:3] for row in rows] == [
        ["dogs", "1", ""],
        ["pets/cats", "2", ""],
        ["pets/cats", "1", "prod"],
    ]
    assert {row[3] for row in rows} == {"registry"}

    # The same prompt through two versions at once, and the API's own answers.
    refs = ("pets/cats@prod", "pets/cats@2")
    for place, ref in enumerate(refs, start=1):
        page.write(f".column:nth-child({place}) .ref input", ref)
    page.write(".column:nth-child(3) .ref input", "pets/cats@2")
    page.write("#max-tokens", "24")
    page.write("#prompt", PROMPT)
    page.press_enter(modifiers=MODIFIER_CTRL)
    page.until(f"{STATUSES}[2].endsWith('same as column 2')")
    assert page.js(f"{STATUSES}.every(text => text.includes('first after'))")
    texts = page.js(TEXTS)[:2]
    assert texts == [answer(server, ref, num_tokens=24) for ref in refs]
    assert len(set(texts)) == 2
    assert all(texts)
    digests = [v.digest for v in registry.list() if v.name == "pets/cats"]
    told = page.js("[...document.querySelectorAll('.receipt code')].map(node => node.title)")
    assert told[:2] == digests
    page.until(f"{ROWS}.filter(row => row.innerText.includes('resident')).length >= 2")
    page.until("document.querySelectorAll('.chart path[d*=L]').length >= 4")

    # Somebody else is faster: nothing is overwritten, and the page sees where the alias is now.
    page.js(f"{ROWS}[1].querySelector('button').click()")
    page.until("document.querySelector('#promote-effect').textContent.includes('1 → 2')")
    registry.set_alias("pets/cats", "prod", None)
    page.click("#promote [type=submit]")
    page.until(
        "document.querySelector('#promote-problem').textContent.includes('nothing was changed')"
    )
    assert "prod" not in registry.aliases("pets/cats")
    page.until("document.querySelector('#promote-effect').textContent.includes('is new')")
    page.click("#promote [type=submit]")
    page.until("!document.querySelector('#promote').open")
    assert registry.aliases("pets/cats")["prod"] == 2
    page.until(f"{ROWS}[1].cells[2].innerText === 'prod'")
    assert registry.log("pets/cats")[-1].actor == "operations"

    # The log's words are words.
    page.js(f"{ROWS}[1].querySelectorAll('button')[1].click()")
    page.until("document.querySelectorAll('#history-moves tr').length === 3")
    assert MARKUP in page.text("#history-moves")
    assert page.js("document.querySelectorAll('#history img').length") == 0
    assert not unexpected(page)


def test_a_rollback_and_a_stop(server: ServerProcess, registry: Registry, page: Page) -> None:
    registry.set_alias("pets/cats", "stable", 1)
    registry.set_alias("pets/cats", "stable", 2)
    sign_in(page, ADMIN)
    page.until(f"{ROWS}.length === 3")
    page.js(f"{ROWS}[1].querySelectorAll('button')[1].click()")
    page.until("document.querySelector('#history-aliases button[aria-label^=stable]')")
    page.write("#history-reason", "errors")
    page.click("#history-aliases button[aria-label^=stable]")
    page.until("document.querySelector('#history-moves tr').innerText.includes('(rollback)')")
    assert registry.aliases("pets/cats")["stable"] == 1
    last = registry.log("pets/cats")[-1]
    assert (last.kind, last.reason, last.actor) == ("rollback", "errors", "operations")
    page.click("#history [data-close]")

    page.write("#max-tokens", "200")
    page.js("document.querySelector('#form').value = 'raw'")
    page.write("#prompt", PROMPT)
    page.js(
        "new MutationObserver(() => document.querySelector('#stop').click())"
        ".observe(document.querySelector('.text'), {childList: true})"
    )
    page.press_enter(modifiers=MODIFIER_CTRL)
    page.until(f"{STATUSES}.some(text => text.startsWith('stopped after'))")
    page.until("document.querySelector('#stop').disabled")
    assert not unexpected(page)


def test_a_user_sees_what_is_hers_and_moves_nothing(page: Page) -> None:
    sign_in(page, USER)
    page.until(f"{ROWS}.length === 2")
    assert page.text("#caller") == "acme (user)"
    assert "dogs" not in page.text("#main")
    assert page.js("document.querySelector('#metrics').hidden")
    assert page.js("document.querySelectorAll('#table button').length") == 0
    refused = page.js(
        "fetch('api/promote', {method: 'POST', headers: {'content-type': 'application/json', authorization:"
        f" 'Bearer {USER}'}}, body: '{{}}'}}).then(answer => answer.status)"
    )
    assert refused == 403
    page.click("#sign-out")
    page.until("!document.querySelector('#sign-in').hidden")
    assert page.js("JSON.stringify(sessionStorage)") == "{}"
    # A phone shows all of it without scrolling sideways.
    sign_in(page, USER)
    page.until(f"{ROWS}.length === 2")
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=800,
        deviceScaleFactor=2,
        mobile=True,
    )
    assert page.js("document.documentElement.scrollWidth") <= 390
    assert not [text for text in unexpected(page) if "403" not in text]
