from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from lorary.errors import OUTCOMES, LoraryError
from lorary.registry.cli import COMMANDS
from lorary.registry.cli_support import exit_code_of, print_json

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


class Command:
    """The ``registry`` command in a process of its own."""

    def __init__(self, registry: Path) -> None:
        self._registry = registry

    def __call__(self, *args: object, code: int = 0) -> str:
        done = self.run(*args)
        assert done.returncode == code, done.stderr
        return done.stdout

    def json(self, *args: object) -> Any:
        return json.loads(self(*args, "--json"))

    def error(self, *args: object, code: int) -> str:
        done = self.run(*args)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    def run(self, *args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lorary.registry", *map(str, args)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"LORARY_REGISTRY": self._registry.as_uri(), "NO_COLOR": "1"},
        )


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "registry")


def test_the_life_of_an_adapter(
    command: Command, forge: Forge, tiny_base: Path, tmp_path: Path
) -> None:
    one, two = forge.folder("one", seed=1), forge.folder("two", seed=2)
    pushed = command.json("push", one, "sentiment", "--alias", "prod", "--base", tiny_base)
    assert (pushed["version"], pushed["aliases"]) == (1, ["prod"])
    again = command("push", two, "sentiment", "--alias", "canary", "--base", tiny_base)
    assert "canary" in again
    assert [info["version"] for info in command.json("list")] == [1, 2]
    assert "sentiment" in command("list", "sentiment")
    shown = command.json("show", "sentiment@prod")
    assert shown["manifest"]["digest"] == pushed["digest"]
    assert pushed["digest"] in command("show", f"sentiment@{pushed['digest'][:12]}")
    moved = command.json("promote", "sentiment@canary", "prod")
    assert (moved["from_version"], moved["to_version"]) == (1, 2)
    assert command.json("rollback", "sentiment", "prod")["to_version"] == 1
    assert command.json("alias", "sentiment") == {"latest": 2, "prod": 1, "canary": 2}
    command("alias", "sentiment", "prod", "@canary", "--expect", "1", "--reason", "better")
    command("alias", "sentiment", "canary", "--remove")
    log = command.json("log", "sentiment", "--alias", "prod")
    assert [move["kind"] for move in log] == ["set", "set", "rollback", "set"]
    assert log[-1]["reason"] == "better"
    assert "rollback" in command("log", "sentiment")
    out = command.json("pull", "sentiment@1", tmp_path / "out")
    assert (Path(out["path"]) / "adapter_model.safetensors").exists()
    assert command.json("verify")["is_ok"] is True
    assert "ok" in command("verify", "sentiment@prod")


def test_every_refusal_has_its_exit_code(
    command: Command, forge: Forge, tiny_base: Path, tmp_path: Path
) -> None:
    right = forge.folder("right")
    assert "no registry at" in command.error("list", code=8)
    assert not (tmp_path / "registry").exists()
    wrong = forge.folder("wrong")
    (wrong / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    assert "pickle" in command.error("push", wrong, "a", "--base", tiny_base, code=5)
    other = forge.folder("other", config=forge.config(lora_bias=True))
    assert "plain LoRA" in command.error("push", other, "a", "--base", tiny_base, code=9)
    assert not list((tmp_path / "registry" / "adapters").iterdir())
    command("push", right, "a", "--base", tiny_base, "--alias", "prod")
    assert "../x" in command.error("push", right, "../x", "--base", tiny_base, code=2)
    assert "cannot be moved" in command.error("alias", "a", "latest", "1", code=2)
    assert "--remove" in command.error("alias", "a", "prod", code=2)
    assert "--expect" in command.error("alias", "a", "prod", "1", "--expect", "x", code=2)
    assert "not in the registry" in command.error("show", "b", code=3)
    assert "has no alias" in command.error("show", "a@canary", code=3)
    assert "nothing to roll back" in command.error("rollback", "a", "prod", code=3)
    assert "somebody moved it" in command.error(
        "alias", "a", "prod", "1", "--expect", "none", code=4
    )
    assert "not empty" in command.error("pull", "a", right, code=4)
    assert "not a registry" in command.error("list", "--registry", right, code=78)
    assert "s3" in command.error("list", "--registry", "s3://bucket", code=78)
    tensors = next((tmp_path / "registry" / "unpacked").glob("*/adapter_model.safetensors"))
    tensors.chmod(0o644)
    tensors.write_bytes(tensors.read_bytes()[:-1])
    done = command.run("verify")
    assert done.returncode == 5
    assert "its manifest says" in done.stdout
    assert "1 problem" in done.stderr


def test_usage_errors_and_help(command: Command) -> None:
    assert command.run("list", "--bogus").returncode == 2
    assert command.run("bogus").returncode == 2
    assert command.run("push").returncode == 2
    for name in (
        "push", "pull", "list", "show", "log", "alias", "promote", "rollback", "verify"
    ):  # fmt: skip
        text = command(name, "--help")
        assert f"Example: registry {name}" in text
        assert "--json" in text


def test_a_base_that_cannot_be_found(command: Command, forge: Forge) -> None:
    folder = forge.folder()
    unknown = command.run("push", folder, "a", "--base", "no-such-base-anywhere")
    assert unknown.returncode in (3, 6, 78)  # not found, or the Hub is out of reach
    (folder / "manifest.json").unlink()
    assert "--base" in command.error("push", folder, "a", code=2)


@pytest.mark.parametrize("cls", list(OUTCOMES))
def test_every_error_is_one_line_and_its_exit_code(
    cls: type[LoraryError], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise cls("what\nwhy")

    assert exit_code_of(fail) == OUTCOMES[cls].exit_code
    assert capsys.readouterr().err == "error: what why\n"


def test_the_unexpected_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("surprise")

    assert exit_code_of(fail) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in fail" in said
    assert "unexpected KeyError" in said


def test_other_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def leave() -> None:
        raise typer.Exit(7)

    def abort() -> None:
        raise typer.Abort

    assert exit_code_of(interrupt) == exit_code_of(abort) == 130
    assert exit_code_of(leave) == 7
    assert exit_code_of(lambda: None) == 0
    print_json({"a": (1, None, "ü")})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None, "ü"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_contents_says_what_the_commands_say(name: str) -> None:
    module, _, function = COMMANDS[name].function.partition(":")
    docstring = getattr(importlib.import_module(module), function).__doc__
    assert docstring.splitlines()[0] == COMMANDS[name].help
    assert COMMANDS[name].example.split()[0] == name
