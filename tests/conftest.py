"""What every test may use: a tiny base with a tokenizer, adapters for it, and PEFT as the oracle."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.alone import pytest_runtest_protocol as pytest_runtest_protocol

# Decided before anything imports Triton, which reads it once: without a GPU the tests of its kernels
# run in its interpreter. Nothing else here uses Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

torch.set_num_threads(1)


LONG = ("trainer", "deploy", "e2e", "edge")
"""Folders whose files take longest: they start processes and train."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; skip, with the reason, tests of the gpu marker where no card answers.

    Several processes take files in this order, and the last ones should be short, or a core idles at the end.
    """
    items.sort(
        key=lambda item: LONG.index(folder) if (folder := _folder(item)) in LONG else len(LONG)
    )
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Keep what all tests have in common out of every later collection of garbage: a second of each training."""
    gc.collect()
    gc.freeze()


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until ``condition`` holds; fail the test when it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never became true"
        time.sleep(0.005)


WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "in",
    "mat",
    "hat",
    "big",
    "red",
    "blue",
    "sky",
    "sun",
    "good",
    "bad",
    "film",
    "was",
    "is",
    "not",
    "very",
]
VOCAB = 160
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_tokenizer(*, every_byte: bool = False) -> Any:
    """A byte-level BPE tokenizer over a few words, with ChatML markers and a chat template.

    With ``every_byte`` it can write any text; else only letters of its words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted({c for w in WORDS for c in w} | set("ĠĊéüñ:.,!?éà€😀"))
    if every_byte:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + VOCAB if every_byte else VOCAB,
        special_tokens=special,
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4 + ["é ü € 😀\nuser assistant:"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


TINY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
"""Of every tiny base whose family names them as Llama does."""


def build_llama(
    folder: Path,
    *,
    seed: int = 0,
    every_byte: bool = False,
    tokenizer: Any = None,
    **overrides: Any,
) -> Path:
    """Save a random Llama of two layers with its tokenizer; return the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or build_tokenizer(every_byte=every_byte)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            **TINY_SIZES,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
            **overrides,
        }
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class AdapterRecipe:
    """A random adapter for a tiny base; ``strength`` is the standard deviation of B."""

    rank: int = 8
    alpha: float = 16.0
    modules: Sequence[str] = ALL_LINEAR
    strength: float = 0.1
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)


def build_adapter(base: Path, folder: Path, recipe: AdapterRecipe) -> Path:
    """Save a random PEFT adapter (no manifest) for the base in ``base``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.modules),
        task_type="CAUSAL_LM",
        **recipe.config,
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, recipe.strength)
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def write_manifest(base: Path, folder: Path, **task: Any) -> Path:
    """Write the manifest.json that the trainer would have written."""
    from lorary.registry import BaseCard
    from lorary.registry.manifest import BaseIdentity, Manifest, Method, Task

    card = BaseCard.from_folder(base)
    raw = json.loads((folder / "adapter_config.json").read_text())
    manifest = Manifest(
        base=BaseIdentity(
            name=card.name, fingerprint=card.fingerprint, architecture=card.architecture
        ),
        method=Method(
            name="lora",
            rank=raw["r"],
            alpha=float(raw["lora_alpha"]),
            target_modules=tuple(sorted(raw["target_modules"])),
        ),
        task=Task(**task),
        created_at="2026-01-01T00:00:00Z",
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def build_adapters(base: Path, root: Path, recipes: Mapping[str, AdapterRecipe]) -> dict[str, Path]:
    """Save random PEFT adapters with manifests, each in a folder of its name."""
    return {
        name: write_manifest(base, build_adapter(base, root / name, recipe))
        for name, recipe in recipes.items()
    }


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama, shared by all tests; never write to it."""
    return build_llama(tmp_path_factory.mktemp("bases") / "tiny-llama")


RECIPES = {
    "alpha": AdapterRecipe(rank=4, alpha=8, seed=1),
    "bravo": AdapterRecipe(rank=8, alpha=16, seed=2),
    "charlie": AdapterRecipe(rank=16, alpha=16, seed=3, modules=("q_proj", "v_proj")),
    "delta": AdapterRecipe(rank=1, alpha=4, seed=4, strength=0.3),
    "echo": AdapterRecipe(rank=33, alpha=24, seed=5, config={"use_rslora": True}),
    "foxtrot": AdapterRecipe(
        rank=8, alpha=8, seed=6, config={"rank_pattern": {"down_proj": 12, "q_proj": 3}}
    ),
}


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders with manifests, of mixed ranks, scales and target modules."""
    return build_adapters(tiny_base, tmp_path_factory.mktemp("adapters"), RECIPES)


def peft_greedy(
    base: Path,
    adapter: Path | None,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    ignore_eos: bool = False,
) -> list[int]:
    """The oracle: PEFT in float32, one request at a time, greedy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    if ignore_eos:
        model.generation_config.eos_token_id = None
    return greedy(model, prompt_ids, max_tokens)


def greedy(model: Any, prompt_ids: Sequence[int], max_tokens: int = 12) -> list[int]:
    """Return what transformers' own ``generate`` answers, greedily."""
    ids = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=2,
        )
    return list(out[0, len(prompt_ids) :].tolist())
