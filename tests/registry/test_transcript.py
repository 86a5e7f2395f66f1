"""The terminal session in docs/registry.md is what the commands still say."""

from __future__ import annotations

from scripts.transcript_run import COMMANDS, comparable, recorded, transcript


def test_the_recorded_session_is_what_the_commands_say() -> None:
    said, shown = transcript(), recorded()
    assert comparable(said) == comparable(shown), "run scripts/transcript.py"
    assert all(f"$ {command}\n" in shown for command, _ in COMMANDS)
    assert "NaN" in shown


def test_only_what_differs_from_run_to_run_is_not_compared() -> None:
    line = "sentiment  2 prod sha256:abcd 2026-01-01T00:00:00Z"
    assert comparable(line) == comparable(line.replace("abcd", "ef01").replace("2026", "2031"))
    assert comparable(line) != comparable(line.replace("prod", "canary"))
