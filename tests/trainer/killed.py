"""Train in children that are killed at a chosen moment, then resume: ``python -m tests.trainer.killed``.

One process imports the libraries and forks, before it has trained anything itself: so a run costs its steps
and not the start of an interpreter. Reads ``cases.json`` in the folder given, writes each case's output there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import torch

from lorary.trainer import checkpoints, fit, state_files, train
from lorary.trainer.progress import Reporter
from lorary.trainer.recipe_file import build_recipe

if TYPE_CHECKING:
    from collections.abc import Callable


def die(*_args: Any, **_kwargs: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def kill_after_step(step: int) -> None:
    before = fit._Steps.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if state.global_step == step:
            die()

    mock.patch.object(fit._Steps, "on_step_end", on_step_end).start()


def kill_in_writing(step: int) -> None:
    """Half of a checkpoint's files are written."""
    before = state_files.write_tree

    def write_tree(folder: Path, name: str, tree: Any) -> None:
        before(folder, name, tree)
        if name == "optimizer" and folder == checkpoints.draft_path(folder.parent, step):
            die()

    mock.patch("lorary.trainer.resumable.write_tree", write_tree).start()


def kill_before_rename(step: int) -> None:
    """All files of a checkpoint are written, and it is not yet in its place."""
    before = checkpoints._seal

    def seal(draft: Path, at: int, identity: str) -> None:
        before(draft, at, identity)
        if at == step:
            die()

    mock.patch("lorary.trainer.checkpoints._seal", seal).start()


def kill_before_output(_step: int) -> None:
    mock.patch("lorary.trainer.train.write_output", die).start()


MOMENTS: dict[str, Callable[[int], None]] = {
    "step": kill_after_step,
    "writing": kill_in_writing,
    "rename": kill_before_rename,
    "output": kill_before_output,
}


def in_child(call: Callable[[], object]) -> int:
    """Run ``call`` in a forked child; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except BaseException:  # noqa: BLE001 - the child must never return to the parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def run(case: dict[str, Any], output: Path) -> None:
    whole = partial(
        train.train, build_recipe(case["recipe"]), output, reporter=Reporter(quiet=True)
    )
    if case["moment"] is None:
        assert in_child(whole) == 0
        return

    def killed() -> None:
        MOMENTS[case["moment"]](case["step"])
        whole()

    status = in_child(killed)
    assert os.WIFSIGNALED(status), f"{case['name']} was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not output.exists()
    assert in_child(partial(whole, resume=True)) == 0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for case in json.loads((folder / "cases.json").read_text()):
        run(case, folder / case["name"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
