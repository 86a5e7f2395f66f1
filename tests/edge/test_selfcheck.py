"""``lorary selfcheck`` against a server around fakes: what it asks, and that it can fail."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import typer

from lorary.cli.selfcheck import selfcheck
from lorary.cli.selfcheck_cases import difference
from lorary.client import GenerateResult, PositionLogprobs, Receipt, Timings, Usage
from tests.edge.fakes import FakeEngine, FakePrompts, serving

if TYPE_CHECKING:
    from tests.edge.fakes import Edge


def answer(
    *tokens: int, top: tuple[tuple[int, float], ...] = (), digest: str = "d"
) -> GenerateResult:
    logprobs = tuple(PositionLogprobs(chosen=(t, -0.5), top=top) for t in tokens)
    timings = Timings(queue_s=0, adapter_load_s=0, prefill_s=0, decode_s=0)
    receipt = Receipt(
        ref="",
        name="",
        version=0,
        digest=digest,
        base_fingerprint="",
        quantization="",
        request_id="",
        timings=timings,
    )
    return GenerateResult(
        text="",
        token_ids=tokens,
        finish_reason="length",
        matched_stop="",
        usage=Usage(prompt_tokens=1, completion_tokens=len(tokens), cached_tokens=0),
        receipt=receipt,
        logprobs=logprobs,
    )


@pytest.mark.parametrize(
    ("beside", "tie", "found"),
    [
        (answer(1, 2), 0.0, ""),
        (answer(1, 3), 0.1, "token 1 is 3, alone 2, inf nats"),
        (answer(1, 9), 0.04, "token 1 is 9, alone 2, 0.05 nats"),
        (answer(1, 9), 0.06, ""),
        (answer(1), 1.0, "1 tokens, alone 2"),
        (answer(1, 2, digest="other"), 1.0, "answered by other"),
    ],
)
def test_what_counts_as_different(beside: GenerateResult, tie: float, found: str) -> None:
    alone = answer(1, 2, top=((2, -0.5), (9, -0.55)))
    assert difference(alone, beside, tie).startswith(found)
    assert bool(difference(alone, beside, tie)) == bool(found)


async def run(edge: Edge, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Run the command; return its exit code, and the result of every check by its name."""
    code = 0
    try:
        await asyncio.to_thread(
            selfcheck,
            serve_options=None,
            num_adapters=8,
            rounds=2,
            max_tokens=6,
            tie=0.0,
            target=edge.address,
            timeout=30,
            as_json=True,
        )
    except typer.Exit as left:
        code = left.exit_code
    checks: list[dict[str, str]] = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check["result"] for check in checks}


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes' tokens are numbers; here every word is its length."""
    monkeypatch.setattr(FakePrompts, "from_prompt", lambda _, text: [len(w) for w in text.split()])


NUM_CASES = 6
"""That the fakes can answer: the base twice, two adapters, one of them scaled, both together."""


@pytest.fixture(autouse=True)
def rounds_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each has been asked alone, nobody is answered before all of a round are there."""
    step = FakeEngine._step

    def together(self: FakeEngine) -> None:
        if len(self.submitted) <= NUM_CASES or len(self.submitted) % NUM_CASES == 0:
            step(self)

    monkeypatch.setattr(FakeEngine, "_step", together)


async def test_a_sound_server_passes(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving() as edge:
        assert await run(edge, capsys) == (
            0,
            {
                "base": "ok",
                "alpha@1": "ok",
                "beta@1": "ok",
                "other-base@1": "skip",
                "alpha@1*0.5": "ok",
                "alpha@1*0.7+beta@1*0.3": "ok",
                "beta@1*0.7+other-base@1*0.3": "skip",
                "mixed steps": "ok",
            },
        )


async def test_an_answer_that_depends_on_its_company_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = FakeEngine._advance

    def confused(self: FakeEngine, request: Any, tokens: list[int]) -> Any:
        output = advance(self, request, tokens)
        if output is not None and getattr(request.lease, "name", "") == "beta":
            # What another adapter would have said, once anybody is beside it.
            output.token_ids = [t - (len(self._running) > 1) for t in output.token_ids]
        return output

    monkeypatch.setattr(FakeEngine, "_advance", confused)
    async with serving() as edge:
        code, found = await run(edge, capsys)
    assert code == 1
    assert [name for name, result in found.items() if result == "FAIL"] == ["beta@1"]
