"""Send a run's figures to the experiment trackers that a recipe names, while it goes on.

The recorders are transformers' own; what they get is what ``report/history.jsonl`` keeps: loss, validation
loss, learning rate, gradient norm, tokens per second, memory.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorary.errors import MissingDependency

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before any work, a tracker that is not installed.

    Raises:
        MissingDependency: the message has the command.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingDependency(
                f"training.trackers names '{name}', which is not installed. Run: pip install {name}"
            )


def tracker_callbacks(names: Sequence[str], folder: Path) -> list[Any]:
    """Return one callback per tracker.

    Args:
        names: of ``training.trackers``; checked.
        folder: where TensorBoard's files go. The others have their own places and settings
            (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_PROJECT`` and so on).
    """
    from transformers.integrations import integration_utils

    callbacks: list[Any] = []
    for name in names:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(log_dir=str(folder))  # type: ignore[no-untyped-call]
            callbacks.append(integration_utils.TensorBoardCallback(writer))
        else:
            callbacks.append(integration_utils.INTEGRATION_TO_CALLBACK[name]())
    return callbacks
