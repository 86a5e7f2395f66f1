"""What tests say of themselves: which of them passed, and what they recorded (pytest's JUnit file)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One test that was run.

    Attributes:
        name: as pytest has it, parameters included.
        has_passed: whether it did; one that was skipped did not.
        recorded: what it told ``record_property``, in order.
    """

    name: str
    has_passed: bool
    recorded: tuple[tuple[str, str], ...] = ()


def junit_options(path: Path) -> list[str]:
    """Return what tells pytest to write the file that ``read_proofs`` reads.

    The older form of it, for in the newer one tests may say nothing of themselves.
    """
    return ["-o", "junit_family=xunit1", f"--junitxml={path}"]


def read_proofs(path: Path) -> list[Proof]:
    """Return the tests of a JUnit file; none where the run ended before it was written."""
    if not path.exists():
        return []
    proofs = []
    for case in ElementTree.parse(path).iter("testcase"):
        bad = [found for kind in ("failure", "error", "skipped") for found in case.findall(kind)]
        recorded = tuple((one.attrib["name"], one.attrib["value"]) for one in case.iter("property"))
        proofs.append(Proof(name=case.attrib["name"], has_passed=not bad, recorded=recorded))
    return proofs


def values(proofs: Iterable[Proof], prefix: str) -> list[str]:
    """Return what tests that passed recorded under names that begin with ``prefix``."""
    return [v for one in proofs if one.has_passed for k, v in one.recorded if k.startswith(prefix)]


def passed(proofs: Sequence[Proof], prefix: str) -> tuple[int, int]:
    """Return how many tests whose names begin with ``prefix`` passed, and how many there are."""
    asked = [one for one in proofs if one.name.startswith(prefix)]
    return sum(one.has_passed for one in asked), len(asked)
