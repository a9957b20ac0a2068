"""A daemon whose clock a test turns, by the seconds in ``clock`` beside its configuration."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hvsnap import house
from hvsnap.service import scheduler
from tests import run_daemon

CLOCK = Path(sys.argv[1]).parent / "clock"


def turned(_self: house.SystemClock) -> float:
    """Return the time of day as far as the test has turned it."""
    return time.time() + float(CLOCK.read_text() or "0")


if __name__ == "__main__":
    house.SystemClock.now = turned  # type: ignore[method-assign]
    scheduler.LOOK_S = 0.2
    sys.exit(run_daemon.main())
