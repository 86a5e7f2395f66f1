"""Lines that every benchmark's section in the docs is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def origin(record: dict[str, Any]) -> str:
    """Say when, where and with what a record was made."""
    machine = record["machine"]
    return (
        f"{record['date']}, {machine['cpu']} ({machine['cores']} cores, "
        f"{', '.join(machine['vector_units'])}), torch {record['versions']['torch']}, commit "
        f"`{record['commit'][:12]}`{' with local changes' if record['modified'] else ''}; base "
        f"{record['setup']['base']}, {record['setup']['threads']} pinned threads"
    )


def most_foreign(records: Sequence[dict[str, Any]]) -> float:
    """Return the most cores that others used while any accepted record was made; 0 where there is none."""
    return max((float(r["load"]["foreign_cores"]) for r in records if r["accepted"]), default=0.0)
