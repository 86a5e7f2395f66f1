"""An adapter's weights in a checkpoint: all of its parameters, and what its method keeps beside them.

PEFT's own files are made for loading an adapter onto a fresh base: loading one again begins the method
anew, resizes what it had shrunk, and knows nothing of a method's state. These are read back in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorary.errors import CorruptArtifact
from lorary.trainer.state_files import read_tree, write_tree

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.trainer.methods.method import Attached

NAME = "weights"


def save_weights(method: Attached, folder: Path) -> None:
    """Write ``weights.safetensors`` and ``weights.json``.

    Raises:
        OSError: they cannot be written.
    """
    own = {name: method.model.get_parameter(name) for name in method.own}
    write_tree(folder, NAME, {"own": own, "state": method.state()})


def load_weights(method: Attached, folder: Path) -> None:
    """Read them back into the model.

    Raises:
        CorruptArtifact: they are damaged, or of another model.
    """
    tree = read_tree(folder, NAME)
    own = {name: method.model.get_parameter(name) for name in method.own}
    found = {name: tuple(tensor.shape) for name, tensor in tree["own"].items()}
    if found != {name: tuple(parameter.shape) for name, parameter in own.items()}:
        raise CorruptArtifact(
            f"checkpoint '{folder}' does not fit this model. Run without --resume."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tree["own"][name])
        method.load_state(tree["state"])
