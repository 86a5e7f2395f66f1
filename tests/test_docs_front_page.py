"""README, changelog and pages say what is so: links, paths, commands and code in them exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorary.cli.main import app as lorary_app
from lorary.registry.cli import app as registry_app

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
APPS = {"lorary": lorary_app, "registry": registry_app}


def names_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(REPO)) for page in pages]


def shell_lines(text: str) -> list[str]:
    """Return the lines of all blocks that are shell's, or nobody's in particular."""
    lines, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line.removeprefix("```").strip() if language is None else None
        elif language in {"", "sh", "bash"}:
            lines.append(line)
    return lines


def make_targets() -> set[str]:
    done = subprocess.run(["make", "help"], cwd=REPO, capture_output=True, text=True, check=True)
    return set(re.findall(r"^  make (\S+)", done.stdout, flags=re.MULTILINE))


def test_the_client_example_is_the_tested_one() -> None:
    (block,) = re.findall(
        r"<!-- examples/quickstart.py -->\n```python\n(.*?)```", README, re.DOTALL
    )
    assert block == (REPO / "examples/quickstart.py").read_text()
    assert len(block.splitlines()) <= 20


def test_every_target_explains_itself() -> None:
    phony = set(
        re.findall(r"^\.PHONY: (\S+)$", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
    )
    assert phony == make_targets()


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_make_commands_exist(page: Path) -> None:
    text = page.read_text()
    quoted = re.findall(r"`make ([a-z-]+)", text)
    typed = re.findall(r"^make ([a-z-]+)", "\n".join(shell_lines(text)), flags=re.MULTILINE)
    assert {*quoted, *typed} <= make_targets()


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in shell_lines(page.read_text()):
        if line.partition(" ")[0] not in APPS:
            continue
        words = shlex.split(line, comments=True)
        app, *rest = words
        depth = 2 if (app, rest[0]) in {("lorary", "registry"), ("lorary", "assets")} else 1
        result = CliRunner().invoke(
            APPS[app], [*rest[:depth], "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
        )
        assert result.exit_code == 0, line
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        missing = {option for option in options if option not in result.output}
        assert not missing, f"{line}: {missing}"


def test_where_things_are_names_every_folder() -> None:
    (tree,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    named = set(re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {path.split("/", 1)[0] for path in tracked if "/" in path}
    assert named == {folder for folder in folders if not folder.startswith(".")}


def test_index_names_every_page() -> None:
    index = (REPO / "docs/index.md").read_text()
    pages = {path.name for path in (REPO / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\((\w[\w-]*\.md)\)", index)) == pages


def test_changelog_has_a_section_for_what_comes_next() -> None:
    assert "\n## [Unreleased]\n" in (REPO / "CHANGELOG.md").read_text()
