"""A bucket of tokens that reading threads take from: one for each capture, and one above them for all captures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.25
"""What a bucket saves up while nobody reads, in seconds of its rate."""

LOOK_S = 0.1
"""How soon a thread that waits notices another rate."""


class Throttle:
    """Lets threads read at a rate. One request may overdraw it: those after it wait for that to be made good.

    In any stretch of time at most rate × (time + ``BURST_S``) is given out, and one request more.
    """

    def __init__(
        self,
        rate_bytes_s: float | None = None,
        above: Throttle | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``rate_bytes_s`` None: as fast as it goes. What is taken here is taken ``above``, too."""
        self._lock = threading.Lock()
        self._above = above
        self._clock = clock
        self._rate = rate_bytes_s
        self._tokens = 0.0
        self._at = clock()
        self._taken = 0

    @property
    def taken_bytes(self) -> int:
        """Bytes that were given out so far."""
        return self._taken

    @property
    def rate_bytes_s(self) -> float | None:
        """The rate; None: as fast as it goes."""
        return self._rate

    def set_rate(self, rate_bytes_s: float | None) -> None:
        """Change the rate; None: as fast as it goes."""
        with self._lock:
            self._refill()
            if self._rate is None or rate_bytes_s is None:
                self._tokens = 0.0
            self._rate = rate_bytes_s

    def wait(self, length: int, stop: threading.Event) -> bool:
        """Return once ``length`` bytes may be read. False: not any more, ``stop`` was set. Blocking."""
        while not stop.is_set():
            pause_s = self.take(length)
            if not pause_s:
                return True
            stop.wait(min(pause_s, LOOK_S))
        return False

    def take(self, length: int) -> float:
        """Take ``length`` bytes and return 0, or return in how many seconds it is worth trying again."""
        with self._lock:
            self._refill()
            if self._rate is not None and self._tokens < 0:
                return -self._tokens / self._rate
            pause_s = 0.0 if self._above is None else self._above.take(length)
            if not pause_s:
                self._taken += length
                if self._rate is not None:
                    self._tokens -= length
            return pause_s

    def _refill(self) -> None:
        now = self._clock()
        if self._rate is not None:
            self._tokens = min(self._rate * BURST_S, self._tokens + (now - self._at) * self._rate)
        self._at = now
