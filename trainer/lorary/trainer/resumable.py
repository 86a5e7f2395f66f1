"""A Trainer whose checkpoints are whole or absent, hold no code, and lose nothing.

transformers writes a checkpoint file by file into its place, keeps optimizer and generators as pickles,
and forgets how patient early stopping has already been. Here a checkpoint is written beside its place
and renamed, its state is data (``state_files``), and everything that decides the next step is in it:
adapter, optimizer, schedule, all generators of every process, the Trainer's own counters.
"""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from lorary.trainer.checkpoints import checkpoint_path, draft_path, new_checkpoint, step_of
from lorary.trainer.state_files import generator_state, read_tree, restore_generators, write_tree

if TYPE_CHECKING:
    from torch import nn

_STATE = "trainer_state.json"
_NUM_KEPT = 2
"""Newest checkpoints that stay, beside the best one: should the last be damaged, there is another."""


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Trainer that saves and loads checkpoints our way.

    Args:
        identity: what ``run_identity`` returned; goes into every checkpoint.
    """

    def __init__(self, *args: Any, identity: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._identity = identity

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint of this step; every process keeps its own generators in it."""
        del model, trial
        folder, step = Path(self.args.output_dir), self.state.global_step
        with ExitStack() as stack:
            if self.args.should_save:
                draft = stack.enter_context(new_checkpoint(folder, step, self._identity))
            else:
                draft = draft_path(folder, step)
            self.accelerator.wait_for_everyone()  # the draft is there
            write_tree(draft, self._generators_name(), generator_state(str(self.args.device)))
            if self.args.should_save:
                self._write_state(draft)
            self.accelerator.wait_for_everyone()  # all generators are written
        if self.args.should_save:
            self._rotate(folder)

    def _write_state(self, draft: Path) -> None:
        """Write all but the generators into a draft."""
        self._find_best()
        self._write_weights(draft)
        write_tree(draft, "optimizer", self.optimizer.state_dict())
        write_tree(draft, "schedule", self.lr_scheduler.state_dict())
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(draft / _STATE))

    @abstractmethod
    def _write_weights(self, draft: Path) -> None:
        """Write what is trained into a draft."""

    def _find_best(self) -> None:
        """Name the folder of the best step, which may have been moved since it was written."""
        best = self.state.best_global_step
        if best is not None:
            folder = checkpoint_path(Path(self.args.output_dir), best)
            is_there = best == self.state.global_step or folder.is_dir()
            self.state.best_model_checkpoint = str(folder) if is_there else None

    def _rotate(self, folder: Path) -> None:
        """Drop all checkpoints but the newest and the best."""
        done = [path for path in folder.glob("checkpoint-*") if step_of(path) <= self._step()]
        kept = sorted(done, key=step_of)[-_NUM_KEPT:]
        for path in set(done) - set(kept):
            if step_of(path) != self.state.best_global_step:
                shutil.rmtree(path)

    def _step(self) -> int:
        return int(self.state.global_step)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Take up the counters of a checkpoint, wherever its folder is now."""
        result = super()._init_training_state(*args, **kwargs)
        self._find_best()
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.optimizer.load_state_dict(read_tree(Path(checkpoint), "optimizer"))
        # torch moves the state of parameters to their device, and leaves what is kept by name.
        for key, state in self.optimizer.state.items():
            if not isinstance(key, torch.Tensor):
                self.optimizer.state[key] = {
                    name: value.to(self.args.device) if isinstance(value, torch.Tensor) else value
                    for name, value in state.items()
                }
        self.lr_scheduler.load_state_dict(read_tree(Path(checkpoint), "schedule"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = read_tree(Path(checkpoint), self._generators_name())
            restore_generators(state, str(self.args.device))

    def _generators_name(self) -> str:
        return f"generators-{self.args.process_index}"


def stopped_early_at(checkpoint: Path, patience: int) -> int | None:
    """Return the step at which early stopping had ended the run of a checkpoint, if it had."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback")
    has_stopped = (
        stopping is not None
        and stopping["attributes"]["early_stopping_patience_counter"] >= patience
    )
    return step_of(checkpoint) if has_stopped else None
