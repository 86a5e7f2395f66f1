"""Push by the command line, serve in a process, call over a socket: the answers are PEFT's."""

from __future__ import annotations

import asyncio
import random
import re
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.client import AsyncClient, Chunk, GenerateResult
from tests.e2e.conftest import JUDGE_TEMPLATE, LABELS, PUSHED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.client import Client
    from tests.e2e.conftest import Oracle, World
    from tests.processes import ServerProcess

NUM_TOKENS = 20
PROMPT_LENGTHS = (1, 7, 60)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 60) for _ in range(length)] for length in PROMPT_LENGTHS]


async def test_a_mixed_batch_answers_as_peft_does_one_at_a_time(
    server: ServerProcess, world: World, oracle: Oracle
) -> None:
    """Sixty calls at once over four adapters of mixed ranks and none, prompts of mixed lengths."""
    digests = {v["name"]: v["digest"] for v in world.versions()} | {"": ""}
    cases = [(name, prompt) for name in ("", *PUSHED) for prompt in prompts()] * 4
    random.Random(1).shuffle(cases)

    async with AsyncClient(server.address, timeout_s=60) as client:

        async def ask(name: str, prompt: Sequence[int]) -> GenerateResult:
            return await client.generate(
                token_ids=prompt, adapter=name and f"{name}@prod", max_tokens=NUM_TOKENS
            )

        # A tiny answer can be over before the next call comes: again, until all four shared a step.
        for _ in range(20):
            answers = await asyncio.gather(*(ask(*case) for case in cases))
            info = await client.server_info()
            for (name, prompt), answer in zip(cases, answers, strict=True):
                expected = oracle.greedy(name, prompt, NUM_TOKENS)
                assert list(answer.token_ids) == expected, (name, prompt)
                assert answer.receipt.digest == digests[name]
                assert answer.receipt.base_fingerprint == info.base_fingerprint
            if len(info.steps_by_distinct_adapters) == 1 + len(PUSHED):
                break
    assert len(info.steps_by_distinct_adapters) == 1 + len(PUSHED)
    assert info.steps_by_distinct_adapters[len(PUSHED)] > 0


def test_adapters_answer_differently(oracle: Oracle) -> None:
    """Else equality with the oracle would prove nothing."""
    said = {tuple(oracle.greedy(name, prompts()[1], NUM_TOKENS)) for name in ("", *PUSHED)}
    assert len(said) == 1 + len(PUSHED)


def test_streamed_pieces_are_the_whole_answer(client: Client) -> None:
    # A tiny answer can be over before its first piece is sent: again, until it came in several.
    for _ in range(20):
        *chunks, last = client.stream(token_ids=[5, 9, 12], adapter="delta", max_tokens=30)
        assert isinstance(last, GenerateResult)
        pieces = [chunk for chunk in chunks if isinstance(chunk, Chunk)]
        assert "".join(piece.text for piece in pieces) == last.text
        assert tuple(t for piece in pieces for t in piece.token_ids) == last.token_ids
        if len(pieces) > 1:
            break
    assert len(pieces) > 1


def test_text_goes_through_the_adapters_own_template(client: Client) -> None:
    tokens = client.tokenize("the cat sat", adapter="judge@prod")
    assert "".join(tokens.pieces) == JUDGE_TEMPLATE.replace("{{ text }}", "the cat sat")
    by_text = client.generate("the cat sat", adapter="judge", max_tokens=8)
    by_ids = client.generate(token_ids=tokens.token_ids, adapter="judge", max_tokens=8)
    assert by_text.token_ids == by_ids.token_ids


def test_labels_are_scored_as_peft_scores_them(client: Client, world: World) -> None:
    text = "the film was not very good"
    found = client.classify(text, adapter="judge@prod")
    wanted = peft_label_logprobs(world.base, world.folders["judge"], text)
    assert found.logprobs == pytest.approx(wanted, abs=1e-3)
    assert found.label == max(wanted, key=lambda label: wanted[label])
    assert sum(found.probabilities.values()) == pytest.approx(1)


def test_a_scrape_counts_the_calls(client: Client, server: ServerProcess) -> None:
    before = scrape(server)
    client.generate(token_ids=[5, 9], adapter="alpha@prod", max_tokens=6, ignore_eos=True)
    with pytest.raises(LookupError):
        client.generate(token_ids=[5], adapter="nobody")
    after = scrape(server)

    def grown(series: str) -> float:
        return after[series] - before.get(series, 0.0)

    assert grown('lorary_requests_total{code="OK",method="Generate"}') == 1
    assert grown('lorary_requests_total{code="NOT_FOUND",method="Generate"}') == 1
    assert grown('lorary_tokens_total{kind="generation"}') == 6
    assert grown('lorary_tokens_total{kind="prompt"}') == 2
    assert grown("lorary_time_to_first_token_seconds_count") == 1
    assert after["lorary_engine_up"] == 1
    assert after["lorary_requests_running"] == 0


def scrape(server: ServerProcess) -> dict[str, float]:
    """Return every sample of /metrics, by name and labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=60) as answer:
        text = answer.read().decode()
    return {
        k: float(v) for k, v in re.findall(r"^([^#\s]\S*(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
    }


def peft_label_logprobs(base: Path, adapter: Path, text: str) -> dict[str, float]:
    """Score each label as the answer's beginning, with nothing of ours but the template."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    prompt = tokenizer(JUDGE_TEMPLATE.replace("{{ text }}", text), add_special_tokens=False)
    found = {}
    for label in LABELS:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([[*prompt["input_ids"], *ids]])
        with torch.inference_mode():
            logprobs = model(input_ids=whole).logits[0].log_softmax(-1)
        rows = logprobs[-len(ids) - 1 : -1]
        found[label] = float(rows[range(len(ids)), ids].sum())
    return found
