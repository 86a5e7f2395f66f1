"""Keep the libraries' remarks about each other off the terminal; errors still raise."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context, drop remarks that no user of Lorary can act on.

    peft 0.21 reads an attribute that transformers 5.23 renamed and has advice on EVA, bitsandbytes calls a deprecated torch
    function, and the Trainer logs that it aligned padding tokens and how it sorts checkpoints.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            warnings.filterwarnings("ignore", module="bitsandbytes")
            warnings.filterwarnings("ignore", message="lora with eva initialization")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
