"""When the instants of several guests' snapshots were, and how far apart they can have been."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

Ready = Callable[[], Awaitable[None]]
"""Awaited when all is made ready for a command, right before it is sent: so that several commands are sent together."""


async def alone() -> None:
    """Wait for nobody."""


@dataclass(frozen=True, slots=True)
class Span:
    """Readings of the host's monotonic clock, in seconds: before a command was sent, and after it was answered.

    What the command did happened in between.
    """

    began_s: float
    ended_s: float


def skew_ms(spans: Sequence[Span]) -> float:
    """Return the milliseconds that the instants within these spans are apart at most, one instant in each.

    It is the time from before the first command was sent until after the last one was answered: a bound, and no
    estimate, rounded up to whole microseconds. One instant alone is apart from nothing.
    """
    if len(spans) < 2:
        return 0.0
    seconds = max(span.ended_s for span in spans) - min(span.began_s for span in spans)
    return math.ceil(seconds * 1e6) / 1e3
