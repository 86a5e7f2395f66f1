"""Load a base under a task's head: a classifier over an encoder, an encoder-decoder, a bare body."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorary.bases.load import quiet_bitsandbytes
from lorary.errors import ConfigError, CorruptArtifact

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from lorary.bases.find import Base


def load_task_model(
    base: Base, auto_class: str, *, dtype: torch.dtype, device: str = "cpu", **options: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load ``base`` as ``transformers.<auto_class>`` onto ``device``, in eval mode.

    What the checkpoint does not hold is drawn anew from torch's global generator: the head, and what a
    head brings along (BERT's pooler over a masked language model).

    Args:
        base: what ``find_base`` returned.
        auto_class: such as ``AutoModelForSequenceClassification``.
        dtype: of all weights.
        device: a torch device.
        options: passed to ``from_pretrained`` (``num_labels``).

    Returns:
        The model, and the full names of the modules that were drawn anew; an adapter must carry them.

    Raises:
        ConfigError: a device that torch does not see.
        CorruptArtifact: not a model that transformers knows under such a head.
    """
    quiet_bitsandbytes()
    import torch
    import transformers

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' was asked for, but torch sees no CUDA device.")
    try:
        with warnings.catch_warnings(), _without_bars():
            warnings.filterwarnings("ignore", module="bitsandbytes")
            model, found = getattr(transformers, auto_class).from_pretrained(
                base.path,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CorruptArtifact(
            f"base '{base.name}' in '{base.path}' cannot be loaded as {auto_class}: {error}"
        ) from error
    # A head of another number of labels is drawn anew, too; its keys come with both shapes.
    fresh = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
    heads = outermost(model, fresh)
    if "" in heads:
        raise CorruptArtifact(
            f"base '{base.name}' in '{base.path}' holds no weight of {type(model).__name__}; its "
            "config.json and its weights are of different models."
        )
    return model.eval(), heads


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


def outermost(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Return the largest modules all of whose parameters are in ``names``, by full name, in order."""
    parameters = [name for name, _ in model.named_parameters()]
    wanted = set(names)
    found: dict[str, None] = {}
    for name in parameters:
        if name not in wanted:
            continue
        best, parts = name.rpartition(".")[0], name.split(".")[:-1]
        while parts:
            parts.pop()
            prefix = ".".join(parts)
            inside = [p for p in parameters if not prefix or p.startswith(f"{prefix}.")]
            if not set(inside) <= wanted:
                break
            best = prefix
        found[best] = None
    return tuple(found)
