"""Several tasks in one recipe: the mixture, one adapter for all, one for each, and what each forgets."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import AlreadyExists, Cancelled, InvalidRecipe
from lorary.registry import BaseCard, Manifest, Registry
from lorary.registry.cli_support import exit_code_of
from lorary.trainer import fit as fit_module
from lorary.trainer.cli import app
from lorary.trainer.encoding import Row
from lorary.trainer.eval_cli import app as eval_app
from lorary.trainer.forgetting import ForgettingTable
from lorary.trainer.recipe_file import build_any_recipe, load_recipe, recipe_dict
from lorary.trainer.report import add_forgetting
from lorary.trainer.reproduce.run import reproduce
from lorary.trainer.tasks.mix import MixedRows, shares_of, take_turns
from lorary.trainer.tasks.recipe import TasksRecipe
from lorary.trainer.tasks.separate import train_separate
from lorary.trainer.train import train
from tests.conftest import peft_greedy
from tests.trainer.conftest import SUBJECTS, TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.trainer.progress import Reporter

    MakeRecipe = Callable[..., TasksRecipe]

ROOT = Path(__file__).parents[2]
WHO = "<|im_start|>user\nin {{ text }}<|im_end|>\n<|im_start|>assistant\n"
NAMES = ("verdict", "verb")


@pytest.fixture(scope="module")
def tree(tiny_base: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Is it good or bad, and what is done: a label, and a word that is generated."""
    verbs = tmp_path_factory.mktemp("data") / "verbs.jsonl"
    pairs = itertools.product(SUBJECTS, ("sat on", "ran in"), SUBJECTS[:6])
    rows = [{"text": f"the {a} {did} the {b}", "target": did[:3]} for a, did, b in pairs]
    verbs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"num_test": 12, "num_validation": 6, "max_similarity": 1.0}
    columns = {"text": "review", "target": "sentiment"}
    short = {"max_new_tokens": 4}
    return {
        "name": "tiny",
        "base": str(tiny_base),
        "tasks": {
            "verdict": {
                "task": {
                    "kind": "classification",
                    "template": TEMPLATE,
                    "labels": ["good", "bad"],
                    **short,
                },
                "data": {"source": "file", "path": str(reviews), "columns": columns, **held},
            },
            "verb": {
                "task": {"template": WHO, **short},
                "data": {"source": "file", "path": str(verbs), **held},
                "metric": "exact_match",
            },
        },
        "method": {"rank": 4},
        "training": {
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "eval_every": 2,
            "dtype": "float32",
            "device": "cpu",
        },
        "evaluation": {"report": False, "num_resamples": 50, "num_golden_probes": 1},
    }


@pytest.fixture
def make_recipe(tree: Any) -> MakeRecipe:
    """Build the recipe; dotted keyword arguments change keys."""

    def make(**changes: Any) -> TasksRecipe:
        changed = json.loads(json.dumps(tree))
        for key, value in changes.items():
            *groups, name = key.split("__")
            node = changed
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = value
        recipe = build_any_recipe(changed)
        assert isinstance(recipe, TasksRecipe)
        return recipe

    return make


def call(command: Any, *args: object) -> int:
    arguments = [*map(str, args), "--threads", "1"]
    return exit_code_of(lambda: command(arguments, standalone_mode=False))


def metrics_of(folder: Path) -> Any:
    return json.loads((folder / "report" / "metrics.json").read_text())


def test_batches_are_whose_share_it_is_and_every_row_comes_once_a_pass() -> None:
    rows = {
        name: [Row(input_ids=(1,) * length, num_prompt=1) for length in range(2, 2 + size)]
        for name, size in (("large", 40), ("small", 10))
    }
    mix = MixedRows(tasks=rows, shares={"large": 0.8, "small": 0.2})
    assert len(mix) == 50
    assert mix[41] is rows["small"][1]
    plan = mix.plan(batch_size=5, num_batches=20, seed=3)
    assert plan[:7] == mix.plan(batch_size=5, num_batches=7, seed=3), "a function of place and seed"
    assert plan != mix.plan(batch_size=5, num_batches=20, seed=4)
    whose = [{"large" if i < 40 else "small" for i in batch} for batch in plan]
    assert all(len(one) == 1 for one in whose)
    assert Counter(*zip(*whose, strict=True)) == {"large": 16, "small": 4}
    for done in range(1, 21):  # never more than a batch from its share
        found = sum("small" in one for one in whose[:done])
        assert abs(found - done / 5) <= 1
    seen = Counter(i for batch in plan for i in batch)
    assert set(seen.values()) == {2}, "two passes over all rows"


