"""How long to wait before the broker is tried again; pure but for the dice."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Pauses that double from ``min_s`` to ``max_s``, each cut by up to half at random.

    Without the dice all hosts of a site would come back to a restarted broker at the same instant, again and again.
    """

    def __init__(self, min_s: float, max_s: float, dice: Callable[[], float] = random.random) -> None:
        self._min_s = min_s
        self._max_s = max_s
        self._dice = dice
        self._next_s = min_s

    def pause_s(self) -> float:
        """Return the next pause in seconds."""
        pause_s = self._next_s
        self._next_s = min(self._max_s, 2 * self._next_s)
        return self._cut(pause_s)

    def long_pause_s(self) -> float:
        """Return the longest pause: what was refused will be refused again until somebody changes something."""
        return self._cut(self._max_s)

    def reset(self) -> None:
        """Start from the shortest pause again."""
        self._next_s = self._min_s

    def _cut(self, pause_s: float) -> float:
        return pause_s * (1 - self._dice() / 2)
