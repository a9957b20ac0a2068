"""How long work that a full device has stopped is left alone: longer each time, but not once there is more room."""

from __future__ import annotations

from dataclasses import dataclass

from hvsnap.model import OperationId

PAUSE_S_FIRST = 60.0
PAUSE_S_MAX = 1800.0
"""A try reads the disk and what has been written of it: twice an hour is often enough where nobody makes room."""

ROOM_BYTES = 1 << 20
"""More room than this since the last try is worth another one: less comes and goes by itself."""


@dataclass(frozen=True, slots=True)
class _Wait:
    until: float
    pause_s: float
    free_bytes: int


class Patience:
    """Remembers the pauses of open operations. Times are seconds of a clock that nobody sets."""

    def __init__(self) -> None:
        self._waits: dict[OperationId, _Wait] = {}

    def note(self, operation: OperationId, now: float, free_bytes: int) -> None:
        """An operation was stopped as its device is full, which has ``free_bytes`` left."""
        last = self._waits.get(operation)
        pause_s = PAUSE_S_FIRST if last is None else min(PAUSE_S_MAX, 2 * last.pause_s)
        self._waits[operation] = _Wait(now + pause_s, pause_s, free_bytes)

    def forget(self, operation: OperationId) -> None:
        """An operation has ended, or failed for another reason."""
        self._waits.pop(operation, None)

    def is_due(self, operation: OperationId, now: float, free_bytes: int) -> bool:
        """Whether an operation should be tried now: its pause is over, or its device has more room."""
        wait = self._waits.get(operation)
        return wait is None or now >= wait.until or free_bytes > wait.free_bytes + ROOM_BYTES
