"""PEFT's own mixed batch: ``generate(adapter_names=[…])``, one static batch after another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.workload import Call, Contender, Trace
from lorary.bases.load import load_model
from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.bases import Base

_BASE = "__base__"


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each step of ``generate`` has its tokens; never stops."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class PeftMixed(Contender):
    """The first peer. Calls without any adapter run on the bare model, as a user would do it."""

    name = "peft"

    def __init__(
        self, base: Base, folders: Mapping[str, Path], *, pad_id: int, dtype: torch.dtype
    ) -> None:
        self._base = base
        self._folders = folders
        self._pad_id = pad_id
        self._dtype = dtype
        self._plain: Any = self._load_base()
        self._mixed: Any = None

    def prepare(self, adapters: Sequence[str]) -> None:
        """Load adapters, in the base's own dtype."""
        with quiet_libraries():
            for name in adapters:
                self._load(name)

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Answer in batches of ``concurrency``; a batch is sent when the one before has ended."""
        traces: list[Trace] = []
        for start in range(0, len(calls), concurrency):
            traces += self._batch(calls[start : start + concurrency], new_tokens)
        return traces

    def close(self) -> None:
        """Drop the models."""
        self._plain = self._mixed = None

    def next_tokens(self, call: Call, answer: Sequence[int]) -> list[int]:
        """Return the most likely token at each position of a given answer (teacher forcing)."""
        return [int(token) for token in self.logits(call, answer).argmax(-1)]

    def logits(self, call: Call, answer: Sequence[int]) -> torch.Tensor:
        """Return logits [len(answer), vocab] of each position of a given answer (teacher forcing)."""
        ids = torch.tensor([[*call.prompt_ids, *answer]])
        model, options = self._model([call])
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, **options).logits[0]
        return logits[len(call.prompt_ids) - 1 : -1]

    def _load(self, name: str) -> None:
        folder = str(self._folders[name])
        if self._mixed is None:
            self._mixed = PeftModel.from_pretrained(
                self._load_base(), folder, adapter_name=name, autocast_adapter_dtype=False
            ).eval()
        elif name not in self._mixed.peft_config:
            self._mixed.load_adapter(folder, name, autocast_adapter_dtype=False)

    def _load_base(self) -> Any:
        model = load_model(self._base, quantization="none", dtype=self._dtype, device="cpu")
        # No end token: every answer has its full length.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=self._pad_id
        )
        return model

    def _model(self, calls: Sequence[Call]) -> tuple[Any, dict[str, Any]]:
        if all(call.adapter is None for call in calls):
            return self._plain, {}
        return self._mixed, {"adapter_names": [call.adapter or _BASE for call in calls]}

    def _batch(self, calls: Sequence[Call], new_tokens: int) -> list[Trace]:
        model, options = self._model(calls)
        length = max(len(call.prompt_ids) for call in calls)
        clock = _Clock()
        sent_s = time.perf_counter()
        ids = torch.full((len(calls), length), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, call in enumerate(calls):
            ids[row, length - len(call.prompt_ids) :] = torch.tensor(call.prompt_ids)
            mask[row, length - len(call.prompt_ids) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
                **options,
            )
        rows = output[:, length:].tolist()
        return [Trace(sent_s, row, list(clock.times_s)) for row in rows]
