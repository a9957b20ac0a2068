"""A restore drill: a snapshot that was restored for trial, and what came of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What a drill has shown."""

    PASSED = "passed"  # every block that was restored is what the manifests say
    DAMAGED = "damaged"  # the snapshot does not restore
    FAILED = "failed"  # nothing is known of it: there was no room, or another fault came between


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill. ``written_bytes`` were restored, ``error`` says why it did not pass."""

    disk: str
    snapshot: str
    began_at: float
    ended_at: float
    outcome: Outcome
    written_bytes: int
    error: str = ""
