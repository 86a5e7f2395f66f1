"""What is used stays, and the rest goes, oldest first."""

from __future__ import annotations

from lorary.server.recent import Recent


def test_what_was_longest_unused_is_forgotten() -> None:
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]


def test_putting_anew_is_a_use_and_takes_no_room() -> None:
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    recent.put("a", 4)
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [4, None, 3]
