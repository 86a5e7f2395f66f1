"""Score against transformers and PEFT in float32, one continuation at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.client import Client, Scored
    from tests.e2e.conftest import World

PROMPT = "<|im_start|>user\nthe big red cat<|im_end|>\n"
TEXTS = [" sat on the mat", "dog", " was not very good", "dog"]


def logprobs(world: World, name: str, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> Any:
    """Return the log probability of every token of every text behind the prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    if name:
        model = PeftModel.from_pretrained(model, str(world.folders[name]))
    model.eval()
    found = []
    for ids in texts:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
        found.append([float(rows[i, token]) for i, token in enumerate(ids)])
    return found


def test_continuations_are_as_likely_as_transformers_says(client: Client, world: World) -> None:
    """Several adapters at once, in one batch; what is sent twice is told twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    ends = [
        (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        for text in TEXTS
    ]
    names = ("", "alpha", "bravo", "charlie")

    def score(name: str) -> Scored:
        return client.score(TEXTS, prompt=PROMPT, adapter=name, with_end=True)

    with ThreadPoolExecutor(len(names)) as pool:
        told = dict(zip(names, pool.map(score, names), strict=True))
    for name in names:
        assert [one.text for one in told[name].texts] == TEXTS
        assert [one.token_ids for one in told[name].texts] == ends
        for one, wanted in zip(told[name].texts, logprobs(world, name, prompt, ends), strict=True):
            assert one.logprobs == pytest.approx(wanted, abs=2e-4)
            assert one.logprob == pytest.approx(sum(wanted), abs=1e-3)
        assert told[name].receipt.name == name
        assert told[name].usage.prompt_tokens == len(prompt)
    without = client.score(TEXTS[:1], prompt=PROMPT, adapter="alpha").texts[0]
    assert without.logprobs == pytest.approx(told["alpha"].texts[0].logprobs[:-1], abs=1e-4)


@pytest.mark.parametrize(
    ("texts", "field"),
    [
        ([], "continuations"),
        (["a"] * 129, "continuations"),
        (["a", ""], "continuations[1]"),
        (["a<|im_end|>"], "continuations[0]"),
        (["the cat sat on the mat " * 40], "input"),  # more than the context holds
    ],
    ids=["none", "many", "empty", "special", "long"],
)
def test_continuations_that_cannot_be_scored_are_refused(
    client: Client, texts: list[str], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.score(texts, prompt=PROMPT)
    assert refused.value.field == field
