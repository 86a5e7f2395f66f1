"""Embed against transformers and PEFT in float32, through a real server: several adapters at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from tests.server.test_embed import hidden_states

if TYPE_CHECKING:
    from lorary.client import Client, Embedding
    from tests.e2e.conftest import World

PROMPTS = ["<|im_start|>user\nthe big red cat<|im_end|>\n", "dog", "the cat sat on the mat"]


def test_vectors_are_transformers(client: Client, world: World) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    names = ("", "alpha", "bravo", "charlie")

    def embed(name: str) -> list[Embedding]:
        return client.embed(prompts=PROMPTS, adapter=name, dimensions=16, normalize=True)

    with ThreadPoolExecutor(len(names)) as pool:
        told = dict(zip(names, pool.map(embed, names), strict=True))
    for name in names:
        folder = world.folders[name] if name else None
        for prompt, one in zip(PROMPTS, told[name], strict=True):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            mean = hidden_states(world.base, folder, ids).mean(0)[:16]
            found = torch.tensor(one.values, dtype=torch.float64)
            torch.testing.assert_close(found, mean / mean.norm(), atol=1e-4, rtol=1e-4)
            assert (one.usage.prompt_tokens, one.receipt.name) == (len(ids), name)
