"""Whether a disk has changed as it never does: decided from the figures of its snapshots, purely (SERVICE 12).

A guest whose files are being encrypted shows two things from outside: far more of the disk changes than ever did, and
what is written no longer compresses. Each is compared with the *second highest* of what the disk's earlier snapshots
showed, not with a mean: disks have days and nights, backups on Sundays, months' ends. The second highest asks nothing
of how such figures are distributed. It forgives one exception among them, and it bounds false alarms: a new habit
of a guest is an alarm twice, then it is among what is usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hvsnap.alarm import Alarm, Change, Level

HISTORY_MAX = 400
"""Snapshots of a disk that are compared with: two weeks of hourly ones, a year of daily ones."""

HOURS_MIN = 1.0
"""Shorter intervals count as this long: what changes in a minute says nothing of an hour."""

SHARE_BYTES_MIN = 1 << 20
"""Changes smaller than this say nothing of how well a disk's data compresses."""

SHARE_JUMP = 0.15
"""By how much less the changed data must compress than what is usual."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When a change is unusual. ``enabled`` false: never.

    Changes of less than ``min_bytes``, and disks with fewer than ``history_min`` incremental snapshots, are not judged.
    ``rate_factor``: how many times the usual is a jump. ``stored_share``: what is stored of each changed byte where
    data does not compress. ``hold_days``: how long the last good snapshot is held.
    """

    enabled: bool = True
    min_bytes: int = 512 << 20
    history_min: int = 8
    rate_factor: float = 4.0
    stored_share: float = 0.85
    hold_days: float = 14.0


def bytes_per_hour(change: Change) -> float:
    """Return how fast a disk changed; ``change.hours`` is known."""
    return change.data_bytes / max(HOURS_MIN, change.hours or 0.0)


def stored_share(change: Change) -> float:
    """Return what was stored of each changed byte, 0 to 1."""
    return min(1.0, change.stored_bytes / change.data_bytes) if change.data_bytes else 0.0


def judge(rules: Rules, history: Sequence[Change], now: Change) -> Alarm | None:
    """Return the alarm that a change is, if it is one; ``history`` are the disk's earlier ones, oldest first."""
    history = history[-HISTORY_MAX:]
    usual = [one for one in history if one.hours is not None]
    if not rules.enabled or now.hours is None or now.data_bytes < rules.min_bytes or len(usual) < rules.history_min:
        return None
    rate, usual_rate = bytes_per_hour(now), _second(bytes_per_hour(one) for one in usual)
    # The amount as well: what is rewritten over and over changes faster the sooner one looks again.
    much = now.data_bytes > rules.rate_factor * _second(one.data_bytes for one in usual)
    faster = much and rate > rules.rate_factor * usual_rate
    share, usual_share = stored_share(now), _usual_share(history)
    denser = share >= rules.stored_share and share >= usual_share + SHARE_JUMP
    if not faster and not denser:
        return None
    level = Level.SEVERE if faster and denser else Level.WARNING
    return Alarm(level, faster, denser, rate, usual_rate, share, usual_share)


def is_news(alarm: Alarm, before: Alarm | None) -> bool:
    """Whether an alarm is to be told, after the one of the snapshot before it: once, and again if it gets worse."""
    return before is None or not before.open or (alarm.level is Level.SEVERE and before.level is not Level.SEVERE)


def _usual_share(history: Sequence[Change]) -> float:
    """Return how badly a disk's data compresses at times; its first, full snapshot says so of all of it."""
    telling = [one for one in history if one.data_bytes >= SHARE_BYTES_MIN]
    full = max((stored_share(one) for one in telling if one.hours is None), default=0.0)
    return max(full, _second(stored_share(one) for one in telling if one.hours is not None))


def _second(values: Iterable[float]) -> float:
    """Return the second highest; 0 where there are not two."""
    highest = sorted(values, reverse=True)[:2]
    return highest[1] if len(highest) == 2 else 0.0
