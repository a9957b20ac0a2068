"""How much a disk has changed from one snapshot to the next, and an alarm about it. Values only.

What decides is :mod:`hvsnap.capture.unusual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How strong the suspicion is."""

    WARNING = "warning"  # one sign: it changed far more than ever, or what changed no longer compresses
    SEVERE = "severe"  # both at once, as when a guest's files are being encrypted


@dataclass(frozen=True, slots=True)
class Change:
    """What one snapshot found changed since the one that it builds on.

    ``hours`` lie between the two; None: it builds on none. ``data_bytes`` are of changed blocks that are not zero (what
    was trimmed is no sign of anything), ``stored_bytes`` what the store grew by, after deduplication and compression.
    """

    at: float
    hours: float | None
    data_bytes: int
    stored_bytes: int

    @classmethod
    def since(cls, before: float | None, at: float, data_bytes: int, stored_bytes: int) -> Change:
        """Return what changed up to ``at`` since ``before``, both in seconds since the epoch."""
        hours = None if before is None else max(0.0, at - before) / 3600.0
        return cls(at, hours, data_bytes, stored_bytes)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Why a snapshot is unusual: figures of its change beside those that are usual for the disk.

    ``changed_bytes_h`` are per hour; ``stored_share`` is what was stored of each changed byte, near 1 for what does
    not compress. ``faster`` and ``denser`` say which of the two is the sign. ``acknowledged_at``: somebody has said
    that all is well.
    """

    level: Level
    faster: bool
    denser: bool
    changed_bytes_h: float
    usual_bytes_h: float
    stored_share: float
    usual_share: float
    acknowledged_at: float | None = None

    @property
    def open(self) -> bool:
        """Whether nobody has seen to it yet."""
        return self.acknowledged_at is None
