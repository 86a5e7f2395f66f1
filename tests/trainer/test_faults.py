"""What may go wrong with a run, one test each: its exit code, its one line, and what is left behind.

That a trained adapter answers, pushed and served, as PEFT does, is tests/e2e/test_main_job.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from lorary.registry.cli_support import exit_code_of
from lorary.trainer import checkpoints as checkpoints_module
from lorary.trainer import fit as fit_module
from lorary.trainer import loop
from lorary.trainer.cli import app
from lorary.trainer.recipe_file import recipe_dict
from lorary.trainer.state_files import write_tree
from tests.conftest import build_llama

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]
    Train = Callable[..., tuple[int, str]]

QUICK = {"evaluation__skip_base": True, "evaluation__num_golden_probes": 1, "data__num_test": 4}


@pytest.fixture
def recipe_file(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(make_recipe(**QUICK))))
    return path


@pytest.fixture
def train(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Train:
    """``lorary train``: its exit code, and the last line it prints on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*args: str) -> tuple[int, str]:
        capsys.readouterr()
        code = exit_code_of(lambda: app(args=[str(recipe_file), *args], standalone_mode=False))
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return code, printed.strip().splitlines()[-1]

    return call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


def whole_steps(out: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    folder = out.with_name("tiny.checkpoints")
    return sorted(
        checkpoints_module.step_of(path.parent)
        for path in folder.glob("checkpoint-*/lorary.json")
        if checkpoints_module._has_its_files(path.parent, json.loads(path.read_text()))
    )


def history(out: Path) -> list[dict[str, Any]]:
    lines = (out / "report" / "history.jsonl").read_text().splitlines()
    kept = ("step", "loss", "eval_loss", "grad_norm")
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def at_call(number: int, real: Callable[..., Any], fail: Callable[[Any], Any]) -> Any:
    """Return ``real``, whose ``number``-th result goes through ``fail``."""
    calls = iter(range(1, 1_000_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        return fail(result) if next(calls) == number else result

    return wrapped


def out_of_memory(_result: Any) -> Any:
    raise torch.OutOfMemoryError("tried to allocate 1 GiB")


def nan_loss(result: Any) -> Any:
    logits, targets = result
    return logits * torch.nan, targets


def infinite_gradient(result: Any) -> Any:
    logits, targets = result
    logits.register_hook(lambda gradient: gradient * torch.inf)
    return logits, targets


# Validation after step 2 takes two calls more, so the fifth is in step 3.
@pytest.mark.parametrize(
    ("fail", "says"),
    [
        (
            out_of_memory,
            "error: memory ran out: tried to allocate 1 GiB. Lower training.batch_size",
        ),
        (nan_loss, "error: the loss is nan at step 3. Lower training.learning_rate"),
        (
            infinite_gradient,
            "error: the gradient norm is nan at step 3. Lower training.learning_rate",
        ),
    ],
)
def test_t1_t3_a_failing_step_leaves_its_last_checkpoint_and_no_output(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch, fail: Any, says: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "selected_logits", at_call(5, loop.selected_logits, fail))
        code, line = train()
    assert code == 1
    assert line.startswith(says)
    assert not out.exists()
    assert whole_steps(out) == [2]
    assert train("--resume")[0] == 0


def test_t3_weights_that_the_last_step_spoiled_are_not_written(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoil(fit_module._Steps):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 6:
                weight = next(p for p in kwargs["model"].parameters() if p.requires_grad)
                weight.data[0, 0] = torch.nan

    monkeypatch.setattr(fit_module, "_Steps", Spoil)
    code, line = train("--set", "data.num_validation=0")
    assert code == 1
    assert "not finite, so nothing is written" in line
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_t2_a_signal_in_the_middle_of_a_save_loses_nothing(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    assert train()[0] == 0
    whole = history(out)

    def interrupt(_result: Any) -> None:
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        interrupted = at_call(2, write_tree, interrupt)
        patch.setattr("lorary.trainer.resumable.write_tree", interrupted)
        code, line = train("--force")
    assert code == 130
    assert "stopped at step 3 of 6" in line
    assert whole_steps(out) == [2, 3]
    assert train("--resume", "--force")[0] == 0
    assert history(out) == whole


def test_t4_bad_data_is_named_by_its_line(train: Train, tmp_path: Path, out: Path) -> None:
    row = '{"review": "the film", "sentiment": "good"}\n'
    for content, says in (
        ("", "has no usable example"),
        ("\n" * 999_999 + '{"review": "the film"\n', "line 1000000 is not JSON"),
        (
            row + '{"text": "the film", "sentiment": "good"}\n',
            "line 2 has no column 'review'; it has",
        ),
        (row + '{"review": "the cat", "sentiment": ""}\n', "line 2: column 'sentiment' is empty"),
        (row + '{"review": "the cat", "sentiment": "great"}\n', "the label 'great'"),
    ):
        path = tmp_path / "data.jsonl"
        path.write_text(content)
        code, line = train("--set", f"data.path={path}")
        assert code == 2, line
        assert says in line
    code, line = train("--set", "training.max_length=5")
    assert code == 2
    assert "examples are longer than training.max_length (5 tokens)" in line
    assert not out.exists()


def test_t4_byte_order_mark_is_read_and_long_rows_are_counted(
    train: Train, tmp_path: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    long = json.dumps({"review": "the cat " * 40, "sentiment": "good"}) + "\n"
    path.write_bytes(b"\xef\xbb\xbf" + reviews.read_bytes() + long.encode())
    assert train("--set", f"data.path={path}", "--set", "training.max_length=60")[0] == 0
    manifest = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())
    assert manifest["data"]["num_too_long_dropped"] == 1


def test_t5_a_checkpoint_of_another_run_is_refused_unless_forced(
    train: Train, tmp_path: Path, reviews: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "selected_logits", at_call(5, loop.selected_logits, nan_loss))
        assert train()[0] == 1
    other_data = tmp_path / "other.jsonl"
    other_data.write_text(reviews.read_text() + '{"review": "not red", "sentiment": "bad"}\n')
    other_base = build_llama(tmp_path / "other", seed=1)
    for change in ("training.learning_rate=0.001", f"data.path={other_data}", f"base={other_base}"):
        code, line = train("--resume", "--set", change)
        assert code == 9, line
        assert "is of another recipe, base or data" in line
        assert "--force" in line
    assert train("--resume", "--force", "--set", "training.learning_rate=0.001")[0] == 0
    facts = json.loads((out / "manifest.json").read_text())["training"]
    assert facts["resumed_from"] == {"step": 2, "is_same_run": False}
    assert facts["steps"] == 6


def test_t5_a_checkpoint_of_another_shape_cannot_be_forced(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "selected_logits", at_call(5, loop.selected_logits, nan_loss))
        assert train()[0] == 1
    code, line = train("--resume", "--force", "--set", "method.rank=8")
    assert code == 5
    assert "does not fit this model" in line
    assert not out.exists()


def test_t6_a_full_disk_keeps_the_checkpoint_before(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write more than a kilobyte from step 3 on, as it does when it is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(fit_module._Steps):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(fit_module, "_Steps", Full)
            code, line = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 8, line
    assert "a checkpoint cannot be written" in line
    assert not out.exists()
    assert whole_steps(out) == [2]
    assert [p.name for p in out.with_name("tiny.checkpoints").iterdir()] == ["checkpoint-2"]
    assert train("--resume")[0] == 0


class Pickled:
    """Unpickling it makes a file, as an attacker's would do worse."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self._path, "w"))


def test_t7_a_checkpoint_with_code_in_it_runs_none(
    train: Train, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle  # noqa: TID251 - to write what must never be read

    with monkeypatch.context() as patch:
        patch.setattr(loop, "selected_logits", at_call(5, loop.selected_logits, nan_loss))
        assert train()[0] == 1
    checkpoint = out.with_name("tiny.checkpoints") / "checkpoint-2"
    evil = pickle.dumps(Pickled(tmp_path / "ran"))
    assert not [
        p.name for p in checkpoint.iterdir() if p.suffix not in (".json", ".safetensors", ".md")
    ]
    # The names under which transformers keeps its pickles: nobody reads them.
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin"):
        (checkpoint / name).write_bytes(evil)
    kept = (checkpoint / "optimizer.safetensors").read_bytes()
    (checkpoint / "optimizer.safetensors").write_bytes(evil)
    code, line = train("--resume")
    assert (code, "holds no whole checkpoint" in line) == (2, True)
    # Even where somebody has made the marker fit.
    marker = json.loads((checkpoint / "lorary.json").read_text())
    honest = (checkpoint / "lorary.json").read_text()
    marker["files"]["optimizer.safetensors"] = checkpoints_module._digest(
        checkpoint / "optimizer.safetensors"
    )
    (checkpoint / "lorary.json").write_text(json.dumps(marker))
    code, line = train("--resume")
    assert (code, "holds no readable state" in line) == (5, True)
    (checkpoint / "optimizer.safetensors").write_bytes(kept)
    (checkpoint / "lorary.json").write_text(honest)
    assert train("--resume")[0] == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("training.optimizer=adam", 2, "it is one of adamw, adamw-8bit"),
        ("training.optimizer=paged-adamw-8bit", 2, "needs CUDA's paged memory"),
        ("training.trackers=[tensorbord]", 2, "it is one of tensorboard, wandb"),
        ("training.trackers=[wandb, wandb]", 2, "repeats one"),
        ("training.trackers=[mlflow]", 78, "not installed. Run: pip install mlflow"),
    ],
)
def test_what_this_machine_lacks_is_said_before_any_work(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch, change: str, code: int, says: str
) -> None:
    monkeypatch.setattr("lorary.trainer.trackers.find_spec", lambda _name: None)
    found, line = train("--set", change)
    assert (found, says in line) == (code, True), line
    assert not out.exists()
