"""The examples do what they say, against a real server of tiny adapters under the demo's names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lorary.registry import BaseCard, Registry
from tests.conftest import RECIPES, build_adapter, build_llama, write_manifest
from tests.processes import BIN, serving
from tests.tool_templates import tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.processes import ServerProcess

EXAMPLES = Path(__file__).parents[1] / "examples"
PYTHON_EXAMPLES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("examples")
    tokenizer = tokenizer_of("hermes", marks="added")
    base = build_llama(root / "bytes-llama", tokenizer=tokenizer, max_position_embeddings=2048)
    registry = Registry.open(root / "registry", create=True)
    card = BaseCard.from_folder(base)
    template = "<|im_start|>user\n{{ text }}<|im_end|>\n<|im_start|>assistant\n"
    names = {"sentiment": "alpha", "summarization": "bravo", "translation": "charlie"}
    for name, recipe in names.items():
        labels = ("negative", "positive") if name == "sentiment" else ()
        folder = build_adapter(base, root / name, RECIPES[recipe])
        write_manifest(
            base,
            folder,
            kind="classification" if labels else "generation",
            template=template,
            labels=labels,
            max_new_tokens=8,
        )
        registry.push(folder, name, base=card, aliases=["prod"])
    options = ("--http-port", "0", "--max-context", "2048")
    with serving(base, root / "registry", root, *options) as running:
        yield running


@pytest.mark.parametrize("name", PYTHON_EXAMPLES)
def test_python_examples_run(name: str, server: ServerProcess) -> None:
    shown = run(sys.executable, str(EXAMPLES / name), server.address)
    assert "negative" in shown or "positive" in shown


@pytest.mark.parametrize("language", ["python", "sh"])
def test_what_the_page_on_openai_says_can_be_said(language: str, server: ServerProcess) -> None:
    """Its Python and its curl, as they are but for the port."""
    text = (EXAMPLES.parent / "docs/openai.md").read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        program = block.replace("http://127.0.0.1:8000", str(server.http_url))
        if language == "python":
            shown = run(sys.executable, "-c", program)
            # An answer with its receipt, a call of a tool, how near two texts are, or an object.
            known = r"sha256:|weather \{.city|^-?\d\.\d+ \d+$"
            assert re.search(known, shown) or json.loads(shown)
        else:
            shown = run("bash", "-ec", program.replace("curl -s ", "curl -sf "))
            assert shown.endswith("data: [DONE]\n\n")


def test_the_command_asks_for_answers_of_a_given_form(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Over gRPC, with every option of its own kind."""
    (tmp_path / "schema.json").write_text('{"type": "object", "maxProperties": 0}')
    (tmp_path / "grammar.lark").write_text('start: "a" | "b"')
    cases = {
        ("--choice", "yes", "--choice", "no"): r"yes|no",
        ("--regex", "[0-9]{3}"): r"\d{3}",
        ("--json-schema", str(tmp_path / "schema.json")): r"\{\s*\}",
        ("--lark", str(tmp_path / "grammar.lark")): r"a|b",
    }
    for options, pattern in cases.items():
        said = run(
            *("lorary", "call", "translation@prod", "Is it so?", "--prompt", "--target"),
            *(server.address, "--max-tokens", "32", *options),
        )
        assert re.fullmatch(pattern, said.removesuffix("\n")), (options, said)


def test_the_command_lets_a_model_call_functions(server: ServerProcess, tmp_path: Path) -> None:
    parameters = {"properties": {"at": {"enum": [7]}}, "required": ["at"]}
    function = {"name": "look", "parameters": parameters}
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": function}]))
    options = ("--tools", str(tmp_path / "tools.json"), "--tool-choice", "look")
    for more in ((), ("--stream",)):
        said = run(
            *("lorary", "call", "", "the cat", "--chat", "--target", server.address),
            *("--max-tokens", "100", *options, *more),
        )
        assert re.fullmatch(r'\s*look\(\{ ?"at" ?: ?7 ?\}\)\n', said), said


def test_roll_out_moves_an_alias_and_takes_it_back(
    tiny_adapters: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    location = str(tmp_path / "registry")
    folders = [str(tiny_adapters[name]) for name in ("alpha", "bravo")]
    run(
        str(EXAMPLES / "roll_out.sh"),
        *folders,
        "demo",
        "--base",
        str(tiny_base),
        LORARY_REGISTRY=location,
    )
    registry = Registry.open(location)
    assert registry.aliases("demo") == {"prod": 1, "canary": 2, "latest": 2}
    assert [move.to_version for move in registry.log("demo", "prod")] == [1, 2, 1]