def test_shares_are_by_size_by_temperature_or_as_given() -> None:
    sizes = {"a": 900, "b": 100}
    assert shares_of(sizes, {"a": 0, "b": 0}, 1.0) == {"a": 0.9, "b": 0.1}
    assert shares_of(sizes, {"a": 0, "b": 0}, 2.0) == pytest.approx({"a": 0.75, "b": 0.25})
    assert shares_of(sizes, {"a": 1, "b": 3}, 1.0) == {"a": 0.25, "b": 0.75}
    turns = itertools.islice(take_turns({"a": 0.5, "b": 0.3, "c": 0.2}), 1000)
    assert Counter(turns) == {"a": 500, "b": 300, "c": 200}


def test_a_shared_adapter_learns_all_tasks_and_is_measured_on_each(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path, capsys: Any
) -> None:
    recipe = make_recipe(
        training__max_steps=100,
        training__eval_every=50,
        evaluation__report=True,
        evaluation__num_attention_maps=0,
    )
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    assert manifest == Manifest.from_json((tmp_path / "out" / "manifest.json").read_bytes())
    assert {name: task.template for name, task in manifest.tasks.items()} == {
        "verdict": TEMPLATE,
        "verb": WHO,
    }
    assert (manifest.task.kind, manifest.task.template) == ("generation", None)
    assert manifest.metrics is not None
    assert manifest.metrics.primary == "verdict/accuracy"
    assert manifest.metrics.num_examples == 24
    assert manifest.metrics.adapter["verdict/accuracy"] == 1.0
    assert manifest.metrics.adapter["verb/exact_match"] > 0.5
    assert manifest.data["tasks"]["verdict"]["num_train"] == 92
    # The table is these figures, and lorary eval finds them again from the files.
    table = metrics_of(tmp_path / "out")["forgetting"]
    cells = table["adapters"]["tiny"]
    assert cells["verdict"]["verdict"] == cells["verb"]["verdict"] == "better"
    assert call(eval_app, tmp_path / "out", "--dtype", "float32", "--json") == 0
    for found in json.loads(capsys.readouterr().out)["results"]:
        task, metrics = found["exam"].rpartition(":")[2], found["metrics"]
        name = metrics["primary"]
        assert cells[task]["value"] == metrics["adapter"][name]
        assert table["tasks"][task]["base"] == metrics["base"][name]
        assert cells[task]["value"] == manifest.metrics.adapter[f"{task}/{name}"]
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    for part in ("Each adapter on each task", "verb/exact_match", "Of verb, by exact_match"):
        assert part in page
    pictures = {path.name for path in (tmp_path / "out" / "report").glob("*-verdict.png")}
    assert pictures == {"confusion-verdict.png", "reliability-verdict.png"}
    add_forgetting(tmp_path / "out" / "report", ForgettingTable.from_json(table))
    assert (tmp_path / "out" / "report" / "report.html").read_text() == page, "in its place, once"
    assert metrics_of(tmp_path / "out")["forgetting"] == table
    rows = (tmp_path / "out" / "report" / "examples.jsonl").read_text().splitlines()
    assert Counter(json.loads(row)["task"] for row in rows) == {"verdict": 12, "verb": 12}
    # One version, and another one where a template is another.
    registry = Registry.open(tmp_path / "registry", create=True)
    card = BaseCard.from_folder(tiny_base)
    first = registry.push(tmp_path / "out", "tiny", base=card)
    raw = json.loads((tmp_path / "out" / "manifest.json").read_text())
    raw["tasks"]["verb"]["template"] += "x"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(raw))
    assert registry.push(tmp_path / "out", "tiny", base=card).digest != first.digest


