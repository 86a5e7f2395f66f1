"""The commands about memory: promote behind gates, diff, search, deprecate, delete, gc, import, mirror …"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lorary.registry import Registry
from lorary.registry.cli import COMMANDS, app
from lorary.registry.cli_bash import joined
from lorary.registry.cli_support import exit_code_of
from lorary.registry.manifest import Metrics
from tests.registry.conftest import running_hub, use_hub

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("LORARY_REGISTRY", registry.url)

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        words = [str(arg) for arg in args]
        code = exit_code_of(lambda: app(words, prog_name="registry", standalone_mode=False))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def graded(forge: Forge, registry: Registry) -> Registry:
    """``a`` 1, 2, 3 of accuracy 0.8, 0.9, 0.85."""
    for version, accuracy in enumerate((0.8, 0.9, 0.85), start=1):
        metrics = Metrics(
            primary="accuracy", num_examples=9, base={}, adapter={"accuracy": accuracy}
        )
        manifest = dataclasses.replace(forge.manifest(), metrics=metrics)
        folder = forge.folder(str(version), seed=version, manifest=manifest)
        registry.push(folder, "a", base=forge.card)
    return registry


def test_promote_by_both_forms_and_behind_gates(graded: Registry, run: Run) -> None:
    assert run("promote", "a@1", "prod")[0] == 0
    code, out, _ = run(
        "promote", "a", "2", "--to", "prod", "--require", "accuracy>=0.90",
        "--require", "accuracy>=prod-0.01", "--json",
    )  # fmt: skip
    assert (code, json.loads(out)["to_version"]) == (0, 2)
    assert [f["bound"] for f in json.loads(out)["figures"]] == [0.9, pytest.approx(0.79)]
    code, out, err = run("promote", "a@3", "--to", "prod", "--require", "accuracy>=prod-0.01")
    assert (code, out) == (4, "")
    assert "was not moved to version 3: accuracy>=prod-0.01: 0.85 beside 0.89 of version 2" in err
    assert run("promote", "a@3")[0] == 2
    assert run("promote", "a", "3", "--to", "latest")[0] == 2
    assert run("promote", "a", "3", "--to", "prod", "--require", "x")[0] == 2
    assert run("protect", "a", "prod", "--require", "accuracy>=0.88")[0] == 0
    assert "accuracy>=0.88" in run("alias", "a")[1]
    assert run("alias", "a", "prod", "3")[0] == 4
    assert run("promote", "a@3", "prod", "--force")[0] == 2
    assert run("promote", "a@3", "prod", "--force", "--reason", "drill")[0] == 0
    assert run("rollback", "a", "prod")[0] == 4
    assert run("protect", "a", "prod", "--off")[0] == 0
    assert run("protect", "a", "prod", "--off")[0] == 3
    code, out, _ = run("log", "a", "--all")
    assert "forced" in out
    assert "requires accuracy>=0.88" in out
    assert "0.9 beside 0.79 of version 1" in out
    assert json.loads(run("log", "a", "--all", "--json")[1])["marks"][-1]["kind"] == "unprotect"
    assert graded.aliases("a")["prod"] == 3


def test_what_is_deprecated_or_deleted_is_said(graded: Registry, run: Run, tmp_path: Path) -> None:
    run("promote", "a@2", "prod")
    assert run("deprecate", "a", "prod")[0] == 2
    assert run("deprecate", "a", "prod", "--reason", "wrong labels")[0] == 0
    for command in (["show", "a@2"], ["list"], ["pull", "a@2", tmp_path / "out"]):
        code, _, err = run(*command)
        assert code == 0
        assert "warning: a@2 was deprecated on " in err
        assert "wrong labels" in err
    assert "2 (deprecated)" in run("list")[1]
    assert run("delete", "a@2", "--yes")[0] == 4
    code, _, err = run("delete", "a@1")  # nobody is there to be asked
    assert code == 2
    assert "--yes" in err
    assert run("delete", "a@1", "--yes", "--reason", "old")[0] == 0
    code, _, err = run("show", "a@1")
    assert code == 3
    assert "deleted on " in err
    assert ": old" in err
    would = json.loads(run("gc", "--dry-run", "--grace", "0s", "--json")[1])
    assert would["is_dry"] is True
    assert run("gc", "--grace", "1fortnight")[0] == 2
    assert "room that is freed" in run("gc")[1]


def test_tables_and_json_of_questions(graded: Registry, run: Run) -> None:
    code, out, err = run("search", "accuracy>0.8", "recall>=0.1")
    assert code == 0
    assert "no version has a figure 'recall'; there are accuracy" in err
    found = json.loads(run("search", "accuracy>0.8", "--json")[1])
    assert [(f["version"]["version"], f["figures"]) for f in found] == [
        (2, {"accuracy": 0.9}),
        (3, {"accuracy": 0.85}),
    ]
    code, out, _ = run("diff", "a@1", "@2", "--limit", "1")
    lines = out.splitlines()
    assert lines[0].startswith("a@1 → a@2: 2 of 2 modules changed")
    assert lines[-1].rstrip() == "and 1 more: --limit 0"
    modules = json.loads(run("diff", "a@1", "a@2", "--json")[1])["modules"]
    assert [m["change"] for m in modules] == sorted((m["change"] for m in modules), reverse=True)
    assert run("diff", "a@1", "@9")[0] == 3
    run("promote", "a@2", "prod")
    moved = graded.log("a")[-1].at
    assert json.loads(run("whowas", "a", "prod", "--at", moved, "--json")[1])["version"] == 2
    assert run("whowas", "a", "prod", "--at", "2020-01-01")[0] == 3
    assert run("whowas", "a", "prod", "--at", "noon")[0] == 2


@pytest.mark.parametrize(
    "bad",
    ["../x", "/etc/passwd", "a" * 300, "a\0b", "\u0430lpha", "", "a@@1", "a@-1", "A", "x/y/z"],
)
def test_a_name_that_cannot_be_one_is_one_line_and_exit_code_2(
    run: Run, graded: Registry, bad: str
) -> None:
    for words in (
        ["show", bad], ["pull", bad, "out"], ["diff", bad, "a"], ["diff", "a", bad],
        ["log", bad], ["alias", bad], ["promote", bad, "prod"], ["promote", bad, "1", "--to", "p"],
        ["rollback", bad, "prod"], ["protect", bad, "prod"], ["protect", "a", bad],
        ["whowas", bad, "prod", "--at", "2026-01-01"], ["deprecate", bad, "1", "--reason", "x"],
        ["deprecate", "a", bad, "--reason", "x"], ["delete", bad, "--yes"],
        ["import", bad, "a"], ["mirror", graded.url, graded.url, "--only", bad],
    ):  # fmt: skip
        code, out, err = run(*words)
        assert (code, out) == (2, ""), (words, err)
        assert err.startswith("error: "), (words, err)
        assert err.count("\n") == 1
    assert graded.log("a") == []


def test_import_takes_what_any_peft_repository_has(
    forge: Forge, run: Run, hub_url: str, tiny_base: Path, registry: Registry
) -> None:
    from huggingface_hub import HfApi

    repo_id, folder = f"{hub_url.removeprefix('hf://')}/theirs", forge.folder()
    (folder / "manifest.json").write_text('{"somebody": "else\'s"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    (folder / "training_args.bin").write_bytes(b"\x80\x04pickle")
    api = HfApi()
    api.create_repo(repo_id)
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder).oid
    api.create_tag(repo_id, tag="v1")
    assert run("import", repo_id, "mine")[0] == 2  # of which base?
    code, _, err = run("import", f"{repo_id}@v1", "mine", "--base", tiny_base)
    assert code == 0, err
    assert "left out: training_args.bin" in err
    assert registry.manifest(registry.resolve("mine")).description == (
        f"imported from {repo_id}@{commit}"
    )
    assert "# Theirs" in (registry.fetch(registry.resolve("mine")) / "README.md").read_text()
    assert run("import", f"{repo_id}@v9", "mine", "--base", tiny_base)[0] == 3
    assert run("import", "nobody/there", "mine", "--base", tiny_base)[0] == 3
    assert run("import", "../x", "mine", "--base", tiny_base)[0] == 2
    api.delete_file("adapter_model.safetensors", repo_id)
    assert run("import", repo_id, "mine", "--base", tiny_base)[0] == 3
    api.upload_file(path_or_fileobj=b"\x80\x04", path_in_repo="adapter_model.bin", repo_id=repo_id)
    code, _, err = run("import", repo_id, "mine", "--base", tiny_base)
    assert code == 5
    assert "pickle" in err
    assert len(registry.list()) == 1


def test_mirror_to_a_hub_and_back(
    graded: Registry, run: Run, hub_url: str, tmp_path: Path, forge: Forge
) -> None:
    run("promote", "a@2", "prod", "--require", "accuracy>=0.9")
    run("delete", "a@1", "--yes")  # its number is taken there, without its files
    graded.push(forge.folder("b", seed=9), "b", base=forge.card)
    done = json.loads(run("mirror", graded.url, hub_url, "--only", "a", "--json")[1])
    assert [(m["name"], m["num_versions"], m["num_moves"]) for m in done] == [("a", 2, 1)]
    code, _, _ = run("mirror", hub_url, tmp_path / "back")
    assert code == 0
    back = Registry.open(tmp_path / "back")
    assert back.log("a") == graded.log("a")
    assert [(i.version, i.digest) for i in back.list()] == [
        (i.version, i.digest) for i in graded.list() if i.name == "a"
    ]
    assert back.marks("a") == graded.marks("a")
    assert run("mirror", graded.url, tmp_path / "new", "--only", "c")[0] == 3


def test_login_keeps_a_token_that_the_hub_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.registry.localhub.auth import Tokens

    file = tmp_path / "tokens.txt"
    file.write_text("ada write hf_secretsecretsecretsecret\n")
    file.chmod(0o600)
    with running_hub(tmp_path / "hub", tokens=Tokens.read(file)) as hub:
        use_hub(monkeypatch, hub.address, tmp_path / "home")
        for typed, code in (("", 2), ("hf_wrong\n", 7), ("hf_secretsecretsecretsecret\n", 0)):
            done = subprocess.run(
                [sys.executable, "-m", "lorary.registry", "login"],
                input=typed,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == code, done.stderr
            assert "Traceback" not in done.stderr
        assert done.stdout == f"logged in to {hub.address} as ada\n"
        assert (tmp_path / "home/hf/token").read_text() == "hf_secretsecretsecretsecret"


@pytest.mark.parametrize(
    ("words", "index", "expected"),
    [
        (["registry", "show", "a", "@"], 3, (["registry", "show", "a@"], 2, 2)),
        (["registry", "show", "a", "@", "pr"], 4, (["registry", "show", "a@pr"], 2, 2)),
        (["registry", "diff", "a", "@", "1", ""], 5, (["registry", "diff", "a@1", ""], 3, 0)),
        (["registry", "pull", "a"], 3, (["registry", "pull", "a"], 3, 0)),
        (["registry", "show", "t/a"], 2, (["registry", "show", "t/a"], 2, 0)),
    ],
)
def test_bash_breaks_refs_and_they_are_joined(
    words: list[str], index: int, expected: tuple[list[str], int, int]
) -> None:
    assert joined(words, index) == expected


def test_bash_is_offered_what_there_is(graded: Registry, tmp_path: Path) -> None:
    """The words are broken as bash breaks them: at the @, too."""
    graded.set_alias("a", "prod", 2)
    graded.delete("a@1")
    command = tmp_path / "bin" / "registry"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lorary.registry "$@"\n')
    command.chmod(0o755)
    offers = {
        "(registry show a @)": "prod latest 3 2",
        "(registry diff a @ 3 a @ pr)": "prod",
        '(registry show "")': "a",
        "(registry wh)": "whowas",
    }
    script = "source <(registry --show-completion)\n"
    for words in offers:
        script += f"COMP_WORDS={words} COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        script += 'COMPREPLY=(); _registry_completion registry; echo "${COMPREPLY[*]}"\n'
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ
        | {
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "SHELL": "/bin/bash",
            "LORARY_REGISTRY": graded.url,
        },
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == list(offers.values())


def test_every_command_is_in_the_docs_with_an_example() -> None:
    page = (Path(__file__).parents[2] / "docs/registry.md").read_text()
    assert [name for name in COMMANDS if f"\nregistry {name}" not in page] == []


def test_help_imports_little() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from lorary.registry import cli\n"
            "try: cli.app(['--help'])\n"
            "except SystemExit: pass\n"
            "heavy = {'numpy', 'huggingface_hub', 'ml_dtypes', 'yaml', 'torch', 'rich.progress'}\n"
            "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "[]\n"
    assert all(f" {name} " in done.stdout for name in COMMANDS)
