"""A tokenizer of the tiny base, and a home folder of the test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lorary.bases import PromptBuilder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="session")
def builder(tokenizer: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
