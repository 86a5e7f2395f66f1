"""One forward over a step's flat row: native layers where there are, else transformers' own model code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lorary.errors import ConfigError
from lorary.server.adapters.layers import step_segments, step_weights
from lorary.server.engine.attention import NAME, step_plan
from lorary.server.engine.upload import is_beside, upload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.server.engine.batch import Batch
    from lorary.server.engine.static_step import StaticSteps
    from lorary.server.native.decoder import FusedModel


class Runner:
    """The model behind a function from ``Batch`` to logits and hidden states; engine thread only.

    Attributes:
        model: with Lorary's linear layers and attention.
        fused: the native form of its layers, where there is one.
        static: its decode steps in fixed shapes, where they are asked for.
        vocab_size: tokens that it has an embedding for.
    """

    def __init__(self, model: Any, fused: FusedModel | None = None) -> None:
        if not getattr(model, "_supports_attention_backend", False):
            raise ConfigError(
                f"{type(model).__name__} does not go through transformers' attention interface, so "
                "its cache cannot be shared by a mixed batch; choose another base"
            )
        model.set_attn_implementation(NAME)
        self.model = model
        self.fused = fused
        self.static: StaticSteps | None = None
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])

    def forward(self, batch: Batch) -> torch.Tensor | list[int]:
        """Run one step, in inference mode; write its keys and values into the cache of ``batch.plan``.

        Returns:
            Float32 logits [L, vocab] of ``batch.logits_rows``, the caller's until the next step; of a greedy
            step, where the layers run natively, the L tokens where they are largest. ``batch.hidden`` then
            holds what enters the head of ``batch.hidden_rows``, if there are any.
        """
        merged = batch.merged
        assert merged is None or not merged.is_freed, "a step on weights that are gone"
        fused = self.fused if merged is None else merged.fused
        if fused is not None:
            return fused.forward(batch)
        assert not batch.first_layer, "only native layers may be begun in the middle"
        if self.static is not None and (found := self.static.forward(batch)) is not None:
            return found
        token_ids, position_ids, logits_rows = _uploaded(batch)
        in_place = None if merged is None else merged.in_place
        with (
            step_plan(batch.plan),
            step_segments(batch.segments),
            step_weights(in_place),
            self._keeping_hidden(batch),
        ):
            output = self.model(
                input_ids=token_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=logits_rows,
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @contextmanager
    def _keeping_hidden(self, batch: Batch) -> Iterator[None]:
        """Let a forward within the block leave what its last norm gives of ``hidden_rows`` with the batch.

        Steps from which nobody wants any are as they would be without.
        """
        if not batch.embedders:
            yield
            return

        def keep(_module: Any, _arguments: Any, output: Any) -> None:
            batch.hidden = output.last_hidden_state[0, batch.hidden_rows].float()

        body = getattr(self.model, self.model.base_model_prefix)
        handle = body.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def _uploaded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring all that a step says to the device, in one copy; return tokens, positions and rows there."""
    own = (batch.token_ids, batch.position_ids, batch.logits_rows)
    device = batch.plan.cache.k.device
    if is_beside(device):
        return own
    segments = batch.segments
    if segments is not None and (not segments.num_short or segments.has_tiles):
        segments = None
    tiles = [] if segments is None else [segments.tiling.flat()]
    there = upload([*own, *tiles, *batch.plan.arrays()], device)
    if segments is not None:
        segments.place(there[len(own)])
    batch.plan.place(there[len(own) + len(tiles) :])
    return there[0], there[1], there[2]
