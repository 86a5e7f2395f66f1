"""The Dockerfiles, without a Docker."""

from __future__ import annotations

import re

import pytest

from tests.deploy.files import DEPLOY, REPO, run, tool

DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.c*[!e]"))
NAMES = [path.name for path in DOCKERFILES]


def test_both_images_are_here() -> None:
    assert NAMES == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("name", NAMES)
def test_hadolint_finds_no_fault(name: str) -> None:
    run(tool("hadolint"), DEPLOY / "docker" / name)


@pytest.mark.parametrize("name", NAMES)
def test_image_runs_as_nobody_in_particular(name: str) -> None:
    last_stage = (DEPLOY / "docker" / name).read_text().rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in last_stage
    assert '\nENTRYPOINT ["lorary"]\n' in last_stage
    assert "\nHEALTHCHECK " in last_stage


@pytest.mark.parametrize("name", NAMES)
def test_everything_copied_exists_and_is_sent(name: str) -> None:
    """BuildKit reads ``<Dockerfile>.dockerignore``: what it leaves out cannot be copied."""
    text = (DEPLOY / "docker" / name).read_text()
    ignore = (DEPLOY / "docker" / f"{name}.dockerignore").read_text().splitlines()
    sent = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE)
    paths = [path for line in copied for path in line.split()]
    assert "pyproject.toml" in paths
    for path in paths:
        assert (REPO / path).exists(), path
        assert path in sent, path
