"""How fast the last steps went, for honest estimates; pure Python."""

from __future__ import annotations

KEPT = 1 - 1 / 256
"""How much an older step counts beside the next one: what is remembered is the last few hundred."""
UNMEASURED_S = 1.0
"""What is said of a place's time before the first one was given."""


class Pace:
    """Steps, their seconds and the places given in them, the latest counting most.

    One thread notes; any may read.
    """

    def __init__(self) -> None:
        self._num_steps = 0.0
        self._num_places = 0.0
        self._seconds = 0.0

    def note(self, seconds: float, num_places: int) -> None:
        """Count a step that took so long, and in which so many got a place."""
        self._num_steps = self._num_steps * KEPT + 1
        self._num_places = self._num_places * KEPT + num_places
        self._seconds = self._seconds * KEPT + seconds

    @property
    def step_s(self) -> float:
        """Seconds of a step; 0 before the first."""
        return self._seconds / self._num_steps if self._num_steps else 0.0

    def seconds_for(self, num_places: int) -> float:
        """Return in how many seconds of work so many places become free."""
        if not self._num_places:
            return max(UNMEASURED_S, self._seconds) * num_places
        return num_places * self._seconds / self._num_places