def test_a_shared_run_is_resumed_and_reproduced_bit_by_bit(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.trainer.test_train import _StopAfter

    recipe = make_recipe(method__dropout=0.2, temperature=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_Steps", _StopAfter)
        with pytest.raises(Cancelled, match="stopped at step 3 of 6"):
            train(recipe, tmp_path / "out", reporter=quiet)
    manifest = train(recipe, tmp_path / "out", resume=True, reporter=quiet)
    assert manifest.training["resumed_from"]["step"] == 3
    again = reproduce("it", tmp_path / "out", manifest, tolerance=0.0, reporter=quiet)
    assert again.is_bit_equal
    assert "verb/exact_match of adapter" in {one.what for one in again.comparisons}


def test_separate_adapters_are_ordinary_runs_and_measured_on_each_others_tasks(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(adapters="separate", training__max_steps=40, training__eval_every=20)
    result = train_separate(recipe, tmp_path / "run", reporter=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-verb", "run-verdict"]
    alone = train(recipe.recipes()["verb"], tmp_path / "alone", reporter=quiet)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        files = [tmp_path / folder / name for folder in ("alone", "run-verb")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert alone.training["recipe"]["name"] == "tiny-verb"
    table = result.table.as_json()
    assert [*table["adapters"]] == ["tiny-verdict", "tiny-verb"]
    for name in NAMES:
        assert metrics_of(tmp_path / f"run-{name}")["forgetting"] == table
        own, metrics = table["adapters"][f"tiny-{name}"][name], result.manifests[name].metrics
        assert metrics is not None
        assert own["value"] == metrics.adapter[metrics.primary]
    # The oracle is PEFT alone: who was trained to judge is asked what it is about.
    rows = (tmp_path / "alone" / "report" / "examples.jsonl").read_text().splitlines()
    right = {"verdict": 0, "verb": 0}
    for row in map(json.loads, rows):
        for who in NAMES:
            text = _answer(tiny_base, tmp_path / f"run-{who}", row["inputs"]["text"])
            right[who] += text == row["target"]
    for who in NAMES:
        value = table["adapters"][f"tiny-{who}"]["verb"]["value"]
        assert value == pytest.approx(right[who] / 12, abs=1e-4)
    assert right["verb"] > 6 > right["verdict"], "it has forgotten, or never knew"


def test_resuming_separate_adapters_trains_only_what_is_missing(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.trainer.test_train import _StopAfter

    recipe = make_recipe(adapters="separate")
    with pytest.raises(InvalidRecipe, match="no task of 'tiny' is finished"):
        train_separate(recipe, tmp_path / "run", resume=True, reporter=quiet)
    runs: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("lorary.trainer.tasks.separate.train", _train_then_stop(runs, _StopAfter))
        with pytest.raises(Cancelled, match="stopped at step 3 of 6"):
            train_separate(recipe, tmp_path / "run", reporter=quiet)
    assert runs == ["tiny-verdict", "tiny-verb"]
    assert "forgetting" not in metrics_of(tmp_path / "run-verdict")
    kept = tmp_path / "run-verdict" / "adapter_model.safetensors"
    before = kept.stat()
    with pytest.raises(AlreadyExists, match="run-verdict' exists and is not what task 'verdict'"):
        train_separate(
            make_recipe(adapters="separate", method__rank=2),
            tmp_path / "run",
            resume=True,
            reporter=quiet,
        )
    result = train_separate(recipe, tmp_path / "run", resume=True, reporter=quiet)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert result.manifests["verb"].training["resumed_from"]["step"] == 3
    assert metrics_of(tmp_path / "run-verdict")["forgetting"] == result.table.as_json()
    with pytest.raises(AlreadyExists, match="exists"):
        train_separate(recipe, tmp_path / "run", reporter=quiet)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks__verdict__data": {}}, "lacks 'tasks.verdict.data.source'"),
        ({"tasks__verdict": {"task": {"template": "x"}}}, "lacks 'tasks.verdict.data'"),
        ({"tasks__verdict__wieght": 1}, "Did you mean 'tasks.verdict.weight'"),
        ({"adapter": "shared"}, "Did you mean 'adapters'"),
        ({"adapters": "both"}, "one of shared, separate"),
        ({"tasks": {}}, "tasks has 0 task"),
        ({"tasks__Verdict": {"data": {"source": "jupyter-fr"}}}, "called 'Verdict'"),
        ({"tasks__verdict__data__num_test": 0}, "tasks.verdict: data.num_test is 0"),
        ({"tasks__verb__metric": "accuracy"}, "tasks.verb: evaluation.metric is accuracy"),
        ({"tasks__verb__task__kind": "seq2seq"}, "a head of its own"),
        ({"tasks__verb__weight": 2}, "tasks.verdict has no weight"),
        ({"temperature": 0}, "temperature is 0"),
        (
            {"temperature": 2, "tasks__verb__weight": 1, "tasks__verdict__weight": 1},
            "decide alone",
        ),
        ({"evaluation__metric": "bleu"}, "set tasks.verdict.metric"),
        ({"evaluation__skip_base": True}, "evaluation.skip_base"),
        ({"data": {"source": "jupyter-fr"}}, "as tasks.NAME.data"),
        ({"search": {"space": {"method.rank": [1, 2]}}}, "a search is judged by the loss of one"),
    ],
)
def test_what_is_wrong_names_the_task(make_recipe: MakeRecipe, changes: Any, says: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        make_recipe(**changes)
    assert says in str(caught.value)


def test_the_command_previews_plans_and_trains_several_tasks(
    tree: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe is the one in docs/training.md, over a base and rows of this test."""
    text = (ROOT / "docs" / "training.md").read_text().partition("## Several tasks")[2]
    path = tmp_path / "critic.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    for name, file in (("verdict", "reviews"), ("verb", "verbs")):
        shutil.copy(tree["tasks"][name]["data"]["path"], tmp_path / f"{file}.jsonl")
    held = {"num_test": 12, "num_validation": 6, "max_similarity": 1.0}
    where = ["--output", tmp_path / "run", f"--set=base={tiny_base}", "--set=training.max_steps=2"]
    where += ["--set=training.dtype=float32", "--set=evaluation.report=false"]
    where += [f"--set=tasks.{name}.data.{key}={held[key]}" for name in NAMES for key in held]
    apart = ["--set", "adapters=separate"]

    def printed(*args: object) -> Any:
        assert call(app, path, *where, *args) == 0
        return capsys.readouterr().out

    found = json.loads(printed("--preview", "--json"))["tasks"]
    assert [found[name]["train"] for name in NAMES] == [92, 102]
    assert "in the" in "".join(t["text"] for t in found["verb"]["examples"][0]["tokens"])
    plan = json.loads(printed("--dry-run", "--json"))
    assert "verdict 92 rows, 33.3% of batches" in plan["plan"]["tasks"]
    assert recipe_dict(build_any_recipe(plan["recipe"])) == plan["recipe"]
    plans = json.loads(printed("--dry-run", "--json", *apart))["tasks"]
    assert plans["verb"]["plan"]["output"].endswith("run-verb")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"critic.yaml", "reviews.jsonl", "verbs.jsonl"}
    shown = printed()
    assert "(base)" in shown
    assert "registry push" in shown
    said = json.loads(printed(*apart, "--json"))
    for name in NAMES:
        kept = json.loads((tmp_path / f"run-{name}" / "manifest.json").read_text())
        assert said["tasks"][name] == kept
        assert "tasks" not in kept, "readers that know one task only read it"
    assert [*said["forgetting"]["adapters"]] == ["critic-verdict", "critic-verb"]
    with pytest.raises(InvalidRecipe, match="several tasks, which lorary train"):
        load_recipe(path)
    with pytest.raises(InvalidRecipe, match=r"tasks\.verb: .*no such file"):
        strictly(path, *where, "--set", "tasks.verb.data.path=none.jsonl")


def strictly(*args: object) -> None:
    app([*map(str, args), "--dry-run"], standalone_mode=False)


def _answer(base: Path, adapter: Path, text: str) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer(WHO.replace("{{ text }}", text), add_special_tokens=False)["input_ids"]
    ids = peft_greedy(base, adapter, prompt, 4)
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _train_then_stop(runs: list[str], stop: Any) -> Any:
    """Train the first run whole; the second one is told to end at step 3."""

    def train_one(recipe: Any, *args: Any, **kwargs: Any) -> Manifest:
        runs.append(recipe.name)
        with pytest.MonkeyPatch.context() as patch:
            if len(runs) == 2:
                patch.setattr(fit_module, "_Steps", stop)
            return train(recipe, *args, **kwargs)

    return train_one
