"""docs/recipes.md says what the code says."""

from __future__ import annotations

from pathlib import Path

from lorary.trainer.recipe_docs import key_table, tasks_key_table
from lorary.trainer.sources import SOURCES

DOCS = Path(__file__).parents[2] / "docs"


def test_document_has_the_generated_table() -> None:
    """When it has not: python -m lorary.trainer.recipe_docs, and paste the tables."""
    text = (DOCS / "recipes.md").read_text()
    assert key_table() in text
    assert tasks_key_table() in text


def test_every_key_has_a_meaning() -> None:
    for line in (*key_table().splitlines()[2:], *tasks_key_table().splitlines()[2:]):
        assert len(line.split("|")[4].strip()) > 10, line


def test_every_source_is_documented() -> None:
    text = (DOCS / "recipes.md").read_text()
    for source in SOURCES:
        assert f"`{source}`" in text
