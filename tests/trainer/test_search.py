"""Searches over the tiny base: what is drawn and dropped, what a kill costs, who shares a study."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from lorary.errors import AlreadyExists, IncompatibleAdapter, InvalidRecipe
from lorary.trainer.evaluate import Evaluator
from lorary.trainer.recipe_file import load_recipe, recipe_dict
from lorary.trainer.search.run import search
from lorary.trainer.search.trial import prepare_without_test
from lorary.trainer.train import train
from tests.conftest import wait_until
from tests.trainer.browser import open_page

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]

SPACE = {
    "method.rank": [2, 4, 8],
    "method.target_modules": [["all-linear"], ["q_proj", "v_proj"]],
    "training.learning_rate": {"low": 1e-5, "high": 5e-2, "log": True},
}
COMMAND = [sys.executable, "-c", "from lorary.trainer.search.cli import app; app()"]
# Killed by itself: to a signal from outside the search may be over, however soon it is sent.
KILLED_IN_THE_THIRD = """
from lorary.trainer.search import trial
from lorary.trainer.search.cli import app
from tests.trainer.killed import kill_after_step

before = trial._run_trial

def run_trial(run, study, one, *rest):
    if one.number == 2:
        kill_after_step(1)
    before(run, study, one, *rest)

trial._run_trial = run_trial
app()
"""


def with_search(make_recipe: MakeRecipe, **keys: Any) -> Recipe:
    section = {"space": SPACE, "trials": 12, "startup_trials": 3, **keys}
    return make_recipe(search=section, training__max_steps=4, training__eval_every=2)


def trials_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def what_was_run(trials: list[dict[str, Any]]) -> list[Any]:
    return [[trial["state"], trial["point"], trial["losses"]] for trial in trials]


def test_bad_trials_are_pruned_and_the_best_is_trained_again_as_it_was(
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    recipe = with_search(make_recipe)
    with monkeypatch.context() as patch:
        # Nobody may so much as ask for an answer while the search goes on.
        patch.setattr(Evaluator, "__init__", None)
        result = search(recipe, tmp_path / "study", reporter=quiet)
    trials = trials_of(tmp_path / "study")
    assert len(trials) == len(result.trials) == 12
    complete = [trial for trial in trials if trial["state"] == "complete"]
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert len(complete) + len(pruned) == 12
    assert len(complete) >= 3
    for trial in pruned:
        last = len(trial["losses"]) - 1
        before = [one["losses"][last] for one in complete if one["number"] < trial["number"]]
        assert len(trial["losses"]) < 2 or trial["number"] >= 3
        assert min(trial["losses"]) > statistics.median(before)
    assert pruned, "the space has rates that learn nothing"
    record_property("trials", len(trials))
    record_property("pruned", len(pruned))
    assert result.best.loss == min(trial["loss"] for trial in complete)
    manifest = train(result.recipe, tmp_path / "out", reporter=quiet, origin=result.origin)
    assert min(manifest.training["loss_curve"]["validation_loss"]) == result.best.loss
    assert manifest.training["search"]["best_trial"] == result.best.number
    again = load_recipe(tmp_path / "study" / "best.yaml")
    assert recipe_dict(again) == recipe_dict(result.recipe)


def test_trials_have_no_test_examples(make_recipe: MakeRecipe) -> None:
    run = prepare_without_test(with_search(make_recipe))
    assert run.splits.test == ()
    assert len(run.splits.validation) == 6


def test_report_needs_no_other_file_and_a_browser_draws_it(
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    search(with_search(make_recipe, trials=4), tmp_path / "study", reporter=quiet)
    page = tmp_path / "study" / "report.html"
    text = page.read_text()
    seen: dict[str, int] = {}

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen[tag] = seen.get(tag, 0) + 1
            assert not [v for k, v in attrs if k in ("src", "href") and v != "data:,"]

    Page().feed(text)
    assert seen["svg"] == 4
    assert "script" not in seen
    assert seen["tr"] == 1 + 4
    assert "nan" not in text

    opened = open_page(page)
    assert opened.console == []
    assert opened.title == "Search of tiny"
    assert len(opened.marks) == 4
    # Every trial's dot or line beside the axes, or every key's bar.
    assert all(count >= len(SPACE) for count in opened.marks.values()), opened.marks
    record_property("drawings", len(opened.marks))
    record_property("console", len(opened.console))


def test_a_killed_search_goes_on_as_if_nothing_had_been(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    recipe = with_search(make_recipe, trials=5, startup_trials=2)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(recipe)))
    args = [str(path), "--no-train", "--study", str(tmp_path / "broken")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_THIRD, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sum(line.startswith("trial ") for line in killed.stderr.splitlines()) == 2
    assert not (tmp_path / "broken" / "trials.jsonl").exists()
    with pytest.raises(AlreadyExists, match="--resume"):
        search(recipe, tmp_path / "broken", reporter=quiet)
    search(recipe, tmp_path / "broken", resume=True, reporter=quiet)
    search(recipe, tmp_path / "whole", reporter=quiet)
    broken, whole = trials_of(tmp_path / "broken"), trials_of(tmp_path / "whole")
    assert what_was_run(broken) == what_was_run(whole)
    other = make_recipe(search={"space": SPACE}, training__max_steps=5)
    with pytest.raises(IncompatibleAdapter, match="another recipe"):
        search(other, tmp_path / "broken", resume=True, reporter=quiet)


def begun_together(args: list[str], study: Path) -> tuple[int, str, str]:
    """Run a search whose two workers take no point before both are there; return its end and what it said."""
    study.mkdir()
    with (study / "ask.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(
            [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                wait_until(
                    lambda: (
                        process.poll() is not None or len(list(study.glob("workers/*.lock"))) == 2
                    ),
                    seconds=120,
                )
                fcntl.flock(lock, fcntl.LOCK_UN)
                printed, told = process.communicate(timeout=200)
            finally:
                process.kill()
    return process.returncode, printed, told


def test_two_workers_share_a_grid_without_a_point_twice(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    space = {"method.rank": [1, 2], "training.learning_rate": [1e-3, 1e-2]}
    recipe = with_search(make_recipe, space=space, sampler="grid", pruner="none", trials=0)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(recipe)))
    # Again where one of the two stood still for so long that the other took every point.
    for number in range(1, 5):
        study, out = tmp_path / f"study-{number}", tmp_path / f"out-{number}"
        args = [str(path), "--study", str(study), "--output", str(out), "--workers", "2"]
        args += ["--push", "--registry", str(tmp_path / f"registry-{number}"), "--json"]
        status, printed, told = begun_together(args, study)
        assert status == 0, told
        said = json.loads(printed)
        points = [tuple(trial["point"].values()) for trial in said["trials"]]
        assert sorted(points) == [(r, rate) for r in (1, 2) for rate in (1e-3, 1e-2)]
        assert said["version"]["version"] == 1
        assert said["metrics"]["adapter"]["accuracy"] >= 0.0
        assert "trial 4/4" in told
        workers = {trial["worker"] for trial in said["trials"]}
        if len(workers) == 2:
            break
    assert len(workers) == 2


def test_a_point_that_cannot_be_trained_is_told_and_ends_nothing(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    space = {"method.target_modules": [["no_such"], ["q_proj"]]}
    recipe = with_search(make_recipe, space=space, sampler="grid")
    result = search(recipe, tmp_path / "study", reporter=quiet)
    assert [trial.state for trial in result.trials] == ["failed", "complete"]
    assert "no_such" in result.trials[0].note
    assert result.best.point == {"method.target_modules": ["q_proj"]}


def test_a_trial_has_the_base_that_its_point_asks_for(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    """Two trials that differ in the base's quantization alone do not learn alike."""
    recipe = with_search(make_recipe, space={"method.name": ["lora", "qlora"]}, sampler="grid")
    trials = search(recipe, tmp_path / "study", reporter=quiet).trials
    assert [trial.point["method.name"] for trial in trials] == ["lora", "qlora"]
    assert trials[0].losses != trials[1].losses


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"space": {"method.rnk": [1]}}, "Did you mean 'method.rank'"),
        ({"space": {"data.seed": [1, 2]}}, "may not be searched.*held-out"),
        ({"space": {"base": ["a"]}}, "may not be searched"),
        ({"space": {"method.rank": {"low": 8, "high": 4}}}, "low must be below high"),
        ({"space": {"method.rank": {"low": 1.5, "high": 4}}}, "whole number"),
        ({"space": {"method.rank": {"low": 1, "hgh": 4}}}, "Did you mean 'high'"),
        ({"space": {"method.rank": {"low": 1}}}, "lacks 'high'"),
        ({"space": {"method.rank": [4, 4]}}, "repeats"),
        ({"space": {"method.rank": [4, 1000]}}, "rank is 1000"),
        ({"space": {"method.rank": 4}}, "list of choices"),
        ({"space": {"method.name": {"low": 1, "high": 2}}}, "is no number"),
        ({"space": {"training.warmup": {"low": 0, "high": 1, "log": True}}}, "above 0"),
        ({"space": {"training.warmup": {"low": "a", "high": 1}}}, "must be a number"),
        ({"space": {"method.rank": {"low": 1, "high": 4}}, "sampler": "grid"}, "grid needs values"),
        ({"space": {"method.rank": [1, 2, 3]}, "sampler": "grid", "trials": 2}, "3 combinations"),
        ({"trials": -1}, "search.trials is -1"),
        ({"smpler": "tpe"}, "Did you mean 'search.sampler'"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_the_nearest_word(
    make_recipe: MakeRecipe, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRecipe, match=says):
        make_recipe(search=section)


def test_values_that_only_go_together_are_a_space(make_recipe: MakeRecipe) -> None:
    """int8 is refused with lora, but the space has qlora beside it."""
    space = {"method.name": ["lora", "qlora"], "method.quantization": ["auto", "int8"]}
    assert make_recipe(search={"space": space}).search.num_trials == 20
    with pytest.raises(InvalidRecipe, match="with lora: set method"):
        make_recipe(search={"space": {"method.quantization": ["int8"]}})
